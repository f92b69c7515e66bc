"""What single fields cannot say: rules between fields and rules about this disk, each naming the key to change."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtrain.config.core import Broken, Component, sections
from bigtrain.config.effects import without_effect
from bigtrain.config.files import KeyPath, literal
from bigtrain.config.origin import Origin
from bigtrain.config.schema import RunConfig, SourceConfig, StageConfig
from bigtrain.config.sources import HUB_ID, kind_of, parse_split, wrong_with
from bigtrain.config.tracking import wrong_with_tracker
from bigtrain.errors import ConfigError, nearest

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)  # of an architecture; every family that has one of them means the same by it

LOCK = "lock"  # the file in a run's folder that the job at work holds
RESERVED = (
    "tokenizer",
    "architecture",
    "first-weights",
    "preempted",
    "save-now",
    LOCK,
)  # what else a run's folder may hold

LONG_NAME = 200  # characters of a name: disks take 255 bytes of one, and endings come after it


def broken_rules(run: RunConfig) -> list[tuple[KeyPath, str]]:
    """(path of the key to change, message) for every rule between fields that the run breaks."""
    return [
        *_finite(run.model_dump(by_alias=True), ()),
        *_top(run),
        *_architecture(run),
        *_reporting(run),
        *_parallel(run),
        *(broken for i in range(len(run.stages)) for broken in _stage(run, i)),
        *_components(run),
    ] or list(without_effect(run))


def broken_here(run: RunConfig) -> list[tuple[KeyPath, str]]:
    """The same for what the run needs on the disk of this machine: data, checkpoints, a folder of its own."""
    return [
        *_run_folder(run),
        *_pretrained(run),
        *_from_run(run),
        *_trackers(run),
        *_flash(run),
        *(broken for i in range(len(run.stages)) for broken in _cleaning_here(run.stages[i], ("stages", i, "clean"))),
        *(broken for i in range(len(run.stages)) for broken in _sources(run.stages[i], ("stages", i))),
    ]


def _components(run: RunConfig) -> Broken:
    for i, stage in enumerate(run.stages):
        for at, component in sections(stage, ("stages", i)):
            if isinstance(component, Component):
                yield from (((*at, *key), told) for key, told in component.check(run, stage))


def _finite(value: Any, at: KeyPath) -> Broken:
    if isinstance(value, float) and not math.isfinite(value):
        yield at, f"must be a finite number, got {literal(value)}."
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield at, f"is too large a number; the largest is {2**63 - 1}."
    elif isinstance(value, dict):
        for key, below in value.items():
            yield from _finite(below, (*at, key))
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from _finite(below, (*at, i))


def _top(run: RunConfig) -> Broken:
    model, tokenizer = run.model, run.tokenizer
    given = [key for key, value in model if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        yield ("model",), f"give one of from_config, from_pretrained and from_run; found {found}."
    if model.from_config is not None and not isinstance(model.from_config.get("model_type"), str):
        yield (
            ("model", "from_config"),
            "needs model_type, the architecture's name in transformers, like `llama`.",
        )
    if tokenizer is not None and model.from_run is not None:
        yield ("tokenizer",), "model.from_run brings that run's tokenizer; remove this key."
    if tokenizer is None and model.from_config is not None:
        yield (
            ("tokenizer",),
            "is required with model.from_config: {train: {vocab_size: ...}} or {from_pretrained: ...}.",
        )
    if tokenizer is not None and (tokenizer.train is None) == (tokenizer.from_pretrained is None):
        yield ("tokenizer",), "give either train or from_pretrained."
    for at, name in ((("name",), run.name), *((("stages", i, "name"), s.name) for i, s in enumerate(run.stages))):
        if len(name) > LONG_NAME:
            yield at, f"{len(name)} characters are too long for the name of a folder; at most {LONG_NAME}."
    if run.name == "stores":
        yield ("name",), "`stores` is the folder of the token stores; choose another name."
    if run.precision == "fp16" and run.parallel.device == "cpu":
        yield ("precision",), "fp16 needs a GPU; use bf16 or fp32 with parallel.device: cpu."
    if run.attention in ("flash", "flex") and run.parallel.device == "cpu":
        yield ("attention",), f"{run.attention} needs a GPU; use sdpa with parallel.device: cpu."
    if run.attention == "flash" and run.precision == "fp32":
        yield ("attention",), "flash has no fp32; use precision: bf16, or attention: sdpa."


def _architecture(run: RunConfig) -> Broken:
    values, at = run.model.from_config or {}, ("model", "from_config")
    wrong = [
        key
        for key in SIZES
        if values.get(key) is not None and (type(values[key]) is not int or values[key] < 1)  # bool is an int
    ]
    for key in wrong:
        yield (*at, key), f"must be a whole number of at least 1, got {literal(values[key])}."
    if wrong:
        return
    entries, train = values.get("vocab_size"), run.tokenizer.train if run.tokenizer else None
    if entries and train and train.vocab_size > entries:
        yield (
            ("tokenizer", "train", "vocab_size"),
            f"{train.vocab_size} is more than the model's vocab_size ({entries}).",
        )
    heads, groups, width = (values.get(key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and groups and heads % groups:
        yield (*at, "num_key_value_heads"), f"num_attention_heads ({heads}) is no multiple of {groups}."
    if heads and width and width % heads and not values.get("head_dim"):
        yield (*at, "num_attention_heads"), f"hidden_size ({width}) is no multiple of {heads}; change one of them."


def _trackers(run: RunConfig) -> Broken:
    for i, name in enumerate(run.trackers):
        if wrong := wrong_with_tracker(name):
            yield ("trackers", i), wrong


def _flash(run: RunConfig) -> Broken:
    if run.attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        yield ("attention",), "flash needs the package flash-attn, which is not installed; install it, or use sdpa."


def _reporting(run: RunConfig) -> Broken:
    if run.profile is not None:
        first, last = run.profile.steps
        if first < 1 or last < first:
            yield ("profile", "steps"), f"[first, last] count from 1 and do not decrease, got [{first}, {last}]."
    if run.time_limit_seconds == 0:
        yield ("time_limit",), f"{run.time_limit} is no time at all; give one, like 11h30m, or remove it."
    for i, tracker in enumerate(run.trackers):
        if tracker in run.trackers[:i]:
            yield ("trackers", i), f"{tracker} is there twice; remove one."


def _parallel(run: RunConfig) -> Broken:
    processes = run.parallel.processes
    if processes != "auto" and processes < 1:
        yield ("parallel", "processes"), f"must be at least 1 or `auto`, got {processes}."
    for at, parallel in [((), run.parallel), *((("stages", i), run.parallel_of(s)) for i, s in enumerate(run.stages))]:
        if parallel.replicate > 1 and parallel.engine != "fsdp":
            yield (*at, "parallel", "replicate"), f"needs engine: fsdp; {parallel.engine} has no replicas of shards."
        if parallel.compile and parallel.engine == "zero3":
            yield (*at, "parallel", "compile"), "zero3 gathers parameters within each layer; use fsdp, zero1 or zero2."
        if isinstance(processes, int) and processes % parallel.replicate:
            yield (
                (*at, "parallel", "replicate"),
                f"parallel.processes ({processes}) is no multiple of {parallel.replicate}.",
            )


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


def _stage(run: RunConfig, i: int) -> Broken:
    stage, at = run.stages[i], ("stages", i)
    earlier = [other.name for other in run.stages[:i]]
    if stage.name in RESERVED:
        yield (*at, "name"), f"`{stage.name}` is the name of something else in a run's folder; choose another."
    if stage.name in earlier:
        yield (*at, "name"), f"there are two stages named {literal(stage.name)}."
    if stage.from_stage is not None and stage.from_stage not in earlier:
        names = ", ".join(earlier) or "none"
        yield (*at, "from"), f"{literal(stage.from_stage)} is no earlier stage (earlier: {names})."
    if stage.prompts and not stage.task.generates:
        yield (*at, "prompts"), f"a model of the task {stage.task.name} answers none; remove them."
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
    yield from _weights(stage.data, (*at, "data"))
    yield from _epochs(stage, at)
    yield from _splits(stage, at)
    yield from _evaluation(stage, at)
    yield from _cleaning(stage, (*at, "clean"))


def _epochs(stage: StageConfig, at: KeyPath) -> Broken:
    weighted = any(source.weight is not None for source in stage.data)
    if stage.epochs_of is None:
        if stage.epochs is not None and weighted:
            told = "weighted sources have no common epoch; name one of them as `epochs_of`, or use steps or tokens."
            yield (*at, "epochs"), told
        return
    names = [source.source for source in stage.data]
    if stage.epochs is None:
        yield (*at, "epochs_of"), "says what `epochs` counts; give epochs, or remove it."
    elif not weighted:
        yield (*at, "epochs_of"), "without weights an epoch is one of all sources; give them weights, or remove it."
    elif names.count(stage.epochs_of) != 1:
        several = f"{names.count(stage.epochs_of)} sources have this name; the one that is meant needs its own."
        none = f"no source of the stage is {stage.epochs_of}; {nearest(stage.epochs_of, names)}"
        yield (*at, "epochs_of"), several if stage.epochs_of in names else none


def _cleaning(stage: StageConfig, at: KeyPath) -> Broken:
    clean = stage.clean
    if clean is None:
        return
    if all(value in (None, False, []) for name, value in clean if name != "phone_region"):
        yield at, "does nothing; turn a step on, like `exact_duplicates: true`, or remove it."
    if len(set(clean.redact)) < len(clean.redact):
        yield (*at, "redact"), "names a kind twice; remove one."
    if clean.phone_region is not None and "phone" not in clean.redact:
        yield (*at, "phone_region"), "is for `redact: [phone]`; add phone there, or remove it."
    least, most = clean.min_characters, clean.max_characters
    if least is not None and most is not None and least > most:
        yield (*at, "min_characters"), f"{least} is more than max_characters ({most})."
    if clean.boilerplate is not None and stage.task.layout != "windows":
        told = "what many conversations share is said by somebody: it is not cut from them; remove it."
        yield (*at, "boilerplate"), told
    if clean.leakage is not None and stage.evaluate is None:
        yield (*at, "leakage"), "needs held-out documents; add `evaluate:`, or remove it."


def _cleaning_here(stage: StageConfig, at: KeyPath) -> Broken:
    clean = stage.clean
    if clean is not None and clean.near_duplicates is not None and importlib.util.find_spec("datasketch") is None:
        yield (*at, "near_duplicates"), "datasketch is not installed; `pip install 'bigtrain[clean]'`."
    if clean is not None and clean.phone_region is not None:
        from phonenumbers import SUPPORTED_REGIONS

        if clean.phone_region not in SUPPORTED_REGIONS:
            yield (
                (*at, "phone_region"),
                f"{clean.phone_region} is no country with phone numbers; write its ISO 3166 code, like US.",
            )


def _evaluation(stage: StageConfig, at: KeyPath) -> Broken:
    if stage.evaluate is None:
        if stage.held_out:
            yield (*at, "held_out"), "documents are held out but never evaluated; add `evaluate:`."
    elif stage.evaluate.data is None and not stage.held_out:
        yield (*at, "evaluate"), "needs documents: set held_out (like 0.05) on the stage, or evaluate.data."
    elif stage.evaluate.data is not None and stage.held_out:
        yield (*at, "held_out"), "give either held_out or evaluate.data."
    elif stage.evaluate.data is not None and any(source.weight is not None for source in stage.evaluate.data):
        yield (*at, "evaluate", "data"), "held-out sources are evaluated whole; leave weight out."


def _weights(sources: list[SourceConfig], at: KeyPath) -> Broken:
    weighted = sum(source.weight is not None for source in sources)
    if 0 < weighted < len(sources):
        yield at, "give a weight to every source or to none."


def is_occupied(folder: Path) -> bool:
    """Whether there is something in a folder, and no run; a job that is about to begin one holds its LOCK already."""
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    there = {name for name in there if name != LOCK and not name.endswith(".partial")}
    return bool(there) and "config.yaml" not in there


def _run_folder(run: RunConfig) -> Broken:
    output, folder = Path(run.output), Path(run.output) / run.name
    try:
        if output.exists() and not output.is_dir():
            yield ("output",), f"{output} is a file; name a folder."
        elif folder.exists() and not folder.is_dir():
            yield ("name",), f"{folder} is a file; choose another `name` or `output`."
        elif is_occupied(folder):
            yield ("name",), f"{folder} is not empty and holds no run; choose another `name` or `output`."
        else:
            with suppress(FileNotFoundError):
                folder.stat()
    except OSError as error:
        yield ("output",), f"{folder} cannot be used as a folder: {error.strerror}; choose another."


def _pretrained(run: RunConfig) -> Broken:
    model = run.model.from_pretrained
    at: KeyPath = ("model", "from_pretrained")
    if model is not None and _looks_like_path(model):
        missing = _missing_folder(model, "config.json")
        if missing:
            yield at, missing
        elif Path(model).is_dir():
            yield from _positions(run, model, at)
    tokenizer = run.tokenizer.from_pretrained if run.tokenizer else None
    if tokenizer is not None and _looks_like_path(tokenizer):
        missing = _missing_folder(tokenizer, "tokenizer*")
        if missing:
            yield ("tokenizer", "from_pretrained"), missing


def _from_run(run: RunConfig) -> Broken:
    """A run that has begun has what it took from the other one, which may be gone."""
    own, at = Path(run.output) / run.name, ("model", "from_run")
    if run.model.from_run is None or (own / "architecture" / "manifest.json").is_file():
        return
    origin = Origin.of(run.model.from_run)
    if origin.folder.resolve() == own.resolve():
        yield at, "is this run itself; a stage starts from an earlier one by its key `from`."
    elif (problem := origin.problem()) is not None:
        yield at, problem
    else:
        yield from _positions(run, str(origin.architecture), at)


def _looks_like_path(name: str) -> bool:
    """Whether a `from_pretrained` is meant as a path; else it is a Hub id, `name` or `owner/name`."""
    return name.startswith(("/", ".")) or name.count("/") > 1 or name.endswith(".gguf") or Path(name).exists()


def _missing_folder(name: str, needed: str) -> str | None:
    """What is wrong with a folder that must hold a file `needed` (a glob), or with a .gguf file."""
    path = Path(name)
    if path.is_dir():
        return None if any(path.glob(needed)) else f"the folder {name} holds no {needed.replace('*', '.json')}."
    if path.is_file():
        return None if name.endswith(".gguf") else f"{name} is a file; give its folder, or a .gguf file."
    return f"there is no folder {name} (looked in {Path.cwd()})."


def _positions(run: RunConfig, model: str, at: KeyPath) -> Broken:
    """Of a model on disk, which the key `at` names; its config.json is enough to know them."""
    file = Path(model) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield at, f"{file} cannot be read: {error}."
        return
    positions = config.get("max_position_embeddings") if isinstance(config, dict) else None
    for i, stage in enumerate(run.stages):
        if isinstance(positions, int) and stage.sequence_length > positions:
            yield (
                ("stages", i, "sequence_length"),
                f"{stage.sequence_length} is longer than max_position_embeddings ({positions}) of {model}.",
            )


def _all_sources(stage: StageConfig, at: KeyPath) -> Iterator[tuple[KeyPath, SourceConfig]]:
    held_out = stage.evaluate.data if stage.evaluate else None
    for key, sources in (("data",), stage.data), (("evaluate", "data"), held_out or []):
        yield from (((*at, *key, i), source) for i, source in enumerate(sources))


def _splits(stage: StageConfig, at: KeyPath) -> Broken:
    for place, source in _all_sources(stage, at):
        try:
            parse_split(source.split)
        except ValueError as error:
            yield (*place, "split"), str(error)


def _sources(stage: StageConfig, at: KeyPath) -> Broken:
    for place, source in _all_sources(stage, at):
        if (wrong := wrong_with(source)) is not None:
            yield (*place, "source"), wrong
        elif source.field is not None and kind_of(source) not in ("files", "url"):
            yield (*place, "field"), f"is for files of JSON, and {source.source} is none; remove it."
        elif kind_of(source) != "hub":
            given = [name for name in ("config", "revision") if getattr(source, name) is not None]
            yield from (((*place, name), _for_the_hub(name, source)) for name in given)
            split = parse_split(source.split)[0]
            if kind_of(source) != "saved" and split not in (None, "train"):
                yield (*place, "split"), f"{source.source} is one split, `train`; there is no {split}."


def _for_the_hub(key: str, source: SourceConfig) -> str:
    is_id = HUB_ID.fullmatch(source.source) is not None
    reason = "exists on this disk and is read from it" if is_id else "is none"
    return f"is for datasets of the Hub, and {source.source} {reason}; remove {key}."
