"""What single fields cannot say: rules between fields, each naming the key to change."""

from __future__ import annotations

from collections.abc import Iterator

from bigtrain.config.files import KeyPath
from bigtrain.config.schema import Run, Source, Stage


def broken_rules(run: Run) -> list[tuple[KeyPath, str]]:
    """(path of the key to change, message) for every rule that the run breaks."""
    return [
        *_top(run),
        *_parallel(run),
        *(broken for i in range(len(run.stages)) for broken in _stage(run, i)),
    ]


def _top(run: Run) -> Iterator[tuple[KeyPath, str]]:
    model, tokenizer = run.model, run.tokenizer
    if (model.from_config is None) == (model.from_pretrained is None):
        yield ("model",), "give either from_config or from_pretrained."
    if model.from_config is not None and not isinstance(model.from_config.get("model_type"), str):
        yield (
            ("model", "from_config"),
            "needs model_type, the architecture's name in transformers, like `llama`.",
        )
    if tokenizer is None and model.from_pretrained is None:
        yield (
            ("tokenizer",),
            "is required with model.from_config: {train: {vocab_size: ...}} or {from_pretrained: ...}.",
        )
    if tokenizer is not None and (tokenizer.train is None) == (tokenizer.from_pretrained is None):
        yield ("tokenizer",), "give either train or from_pretrained."
    if run.name == "stores":
        yield ("name",), "`stores` is the folder of the token stores; choose another name."
    if run.precision == "fp16" and run.parallel.device == "cpu":
        yield ("precision",), "fp16 needs a GPU; use bf16 or fp32 with parallel.device: cpu."


def _parallel(run: Run) -> Iterator[tuple[KeyPath, str]]:
    processes = run.parallel.processes
    if processes != "auto" and processes < 1:
        yield ("parallel", "processes"), f"must be at least 1 or `auto`, got {processes}."
    for at, parallel in [((), run.parallel), *((("stages", i), run.parallel_of(s)) for i, s in enumerate(run.stages))]:
        if parallel.replicate > 1 and parallel.engine != "fsdp":
            yield (*at, "parallel", "replicate"), f"needs engine: fsdp; {parallel.engine} has no replicas of shards."
        if isinstance(processes, int) and processes % parallel.replicate:
            yield (
                (*at, "parallel", "replicate"),
                f"parallel.processes ({processes}) is no multiple of {parallel.replicate}.",
            )


def _stage(run: Run, i: int) -> Iterator[tuple[KeyPath, str]]:
    stage, at = run.stages[i], ("stages", i)
    earlier = [other.name for other in run.stages[:i]]
    if stage.name in earlier:
        yield (*at, "name"), f"there are two stages named {stage.name!r}."
    if stage.from_stage is not None and stage.from_stage not in earlier:
        names = ", ".join(earlier) or "none"
        yield (*at, "from"), f"{stage.from_stage!r} is no earlier stage (earlier: {names})."
    lengths = [key for key in ("steps", "tokens", "epochs") if getattr(stage, key) is not None]
    if len(lengths) != 1:
        found = " and ".join(lengths) or "none of them"
        yield at, f"give one of steps, tokens and epochs; found {found}."
    positions = (run.model.from_config or {}).get("max_position_embeddings")
    if isinstance(positions, int) and stage.sequence_length > positions:
        yield (
            (*at, "sequence_length"),
            f"{stage.sequence_length} is longer than model.from_config.max_position_embeddings ({positions}).",
        )
    if any(not 0 <= beta < 1 for beta in stage.optimizer.betas):
        yield (
            (*at, "optimizer", "betas"),
            f"each must be at least 0 and below 1, got {stage.optimizer.betas}.",
        )
    yield from _weights(stage.data, (*at, "data"))
    if stage.epochs is not None and any(source.weight is not None for source in stage.data):
        yield (*at, "epochs"), "weighted sources have no common epoch; use steps or tokens."
    yield from _evaluation(stage, at)


def _evaluation(stage: Stage, at: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if stage.evaluate is None:
        if stage.held_out:
            yield (*at, "held_out"), "documents are held out but never evaluated; add `evaluate:`."
    elif stage.evaluate.data is None and not stage.held_out:
        yield (*at, "evaluate"), "needs documents: set held_out (like 0.05) on the stage, or evaluate.data."
    elif stage.evaluate.data is not None and stage.held_out:
        yield (*at, "held_out"), "give either held_out or evaluate.data."
    elif stage.evaluate.data is not None and any(source.weight is not None for source in stage.evaluate.data):
        yield (*at, "evaluate", "data"), "held-out sources are evaluated whole; leave weight out."


def _weights(sources: list[Source], at: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    weighted = sum(source.weight is not None for source in sources)
    if 0 < weighted < len(sources):
        yield at, "give a weight to every source or to none."
