"""`bigtrain run CONFIG --dry-run`: what the run amounts to, and the resolved file. Nothing is trained or written."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from bigtrain.config.checks import unusual
from bigtrain.config.load import DEFAULT, Loaded, lacking
from bigtrain.config.origin import Origin
from bigtrain.config.parallel import check_replicas
from bigtrain.config.schema import RunConfig, StageConfig
from bigtrain.config.show import as_yaml, resolved
from bigtrain.launching.launchers import adopt
from bigtrain.launching.spawn import processes_here
from bigtrain.masking import masked
from bigtrain.observability.console import console
from bigtrain.state import Shape


@dataclass(frozen=True)
class Size:
    """Shapes of a model's parameters by name, those of the embedding included; elements of the embedding alone;
    dropout by its key; the name in `shapes` of every name of a parameter, tied ones have several."""

    model_type: str
    shapes: dict[str, Shape]
    embedding: int
    dropout: dict[str, float]
    names: dict[str, str]

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def trained(self, stage: StageConfig) -> dict[str, Shape]:
        """Shapes of what a stage trains. Raises ConfigError for a `freeze` that does not fit the model."""
        from bigtrain.models.freeze import frozen

        still = frozen(self.names, stage.freeze, f"stages.{stage.name}.freeze")
        return {name: shape for name, shape in self.shapes.items() if name not in still}


@dataclass(frozen=True)
class Shares:
    """How a full global batch falls on the processes."""

    processes: int
    rows: tuple[int, int]  # of the emptiest and of the fullest process
    micro_batches: int
    micro_batch_size: int  # after it shrank to what the fullest process has
    dummies: int  # rows without targets, over all processes, that make the micro-batches equal


def dry_run(loaded: Loaded, defaults: bool = False) -> None:
    """Print the model's size, each stage's length and layout, what a run lacks here, and the values that were given,
    each with its origin; with `defaults` the others too.

    Raises ConfigError for what only shows when the architecture is built.
    """
    adopt()
    run, processes = loaded.run, _processes(loaded.run)
    check_replicas(run, processes)
    if os.environ.get("RANK", "0") != "0":
        return  # of the ranks that a launcher has started, one is enough to tell
    out = console()
    size = model_size(run)
    model, about = _model_lines(size)
    if run.model.from_run is not None:
        origin = Origin.of(run.model.from_run)
        about.append(("first weights", f"{origin.checkpoint or origin.problem()}"))
    for name, told in [(model, about), *(_stage_lines(run, stage, size, processes) for stage in run.stages)]:
        out.print(Text(name, "bold"))
        for key, text in told:
            out.print(Text(f"  {key:<24}{text}"))
    for text in (*unusual(run), *_left_out(run, size)):
        out.print(Text(masked(f"warning: {text}"), "yellow"))
    for line in lacking(loaded):
        out.print(Text(masked(f"would be refused here: {line}"), "yellow"))
    _print_values(out, loaded, defaults)


def _print_values(out: Console, loaded: Loaded, defaults: bool) -> None:
    rows = [(key, masked(as_yaml(value)), origin) for key, value, origin in resolved(loaded)]
    given = [row for row in rows if row[2] != DEFAULT]
    left = [row for row in rows if row[2] == DEFAULT]
    shown = rows if defaults else given
    keys, values = (min(60, max(len(row[column]) for row in shown)) for column in (0, 1))
    for title, section in (("given", given), ("defaults", left if defaults else [])):
        if section:
            out.print(Text(f"\n{title}", "bold"))
        for key, value, origin in section:
            out.print(Text.assemble((f"  {key:<{keys}}", "bold"), f"  {value:<{values}}  ", (origin, "dim")))
    if left and not defaults:
        out.print(Text(f"\n{len(left)} more values are defaults; --all shows them", "dim"))


def model_size(run: RunConfig) -> Size | str:
    """The model's size, from its architecture on torch's meta device; or why it is not known here."""
    model, tokenizer = run.model, run.tokenizer
    if model.from_pretrained is not None and not (Path(model.from_pretrained) / "config.json").is_file():
        return f"not known without loading {model.from_pretrained}"
    if model.from_run is not None and Origin.of(model.from_run).problem() is not None:
        return f"not known: {model.from_run} cannot be opened"
    entries = _vocabulary(run)
    if model.from_config is not None and entries is None:
        name = tokenizer.from_pretrained if tokenizer else None
        return f"not known without loading the tokenizer {name}; model.from_config.vocab_size would tell"
    with _no_garbage():
        return _built(run, entries or 0)


def _built(run: RunConfig, entries: int) -> Size:
    from bigtrain.models.architecture import dropouts, parameter_shapes
    from bigtrain.models.freeze import parameter_names
    from bigtrain.models.trial import try_architecture
    from bigtrain.pretrained import quiet

    quiet()
    empty = try_architecture(
        run.model,
        entries,
        attention=run.attention,
        needs_document_mask=run.needs_document_mask,
        added_tokens=run.adds_tokens,
        longest=max(stage.sequence_length for stage in run.stages),
    )
    embedding: Any = empty.get_input_embeddings()
    return Size(
        empty.config.model_type,
        parameter_shapes(empty),
        embedding.weight.numel(),
        dropouts(empty.config),
        parameter_names(empty),
    )


def _left_out(run: RunConfig, size: Size | str) -> list[str]:
    """Where the model could be opened without loading it."""
    from bigtrain.inference.generation import left_out

    return [] if isinstance(size, str) else left_out(run.model, run.stages)


def shares(global_batch_size: int, processes: int, micro_batch_size: int) -> Shares:
    """The step contract's division of a full global batch."""
    fullest = -(-global_batch_size // processes)
    size = min(micro_batch_size, fullest)
    count = -(-fullest // size)
    dummies = processes * count * size - global_batch_size
    return Shares(processes, (global_batch_size // processes, fullest), count, size, dummies)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Importing torch and transformers makes objects that all stay; looking for garbage takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _vocabulary(run: RunConfig) -> int | None:
    """Entries of the tokenizer as far as they are known without the Hub; else those that the model is to have."""
    from_config = (run.model.from_config or {}).get("vocab_size")
    added = len(run.tokenizer.add_tokens) if run.tokenizer else 0
    if run.tokenizer is not None and run.tokenizer.train is not None:
        # A small sample of text can give fewer entries; a model with a size of its own has room for those.
        return from_config or run.tokenizer.train.vocab_size + added
    name = run.given_tokenizer
    file = Path(name or "") / "tokenizer.json"
    if not file.is_file():
        return from_config
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(list(run.tokenizer.add_tokens) if run.tokenizer else [])
    return max(tokenizer.get_vocab().values()) + 1  # ids may have gaps


def _processes(run: RunConfig) -> int:
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return processes_here(run.parallel.processes, run.parallel.device)[0]


def _model_lines(size: Size | str) -> tuple[str, list[tuple[str, str]]]:
    if isinstance(size, str):
        return "model", [("parameters", size)]
    share = f"{size.embedding:,} of them in the embedding"
    told = [("parameters", f"{size.parameters:,} ({share})")]
    if size.dropout:
        named = ", ".join(f"{key} {value:g}" for key, value in size.dropout.items())
        told.append(
            ("dropout", f"{named}; its draws depend on the number of processes, the engine and the micro-batch")
        )
    return f"model {size.model_type}", told


def _stage_lines(
    run: RunConfig, stage: StageConfig, size: Size | str, processes: int
) -> tuple[str, list[tuple[str, str]]]:
    batch, length = stage.global_batch_size, stage.sequence_length
    told = [("global batch", f"{batch:,} sequences of {length:,} = {batch * length:,} tokens")]
    sequences = _sequences(run, stage)
    if sequences is None:
        counted = f"{stage.epochs:g} x {stage.epochs_of or 'all data'}"
        told.append(("length", f"{counted}; how many steps that is, the token store will tell; it is not made yet"))
    else:
        tokens = sequences * length
        told.append(("length", f"{-(-sequences // batch):,} steps = {tokens:,} tokens"))
        if isinstance(size, Size):
            told.append(("tokens per parameter", f"{tokens / size.parameters:.3g}"))
    if stage.freeze and isinstance(size, Size):
        trained = sum(map(math.prod, size.trained(stage).values()))
        told.append(("trained parameters", f"{trained:,} of {size.parameters:,}"))
    parallel = run.parallel_of(stage)
    shared = shares(batch, processes, parallel.micro_batch_size)
    least, most = shared.rows
    copies = f", {parallel.replicate} replicas of {processes // parallel.replicate}" if parallel.replicate > 1 else ""
    told += [
        ("processes", f"{processes} ({parallel.engine}{copies})"),
        ("rows per process", f"{most}" if least == most else f"{least}-{most}"),
        ("micro-batches per step", f"{shared.micro_batches} of {shared.micro_batch_size}"),
    ]
    if shared.dummies:
        told.append(("dummy rows", f"{shared.dummies} per step, computed and not counted"))
    return f"stage {stage.name}", told


def _sequences(run: RunConfig, stage: StageConfig) -> int | None:
    """Sequences of a whole stage; None where they depend on a token store that nobody has made."""
    if stage.epochs is None:
        return stage.sequences(0)
    samples = _samples(run, stage) if run.stores.is_dir() else None
    if samples is None:
        return None
    from bigtrain.data.order import stage_samples

    return stage_samples(stage, samples)


def _samples(run: RunConfig, stage: StageConfig) -> list[int] | None:
    """Samples of each of the stage's stores, if all are there."""
    from bigtrain.data.fingerprints import is_known
    from bigtrain.data.prepare import training_parts
    from bigtrain.data.store import open_store
    from bigtrain.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    first = run.stages[0]
    if not all(is_known(source, run.stores) for source in (*first.sources, *stage.sources)):  # reading them takes time
        return None
    where = _tokenizer_folder(run)
    if where is None:
        return None
    task = stage.task
    tokenizer = load_tokenizer(where, run.tokenizer.add_tokens if run.tokenizer else ())
    same = {"encoding": task.encoding, "tokenizer": tokenizer_fingerprint(tokenizer), "seed": run.seed}
    same |= {"layout": task.layout} | ({} if task.layout == "windows" else {"sequence_length": stage.sequence_length})
    parts = training_parts(stage, task.columns, run.stores, make=False)
    found = [_made(run, part.metadata(task.columns) | same) for part in parts]
    folders = [folder for folder in found if folder is not None]
    if len(folders) < len(found):
        return None
    return [open_store(folder, stage.sequence_length).samples for folder in folders]


def _tokenizer_folder(run: RunConfig) -> Path | None:
    if run.tokenizer is not None and run.tokenizer.train is not None:
        from bigtrain.data.prepare import training_parts

        columns = run.stages[0].task.columns
        parts = [part.metadata(columns) for part in training_parts(run.stages[0], columns, run.stores, make=False)]
        return _made(run, {**run.tokenizer.train.model_dump(), "documents": parts})
    name = run.given_tokenizer
    return Path(name) if name is not None and Path(name).exists() else None


def _made(run: RunConfig, metadata: dict[str, Any]) -> Path | None:
    """The folder below OUTPUT/stores that was made from this metadata."""
    for manifest in sorted(run.stores.glob("*/manifest.json")):
        if metadata.items() <= json.loads(manifest.read_text(encoding="utf-8")).items():
            return manifest.parent
    return None
