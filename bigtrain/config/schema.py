"""The schema of a run's file. Free of torch, so that a wrong key is answered before anything heavy is imported.

Every field carries its unit in the description and one mark:

- `mathematics`: decides what is trained; a run cannot be resumed with another value;
- `execution`: decides how; free to change on a resume, the numbers stay the same;
- `reporting`: decides what is shown or kept.

Paths are written with `~` and `$NAME`, as bigtrain.config.texts says.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bigtrain.config.clean import CleanConfig
from bigtrain.config.core import Broken, Section, choice, execution, mathematics, reporting
from bigtrain.config.files import literal
from bigtrain.config.folder import LONG_NAME, RESERVED, wrong_with_folder
from bigtrain.config.model import ModelConfig, TokenizerConfig
from bigtrain.config.origin import Origin
from bigtrain.config.parallel import ParallelConfig, StageParallelConfig
from bigtrain.config.sources import SourceConfig
from bigtrain.config.texts import DURATION, RUN_NAME, STAGE_NAME, PathText
from bigtrain.config.tracking import wrong_with_tracker
from bigtrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from bigtrain.optim import Optimizer
    from bigtrain.tasks import Task
    from bigtrain.training.schedules import Schedule
else:
    Optimizer = choice("bigtrain.optim:Optimizer", default="adamw")
    Schedule = choice("bigtrain.training.schedules:Schedule", default="cosine")
    Task = choice("bigtrain.tasks:Task")


class EvaluateConfig(Section):
    every: int | None = mathematics(
        "Steps between evaluations; null: only before the first and after the last.", None, ge=1
    )
    data: list[SourceConfig] | None = mathematics(
        "Held-out documents, instead of the stage's `held_out`.", None, min_length=1
    )
    sequences: int | None = mathematics(
        "Sequences of an evaluation: the first held-out ones, source after source; null: all.", None, ge=1
    )


class CheckpointConfig(Section):
    every: int | None = reporting("Steps between checkpoints; one is always saved at the end.", None, ge=1)
    keep: int = reporting("How many of the newest checkpoints of a stage stay on disk.", 2, ge=1)
    keep_every: int | None = reporting(
        "Of the older ones, those whose step is a multiple of this stay too; null: none.", None, ge=1
    )
    keep_weights_only: bool = reporting(
        "Whether those that stay by keep_every lose the optimizer's state, two thirds of their size: they can be "
        "evaluated, exported and trained from, but not resumed.",
        False,
    )
    asynchronous: bool = execution(
        "Write behind the steps, from a copy of the state in host memory; false: training waits for the disk, and the "
        "copy is given back.",
        True,
    )

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        if self.gives("keep_weights_only") and self.keep_every is None:
            yield ("keep_weights_only",), "is about what keep_every keeps; add keep_every, or remove it."
        if self.gives("keep_every") and self.every is None:
            yield ("keep_every",), "needs checkpoints to keep; add `every`, or remove it."


class StageConfig(Section):
    name: str = mathematics("Names the stage's folder.", pattern=STAGE_NAME)
    task: Task = mathematics("What is learned: pretrain, sft, classify, or package.module:Class of your own.")
    from_stage: str | None = mathematics(
        "The earlier stage whose weights this one starts from; optimizer and step start anew.",
        None,
        alias="from",
    )
    data: list[SourceConfig] = mathematics("Sources of documents.", min_length=1)
    held_out: float = mathematics(
        "Part of the documents, chosen by a hash of their key, that is not trained on and that `evaluate` uses.",
        0.0,
        ge=0,
        lt=1,
    )
    clean: CleanConfig | None = mathematics(
        "What is done to the training documents before they are tokenized; held-out ones stay as they are. "
        "null: nothing.",
        None,
    )
    sequence_length: int = mathematics("Tokens of a sequence, or of a row at most.", ge=2)
    cross_document_attention: bool = mathematics(
        "Whether a document may read those before it in its sequence. false: positions begin anew with each document, "
        "and architectures for which that is not shown to keep them apart are refused.",
        False,
    )
    global_batch_size: int = mathematics("Sequences of a step, over all processes.", ge=1)
    steps: int | None = mathematics("Length of the stage in optimizer steps.", None, ge=1)
    tokens: int | None = mathematics("Length in tokens; rounded up to whole steps.", None, ge=1)
    epochs: float | None = mathematics("Length in passes over the data; the last step may be smaller.", None, gt=0)
    epochs_of: PathText | None = mathematics(
        "The `source` of `data` that `epochs` counts, where sources have weights; the others give their shares "
        "meanwhile. null: all data, which has no weights then.",
        None,
    )
    freeze: list[str] = mathematics(
        "Parameters that do not train: names, or patterns of a shell (`*`, `?`, `[0-3]`), like model.embed_tokens or "
        "model.layers.[0-3]; a module's name stands for all below it. A tied weight has several names, and any of them "
        "freezes it. They cost no optimizer state, and in bf16 and fp16 no fp32 weights.",
        [],
    )
    optimizer: Optimizer = mathematics("How weights are updated.")
    schedule: Schedule = mathematics("The learning rate as a function of the step.", {}, validate_default=True)
    evaluate: EvaluateConfig | None = mathematics("Loss on documents that are not trained on; null: none.", None)
    checkpoint: CheckpointConfig = reporting("When the state is saved.", CheckpointConfig())
    parallel: StageParallelConfig = execution(
        "What this stage does differently from `parallel`.", StageParallelConfig()
    )
    export: bool = reporting("Write OUTPUT/NAME/STAGE/export, a Hugging Face folder, at the run's end.", True)
    prompts: list[str] = reporting("Prompts that the exported model answers at the run's end, to be read.", [])

    @property
    def sources(self) -> list[SourceConfig]:
        """All that the stage reads."""
        return [*self.data, *((self.evaluate.data if self.evaluate else None) or [])]

    @property
    def num_steps(self) -> int | None:
        """Of the whole stage; None where they depend on its data, or its length is not given as it must be."""
        lengths = [self.steps, self.tokens, self.epochs]
        if self.epochs is not None or sum(length is not None for length in lengths) != 1:
            return None
        return self.sequences(0) // self.global_batch_size

    def sequences(self, samples: int) -> int:
        """That the whole stage trains on, where one epoch has `samples`."""
        if self.steps is not None:
            return self.steps * self.global_batch_size
        if self.tokens is not None:
            steps = -(-self.tokens // (self.global_batch_size * self.sequence_length))
            return steps * self.global_batch_size
        assert self.epochs is not None
        return max(1, round(self.epochs * samples))

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        earlier = [other.name for other in takewhile(lambda other: other is not self, run.stages)]
        if self.name in RESERVED:
            yield ("name",), f"`{self.name}` is the name of something else in a run's folder; choose another."
        if self.name in earlier:
            yield ("name",), f"there are two stages named {literal(self.name)}."
        yield from _long_name(self.name)
        if self.from_stage is not None and self.from_stage not in earlier:
            names = ", ".join(earlier) or "none"
            yield ("from",), f"{literal(self.from_stage)} is no earlier stage (earlier: {names})."
        lengths = [key for key in ("steps", "tokens", "epochs") if getattr(self, key) is not None]
        if len(lengths) != 1:
            yield (), f"give one of steps, tokens and epochs; found {' and '.join(lengths) or 'none of them'}."
        positions = (run.model.from_config or {}).get("max_position_embeddings")
        if isinstance(positions, int) and self.sequence_length > positions:
            yield (
                ("sequence_length",),
                f"{self.sequence_length} is longer than model.from_config.max_position_embeddings ({positions}).",
            )
        if self.prompts and not self.task.generates:
            yield ("prompts",), f"a model of the task {self.task.name} answers none; remove them."
        elif self.prompts and not self.export:
            yield ("prompts",), "the exported model answers them, and `export` is false; remove one of them."
        yield from self._check_weights()
        yield from self._check_evaluation()

    def _check_weights(self) -> Broken:
        names, weighted = [source.source for source in self.data], [s for s in self.data if s.weight is not None]
        if len(self.data) == 1 and weighted:
            yield ("data", 0, "weight"), "is relative to other sources, and there is none; remove it."
        elif 0 < len(weighted) < len(self.data):
            yield ("data",), "give a weight to every source or to none."
        elif self.epochs_of is None and self.epochs is not None and weighted:
            told = "weighted sources have no common epoch; name one of them as `epochs_of`, or use steps or tokens."
            yield ("epochs",), told
        if self.epochs_of is None:
            return
        if self.epochs is None:
            yield ("epochs_of",), "says what `epochs` counts; give epochs, or remove it."
        elif not weighted:
            yield ("epochs_of",), "without weights an epoch is one of all sources; give them weights, or remove it."
        elif self.epochs_of not in names:
            yield ("epochs_of",), f"no source of the stage is {self.epochs_of}; {nearest(self.epochs_of, names)}"
        elif names.count(self.epochs_of) > 1:
            several = f"{names.count(self.epochs_of)} sources have this name; the one that is meant needs its own."
            yield ("epochs_of",), several

    def _check_evaluation(self) -> Broken:
        data = None if self.evaluate is None else self.evaluate.data
        if self.evaluate is None:
            if self.held_out:
                yield ("held_out",), "documents are held out but never evaluated; add `evaluate:`."
        elif data is None and not self.held_out:
            yield ("evaluate",), "needs documents: set held_out (like 0.05) on the stage, or evaluate.data."
        elif data is not None and self.held_out:
            yield ("held_out",), "give either held_out or evaluate.data."
        elif data is not None and any(source.weight is not None for source in data):
            yield ("evaluate", "data"), "held-out sources are evaluated whole; leave weight out."

    def check_here(self, run: RunConfig, stage: StageConfig) -> Broken:  # noqa: ARG002
        positions = run.model.positions_here(run)
        if positions is not None and self.sequence_length > positions:
            yield (
                ("sequence_length",),
                f"{self.sequence_length} is longer than max_position_embeddings ({positions}) of "
                f"{run.model.from_pretrained or run.model.folder_here(run)}.",
            )

    def unusual(self, run: RunConfig, stage: StageConfig) -> Iterator[str]:  # noqa: ARG002
        micro, batch = run.parallel_of(self).micro_batch_size, self.global_batch_size
        if micro > batch and micro != type(run.parallel).model_fields["micro_batch_size"].default:
            yield f"global_batch_size: {batch} is less than micro_batch_size ({micro}), which shrinks to it."
        for source in (self.evaluate.data if self.evaluate else None) or []:
            for trained in reversed(run.lineage(self)):
                if any(source.overlaps(other) for other in trained.data):
                    yield (
                        f"evaluate.data: {source.source} is trained on too, in stage {trained.name}: the loss on it "
                        "says nothing about other documents. Evaluate on others, or hold some out with `held_out`."
                    )


class ProfileConfig(Section):
    steps: list[int] = reporting(
        "[first, last] step of a stage of which a trace (and on a GPU a memory snapshot) is written.",
        min_length=2,
        max_length=2,
    )

    def check(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        first, last = self.steps
        lengths = [other.num_steps for other in run.stages]
        known = [length for length in lengths if length is not None]
        if first < 1 or last < first:
            yield ("steps",), f"[first, last] count from 1 and do not decrease, got [{first}, {last}]."
        elif len(known) == len(lengths) and first > max(known):
            told = f"begins at step {first}, and no stage has more than {max(known)}; choose earlier steps."
            yield ("steps",), told


class RunConfig(Section):
    name: str = reporting("The run lives in OUTPUT/NAME.", pattern=RUN_NAME)
    output: PathText = reporting("Folder of runs and of the token stores that they share.", "runs")
    seed: int = mathematics("Of initial weights, sample order and dropout.", 0, ge=0, lt=2**31)
    model: ModelConfig = mathematics("What is trained.")
    tokenizer: TokenizerConfig | None = mathematics(
        "Text to tokens; null: that of `model.from_pretrained` or `model.from_run`.", None
    )
    precision: Literal["fp32", "bf16", "fp16"] = mathematics(
        "Of parameters in forward and backward; masters, moments, accumulation and loss are always fp32. "
        "fp16 needs a GPU.",
        "bf16",
    )
    attention: Literal["sdpa", "flash", "flex", "eager"] = execution(
        "Attention implementation of transformers. sdpa: PyTorch's own; flash: the package flash-attn, which needs no "
        "mask; flex: PyTorch's flex_attention. flash and flex need a GPU.",
        "sdpa",
    )
    deterministic: bool = execution(
        "On GPUs: only kernels that give the same bits every time, some of them slower, so that a run which is killed "
        "and started again on as many processes ends in the same weights to the last bit. On a CPU it does so anyway.",
        False,
    )
    parallel: ParallelConfig = execution("How it is executed, never what is trained.", ParallelConfig())
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = reporting(
        "Experiment trackers that get the metrics as well; they must be installed.", []
    )
    time_limit: str | None = reporting(
        "Like 11h30m, counted from the start of the ranks: the run saves and leaves in time, with exit code 75; "
        "started again it goes on. null: none.",
        None,
        pattern=DURATION,
    )
    profile: ProfileConfig | None = reporting("Steps to look at with the profiler; null: none.", None)
    stages: list[StageConfig] = mathematics("Trained one after the other.", min_length=1)

    def stage(self, name: str, lacks: str) -> StageConfig:
        """The stage of this name. Raises ConfigError: `lacks`, which says that there is none, and the nearest names."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"{lacks}; {nearest(name, [stage.name for stage in self.stages])}")

    def asked_stage(self, name: str, option: str = "--stage") -> StageConfig:
        """The stage that a command's option names. Raises ConfigError."""
        return self.stage(name, f"{option} {name}: there is no such stage")

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.output) / self.name

    @property
    def stores(self) -> Path:
        """The folder of what is made of documents; runs with the same `output` share it."""
        return Path(self.output) / "stores"

    @property
    def time_limit_seconds(self) -> float | None:
        if self.time_limit is None:
            return None
        units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
        return float(sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+)([dhms])", self.time_limit)))

    @property
    def needs_document_mask(self) -> bool:
        """Whether some stage relies on the architecture to keep the documents of a sequence apart."""
        return any(s.task.layout != "rows" and not s.cross_document_attention for s in self.stages)

    @property
    def adds_tokens(self) -> bool:
        """Whether the tokenizer grows, and with it a pretrained model's embedding."""
        return self.tokenizer is not None and bool(self.tokenizer.add_tokens)

    @property
    def given_tokenizer(self) -> str | None:
        """The folder or Hub id of the tokenizer; None if it is trained on the run's own documents."""
        if self.tokenizer is not None:
            return self.tokenizer.from_pretrained
        from_run = self.model.from_run
        return self.model.from_pretrained if from_run is None else str(Origin.of(from_run).tokenizer)

    def parallel_of(self, stage: StageConfig) -> ParallelConfig:
        """How a stage is executed: `parallel` with what the stage says differently."""
        return self.parallel.model_copy(update=stage.parallel.model_dump(exclude_none=True))

    @property
    def has_begun(self) -> bool:
        """Whether the run's folder has what was taken from the model that the file names."""
        return (self.folder / "architecture" / "manifest.json").is_file()

    def lineage(self, stage: StageConfig) -> list[StageConfig]:
        """The stages that a stage's weights have gone through, first to last."""
        stages = {other.name: other for other in self.stages}
        path = [stage]
        while path[0].from_stage is not None:
            path.insert(0, stages[path[0].from_stage])
        return path

    def check(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        yield from _long_name(self.name)
        if self.name == "stores":
            yield ("name",), "`stores` is the folder of the token stores; choose another name."
        if self.tokenizer is None and self.model.from_config is not None:
            told = "is required with model.from_config: {train: {vocab_size: ...}} or {from_pretrained: ...}."
            yield ("tokenizer",), told
        on_cpu = self.parallel.device == "cpu"
        if self.precision == "fp16" and on_cpu:
            yield ("precision",), "fp16 needs a GPU; use bf16 or fp32 with parallel.device: cpu."
        if self.attention in ("flash", "flex") and on_cpu:
            yield ("attention",), f"{self.attention} needs a GPU; use sdpa with parallel.device: cpu."
        if self.attention == "flash" and self.precision == "fp32":
            yield ("attention",), "flash has no fp32; use precision: bf16, or attention: sdpa."
        if self.deterministic and on_cpu:
            yield ("deterministic",), "is for GPUs; with parallel.device: cpu it is so anyway. Remove it."
        if self.time_limit_seconds == 0:
            yield ("time_limit",), f"{self.time_limit} is no time at all; give one, like 11h30m, or remove it."
        for i, tracker in enumerate(self.trackers):
            if tracker in self.trackers[:i]:
                yield ("trackers", i), f"{tracker} is there twice; remove one."

    def check_here(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        yield from wrong_with_folder(Path(self.output), self.folder)
        for i, name in enumerate(self.trackers):
            if wrong := wrong_with_tracker(name):
                yield ("trackers", i), wrong
        if self.attention == "flash" and importlib.util.find_spec("flash_attn") is None:
            told = "flash needs the package flash-attn, which is not installed; install it, or use sdpa."
            yield ("attention",), told


def _long_name(name: str) -> Broken:
    if len(name) > LONG_NAME:
        yield ("name",), f"{len(name)} characters are too long for the name of a folder; at most {LONG_NAME}."
