"""How a run is executed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bigtrain.config.core import Broken, Section, execution
from bigtrain.errors import ConfigError

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig, StageConfig

Engine = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]


class ParallelConfig(Section):
    engine: Engine = execution(
        "ddp and fsdp: PyTorch, parameters replicated or sharded (FSDP2). zero1, zero2, zero3: DeepSpeed; optimizer "
        "state, then gradients, then parameters sharded.",
        "ddp",
    )
    processes: int | Literal["auto"] = execution(
        "Processes that a plain `bigtrain run` starts on this machine; auto: one per GPU, else 2. "
        "Another launcher decides itself.",
        "auto",
    )
    device: Literal["auto", "cpu", "cuda"] = execution(
        "Where the processes compute; auto: cuda if there is any.", "auto"
    )
    replicate: int = execution(
        "With fsdp: number of replicas of the sharded model (HSDP). The processes of one replica share it.",
        1,
        ge=1,
    )
    micro_batch_size: int = execution("Sequences that a process runs through the model at once.", 8, ge=1)
    compile: bool = execution(
        "Compile layers and loss with torch.compile: a minute or more at the start, faster steps. Not with zero3.",
        False,
    )
    activation_checkpointing: Literal["none", "full"] = execution(
        "full: keep only the input of each layer for the backward pass and compute the rest again; "
        "about a third more compute, much less memory.",
        "none",
    )

    def check(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        if self.processes != "auto" and self.processes < 1:
            yield ("processes",), f"must be at least 1 or `auto`, got {self.processes}."
        yield from self.contradictions()
        for name in StageParallelConfig.model_fields:
            if self.gives(name) and all(getattr(other.parallel, name) is not None for other in run.stages):
                yield (name,), "has no effect, as every stage has its own; remove it, or those of the stages."

    def contradictions(self) -> Broken:
        """What does not go together, in the run's section or in what a stage makes of it."""
        if self.replicate > 1 and self.engine != "fsdp":
            yield ("replicate",), f"needs engine: fsdp; {self.engine} has no replicas of shards."
        if self.compile and self.engine == "zero3":
            yield ("compile",), "zero3 gathers parameters within each layer; use fsdp, zero1 or zero2."
        if isinstance(self.processes, int) and self.processes % self.replicate:
            yield ("replicate",), f"parallel.processes ({self.processes}) is no multiple of {self.replicate}."


class StageParallelConfig(Section):
    engine: Engine | None = execution("As in `parallel`, for this stage alone; null: as there.", None)
    replicate: int | None = execution("As in `parallel`, for this stage alone; null: as there.", None, ge=1)
    micro_batch_size: int | None = execution("As in `parallel`, for this stage alone; null: as there.", None, ge=1)
    compile: bool | None = execution("As in `parallel`, for this stage alone; null: as there.", None)
    activation_checkpointing: Literal["none", "full"] | None = execution(
        "As in `parallel`, for this stage alone; null: as there.", None
    )

    def check(self, run: RunConfig, stage: StageConfig) -> Broken:
        yield from run.parallel_of(stage).contradictions()


def check_replicas(run: RunConfig, processes: int) -> None:
    """Raises ConfigError if the processes that a launcher has started cannot be divided as `replicate` says."""
    for stage in run.stages:
        replicate = run.parallel_of(stage).replicate
        if processes % replicate:
            raise ConfigError(
                f"parallel.replicate: {processes} as the number of processes is no multiple of {replicate}, the copies "
                f"of stage {stage.name}'s sharded model. Start a multiple of {replicate}, or set another "
                "parallel.replicate: it changes no numbers."
            )
