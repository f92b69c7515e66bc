"""How a run's model is to be generated from: the base model's settings, the tokenizer's special tokens, and every token
that was trained to end a text or a turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.config import RunConfig
from bigtrain.config.origin import Origin
from bigtrain.config.schema import ModelConfig, StageConfig
from bigtrain.data.chat import ChatTemplate
from bigtrain.errors import ConfigError
from bigtrain.pretrained import arguments, opening, silenced
from bigtrain.run_folder import RunFolder
from bigtrain.tasks import taught_to_chat

GENERATION_FILE = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def set_generation(run: RunConfig, stage: StageConfig, model: Any, tokenizer: Any) -> list[str]:
    """Give `model` the generation config that its export has; returns what of the base model's had to be changed so
    that transformers saves it, a sentence each."""
    name = str(RunFolder(run.folder).architecture) if run.model.from_run is not None else run.model.from_pretrained
    config, changes = _of_base(name, model.generation_config)
    config._from_model_config = False  # what is set here is to last, whatever the model's configuration says
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [tokenizer.eos_token_id, *ends, *_ends_of_turns(run, stage, tokenizer)]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    config.bos_token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
    config.pad_token_id = pad if pad is not None and pad >= 0 else next(iter(ends), None)  # -1 is that of old Llamas
    changes += _mend(config)
    model.generation_config = config
    return changes


def left_out(model: ModelConfig, stages: Sequence[StageConfig]) -> list[str]:
    """What the exports of a run that begins will not have of its base model's settings: one sentence, or none."""
    from transformers import GenerationConfig

    name = str(Origin.of(model.from_run).architecture) if model.from_run is not None else model.from_pretrained
    if name is None or not any(stage.export for stage in stages):
        return []
    config, changes = _of_base(name, GenerationConfig())
    for token in TOKENS:
        setattr(config, token, None)  # those of the tokenizer take their place
    changes += _mend(config)
    return [f"the export changes the settings of {model.from_run or name}: {' '.join(changes)}"] if changes else []


def _ends_of_turns(run: RunConfig, stage: StageConfig, tokenizer: Any) -> list[int]:
    """What was learned to end an answer, where the chat template wrote it."""
    before = (RunFolder(run.folder).metadata().get("origin") or {}).get("tasks", [])
    taught = taught_to_chat((*before, *(passed.task.name for passed in run.lineage(stage))))
    if not taught or tokenizer.chat_template is None:
        return []
    return [tokenizer.convert_tokens_to_ids(ChatTemplate(tokenizer).end)]


def _of_base(source: str | None, default: Any) -> tuple[Any, list[str]]:
    """The generation config of a pretrained model, or `default` where there is none that can be read."""
    from transformers import GenerationConfig

    if source is None or source.endswith(".gguf"):
        return default, []
    name, _ = arguments(source)
    unread: list[str] = []
    old: dict[str, Any] = {"_from_model_config": True}  # such settings once stood in config.json
    for file, options in ((GENERATION_FILE, {}), ("config.json", old)):
        try:
            with opening(source, file), silenced():
                return GenerationConfig.from_pretrained(name, config_file_name=file, **options), unread
        except ConfigError as error:
            is_there = (Path(name) / file).is_file()
            if is_there or not isinstance(error.__cause__, OSError):  # which says that there is none
                unread.append(f"the base model's {error}")
    return default, unread


def _mend(config: Any) -> list[str]:
    """Take from a generation config what transformers refuses to save, until it saves it."""
    from transformers import GenerationConfig

    default, changes = GenerationConfig(), []
    changed = [name for name, value in config.to_diff_dict().items() if name not in TOKENS and name[0] != "_"]
    for _ in range(len(changed) + 1):
        try:
            config.validate(strict=True)
            break
        except ValueError as error:
            text = str(error)
            listed = re.findall(r"^- `(\w+)`", text, re.MULTILINE) or re.findall(r"`(\w+)`", text)
            wrong = [name for name in changed if name in listed] or changed
        for name in wrong:
            changes.append(
                f"{name} ({getattr(config, name)}) is left out, as transformers does not save it beside the rest."
            )
            setattr(config, name, getattr(default, name, None))
            changed.remove(name)
    return changes
