"""The stages of a run in order, each fed by the one before; finished ones are skipped."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

import bigtrain
from bigtrain.checkpoint import Checkpoint, complete, save
from bigtrain.config import Run, differences, load_config, to_yaml
from bigtrain.config.schema import Stage
from bigtrain.data.batches import Batches, held_out_batches
from bigtrain.data.prepare import StageData, open_tokenizer, prepare_stage
from bigtrain.errors import ConfigError
from bigtrain.models.causal_lm import empty_model, model_config
from bigtrain.models.weights import RandomWeights, pretrained_weights
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Files, Stream
from bigtrain.parallel import build_engine
from bigtrain.parallel.contract import Engine
from bigtrain.parallel.world import World, joined
from bigtrain.state import Reader
from bigtrain.tasks import TASKS, Task
from bigtrain.training.loop import train
from bigtrain.training.run import StageRun

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def run_here(config: Run) -> None:
    """Run all stages with this process as one rank: that of the launcher's environment, or the only one."""
    begun = time.monotonic()
    with joined(config.parallel.device, config.precision) as world:
        folder = Path(config.output) / config.name
        if world.rank == 0:
            _open_folder(folder, config, world)
        dist.barrier()
        stream = Stream([Files(folder), Progress()] if world.rank == 0 else [])
        stream.emit(
            "started",
            version=bigtrain.__version__,
            folder=str(folder),
            world_size=world.size,
            engine=config.parallel.engine,
            precision=config.precision,
            device=str(world.device),
        )
        _Pipeline(config, world, folder, stream).run()
        stream.emit("finished", folder=str(folder), seconds=time.monotonic() - begun)


def _open_folder(folder: Path, config: Run, world: World) -> None:
    """Make the run's folder, or check that this is the run that lives there.

    Raises ConfigError when a field that decides what is trained differs from the run's.
    """
    written = folder / "config.yaml"
    if written.exists():
        changed = differences(load_config(written), config, "mathematics")
        if changed:
            lines = [f"  {key}: {old!r} in the run, {new!r} now" for key, old, new in changed]
            raise ConfigError(
                f"{folder} holds a run that trains something else:\n" + "\n".join(lines) + "\n"
                "Give this one another `name`, or set the values back to continue that run."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another `name` or `output`.")
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(to_yaml(config))
    facts = {
        "versions": {name: _version(name) for name in ("bigtrain", "torch", "transformers", "deepspeed", "datasets")},
        "python": platform.python_version(),
        "machine": platform.node(),
        "world_size": world.size,
        "seed": config.seed,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


@dataclass
class _Pipeline:
    config: Run
    world: World
    folder: Path
    stream: Stream

    def run(self) -> None:
        """Prepare all data first, so that what is wrong with it shows before anything is trained; then train."""
        tokenizer = open_tokenizer(self.config)
        added = bool(self.config.tokenizer and self.config.tokenizer.add_tokens)
        model = model_config(self.config.model, tokenizer, added)
        tasks = {stage.name: TASKS[stage.task]() for stage in self.config.stages}
        data = {s.name: prepare_stage(self.config, s, tasks[s.name], tokenizer) for s in self.config.stages}
        for stage in self.config.stages:
            self._stage(stage, tasks[stage.name], data[stage.name], model)

    def _stage(
        self,
        stage: Stage,
        task: Task,
        data: StageData,
        model: PreTrainedConfig,
    ) -> None:
        sequences = _sequences(stage, sum(store.samples for store in data.train))
        checkpoints = self.folder / stage.name / "checkpoints"
        found = complete(checkpoints)
        resumed = Checkpoint(found[-1]) if found else None
        run = StageRun(stage, sequences, resumed.step if resumed else 0, self.stream)
        if run.done == run.steps:
            self.stream.emit("stage_skipped", stage=stage.name, steps=run.steps)
            return
        parallel = self.config.parallel_of(stage)
        build = partial(
            empty_model,
            model,
            attention=self.config.attention,
            activation_checkpointing=parallel.activation_checkpointing,
        )
        engine = build_engine(
            parallel.engine,
            build,
            task,
            replicate=parallel.replicate,
            precision=self.config.precision,
            micro_batch_size=parallel.micro_batch_size,
            optimizer=stage.optimizer,
            seed=self.config.seed,
            device=self.world.device,
        )
        reader, weights = (
            (resumed, f"resumed from {found[-1].name}") if resumed else self._first_weights(stage, model, build)
        )
        engine.load(reader, resumed.progress if resumed else {"updates": 0})
        self.stream.emit(
            "stage_started",
            stage=stage.name,
            model=model.model_type,
            parameters=sum(p.numel() for p in build(meta=True).parameters()),
            weights=weights,
            done=run.done,
            steps=run.steps,
            global_batch_size=stage.global_batch_size,
            sequence_length=stage.sequence_length,
        )
        self._train(stage, run, engine, data, checkpoints, sequences)
        engine.close()

    def _train(
        self, stage: Stage, run: StageRun, engine: Engine, data: StageData, checkpoints: Path, sequences: int
    ) -> None:
        rank, size = self.world.rank, self.world.size
        batches = Batches(
            data.train,
            data.weights,
            seed=self.config.seed,
            global_batch_size=stage.global_batch_size,
            total_samples=sequences,
            rank=rank,
            world_size=size,
        )
        limit = stage.evaluate.sequences if stage.evaluate else None
        train(
            run,
            engine,
            batches,
            held_out=partial(held_out_batches, data.held_out, stage.global_batch_size, limit, rank, size),
            save=lambda: save(checkpoints, run.done, engine.boxes(), engine.progress(), stage.checkpoint.keep),
        )

    def _first_weights(self, stage: Stage, model: PreTrainedConfig, build: Any) -> tuple[Reader, str]:
        if stage.from_stage is not None:
            checkpoints = complete(self.folder / stage.from_stage / "checkpoints")
            return Checkpoint(checkpoints[-1], weights_only=True), f"from {stage.from_stage}"
        if self.config.model.from_pretrained is not None:
            source = self.config.model.from_pretrained
            return pretrained_weights(source, model.vocab_size, self.config.seed), f"from {source}"
        return RandomWeights(build(meta=True), self.config.seed), "random weights"


def _sequences(stage: Stage, samples: int) -> int:
    """Sequences of a whole stage, of which one epoch has `samples`."""
    if stage.steps is not None:
        return stage.steps * stage.global_batch_size
    if stage.tokens is not None:
        steps = -(-stage.tokens // (stage.global_batch_size * stage.sequence_length))
        return steps * stage.global_batch_size
    assert stage.epochs is not None
    return max(1, round(stage.epochs * samples))
