"""Write a run's model as a Hugging Face folder: it opens with transformers alone, without bigtrain."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from bigtrain.config.origin import Origin
from bigtrain.config.schema import StageConfig
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.errors import CheckpointError, ConfigError, shorten
from bigtrain.inference.load import METADATA, LoadedModel, load_model
from bigtrain.inference.places import RunPlace, locate
from bigtrain.masking import masked
from bigtrain.models.architecture import empty_model, persistent_buffers
from bigtrain.models.converted import converted_shapes
from bigtrain.models.kinds import KINDS, kind_of
from bigtrain.observability.progress import shown_metrics
from bigtrain.observability.stream import read_metrics
from bigtrain.pretrained import LONGEST_REASON, weight_files
from bigtrain.tensor_files import read_header
from bigtrain.terminal import say

MARK = "Exported by bigtrain"  # in the README.md of every export; a folder without it is never replaced


def export(
    run_dir: str | Path,
    stage: str | None = None,
    to: str | Path | None = None,
    dtype: str | None = None,
    ema: bool = False,
) -> Path:
    """Write the newest checkpoint of a run (or of one stage; `run_dir` may also be a checkpoint); returns the folder.

    to: RUN/STAGE/export by default, export-ema with `ema`, which takes the moving average of the weights; an older
    export there is replaced. dtype: fp32, bf16 or fp16; None: the run's precision. The folder appears whole or not at
    all.

    Raises CheckpointError for a tensor that is missing, empty, or was not written as it is; ConfigError for a place
    that holds something else.
    """
    place = locate(run_dir if stage is None else Path(run_dir) / stage)
    if not isinstance(place, RunPlace):
        raise ConfigError(f"{place} is a Hugging Face model already; an export is made of a run.")
    default = place.folder / place.stage.name / ("export-ema" if ema else "export")
    target = default if to is None else Path(to).expanduser()
    _refuse_other(target)
    opened = load_model(place.checkpoint, dtype=dtype, device="cpu", ema=ema)
    for change in opened.changes:
        say(f"{target}: {change}", error=True)
    return write_folder(opened, target, _card(place, opened))


def write_folder(opened: LoadedModel, target: Path, card: str) -> Path:
    """Save model, tokenizer and `card` (README.md) beside `target`, check what was written, and move it there."""
    _refuse_other(target)
    _refuse_empty(opened.model, target)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which warns where it has to guess
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # left by an export that was killed
    partial.mkdir(parents=True)
    try:
        opened.model.save_pretrained(partial)
        opened.tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if opened.trained is not None:
            (partial / METADATA).write_text(opened.trained.to_json(), encoding="utf-8")
        _check_written(opened.model, partial, target)
        _move(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _refuse_other(target: Path) -> None:
    readme = target / "README.md"
    ours = readme.is_file() and MARK in readme.read_text(encoding="utf-8")
    vacant = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not ours and not vacant:
        raise ConfigError(f"{target} holds something that is no export of bigtrain; give another folder.")


def _move(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.exists():
        shutil.rmtree(old)


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """What has to be written, each tied tensor once."""
    return dict(model.named_parameters()) | dict(persistent_buffers(model))


def _refuse_empty(model: Any, target: Path) -> None:
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise CheckpointError(f"{target} is not written: the model has no values for {shorten(missing)}.")
    empty = [name for name, tensor in _tensors(model).items() if 0 in tensor.shape]
    if empty:
        raise CheckpointError(f"{target} is not written: {shorten(empty)} would be saved with no elements.")


def _check_written(model: Any, folder: Path, target: Path) -> None:
    """Open what was written as transformers does, all but the weights: of these the headers are read.

    Raises CheckpointError for a file that does not open, and for a tensor that is missing, or another one there.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if model.can_generate():
            GenerationConfig.from_pretrained(folder).validate(strict=True)
        load_tokenizer(folder, key="tokenizer")
        files = weight_files(str(folder), "the weights")
        stored = {name: tensor for file in files for name, tensor in read_header(file)}
        options: dict[str, Any] = {"activation_checkpointing": "none", "meta": True, "kind": kind_of(model)}
        empty = empty_model(config, attention="eager", **options)
        shapes = converted_shapes(files, empty)
    except Exception as error:
        reason = " ".join(str(error).replace(f"{folder}", f"{target}").split()) or type(error).__name__
        reason = reason.removesuffix("; fetch it again.")[:LONGEST_REASON]  # it came from nowhere
        raise CheckpointError(
            f"{target} is not written: what was saved there does not open again: {reason}. See that its disk is well, "
            "and export again."
        ) from error
    wanted = _tensors(model)
    wrong = [name for name, tensor in wanted.items() if shapes.get(name) != tuple(tensor.shape)]
    dtypes = {tensor.dtype for tensor in wanted.values()}
    for name, tensor in stored.items():  # which may have other names than the model's
        if tensor.dtype not in ({wanted[name].dtype} if name in wanted else dtypes):
            wrong.append(name)
    if (index := folder / "model.safetensors.index.json").is_file():
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wrong += [name for name, file in where.items() if name not in stored or stored[name].path.name != file]
    if wrong:
        raise CheckpointError(
            f"{target} is not written: {shorten(sorted({*wrong}))} were not saved as the model has them."
        )


def _card(place: RunPlace, opened: LoadedModel) -> str:
    """The model card: what was trained on what, and how well it does."""
    config, kind = opened.model.config, KINDS[place.stage.task.model_kind]
    parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    base = place.run.model.from_pretrained
    if (from_run := place.run.model.from_run) is not None:
        base = f"{Origin.of(from_run).folder.name}, stage {Origin.of(from_run).stage}"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {kind.pipeline}",
        "---",
        "",
        f"# {place.run.name}: {place.stage.name}",
        "",
        f"{MARK} from the run `{place.run.name}`, stage `{place.stage.name}`, step {opened.step}.",
        "",
        f"- model: {config.model_type}, {parameters:,} parameters, {str(config.dtype).removeprefix('torch.')}",
        f"- first weights: {f'`{_public(base)}`' if base else 'random'}",
        f"- precision of the training: {place.run.precision}",
        *(_stage_line(stage) for stage in place.run.lineage(place.stage)),
        *_held_out_line(place),
        "",
        "```python",
        f"from transformers import {kind.auto}, AutoTokenizer",
        "",
        f'model = {kind.auto}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
    ]
    return masked("\n".join(lines))


def _public(source: str) -> str:
    """A source by a name that tells nothing of this machine: of a path or URL what it ends with, all of a Hub id."""
    if not ("://" in source or source.startswith(("/", ".", "~", "$")) or Path(source).exists()):
        return source
    *folders, last = source.partition("?")[0].rstrip("/").split("/")
    return f"{folders[-1]}/{last}" if "*" in last and folders else last


def _stage_line(stage: StageConfig) -> str:
    sources = ", ".join(f"`{_public(source.source)}`" for source in stage.data)
    return (
        f"- stage `{stage.name}`: {stage.task.name} on {sources}, "
        f"{stage.global_batch_size} sequences of {stage.sequence_length} tokens a step"
    )


def _held_out_line(place: RunPlace) -> list[str]:
    if not (place.folder / "metrics.jsonl").is_file():
        return []
    rows = [row for row in read_metrics(place.folder) if row["kind"] == "evaluation"]
    here = [row for row in rows if row["stage"] == place.stage.name and row["step"] <= place.step]
    if not here:
        return []
    last = here[-1]
    return [
        f"- held-out after step {last['step']}: {', '.join(f'{name} {shown}' for name, shown in shown_metrics(last))}"
    ]
