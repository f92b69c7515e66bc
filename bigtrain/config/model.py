"""What is trained: the model, and its tokenizer."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config.core import Broken, Section, mathematics
from bigtrain.config.files import KeyPath, literal
from bigtrain.config.origin import Origin
from bigtrain.config.texts import PathText

if TYPE_CHECKING:
    from bigtrain.config.schema import RunConfig

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


class ModelConfig(Section):
    from_config: dict[str, Any] | None = mathematics(
        "A transformers configuration with its `model_type`, for a causal language model with random weights. "
        "`vocab_size` and special token ids are taken from the tokenizer where absent.",
        None,
    )
    from_pretrained: PathText | None = mathematics(
        "A pretrained causal language model: a folder, a Hub id, or a .gguf file (its weights are made dense).", None
    )
    from_run: PathText | None = mathematics(
        "Another run's stage, RUN_DIR/STAGE, or one checkpoint of it, RUN_DIR/STAGE/checkpoints/step-N: the weights of "
        "its newest checkpoint (fixed when the run begins), its architecture and its tokenizer. That run stays as it "
        "is, and may be at work.",
        None,
    )

    def check(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        given = [key for key, value in self if value is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            yield (), f"give one of from_config, from_pretrained and from_run; found {found}."
        if self.from_config is not None and not isinstance(self.from_config.get("model_type"), str):
            yield ("from_config",), "needs model_type, the architecture's name in transformers, like `llama`."
        yield from _sizes(self.from_config or {})

    def check_here(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        key = "from_run" if self.from_pretrained is None else "from_pretrained"
        if (wrong := self._not_here(run)) is not None:
            yield (key,), wrong
        elif (folder := self.folder_here(run)) is not None:
            try:
                _config_in(folder)
            except (OSError, ValueError) as error:
                yield (key,), f"{folder / 'config.json'} cannot be read: {error}."

    def _not_here(self, run: RunConfig) -> str | None:
        if self.from_pretrained is not None and _looks_like_path(self.from_pretrained):
            return missing_folder(self.from_pretrained, "config.json")
        if self.from_run is None or run.has_begun:
            return None
        origin = Origin.of(self.from_run)
        if origin.folder.resolve() == run.folder.resolve():
            return "is this run itself; a stage starts from an earlier one by its key `from`."
        return origin.problem()

    def folder_here(self, run: RunConfig) -> Path | None:
        """A folder on this disk that the model's config.json is taken from. A run that has begun has what it took from
        another one, which may be gone."""
        if self.from_pretrained is not None:
            folder = Path(self.from_pretrained)
            return folder if folder.is_dir() and _looks_like_path(self.from_pretrained) else None
        return None if self.from_run is None or run.has_begun else Origin.of(self.from_run).architecture

    def positions_here(self, run: RunConfig) -> int | None:
        """max_position_embeddings of a model on this disk; None where nothing tells."""
        folder = self.folder_here(run)
        config = None
        with suppress(OSError, ValueError):  # `check_here` tells
            config = None if folder is None else _config_in(folder)
        positions = config.get("max_position_embeddings") if isinstance(config, dict) else None
        return positions if isinstance(positions, int) else None


class TrainTokenizerConfig(Section):
    vocab_size: int = mathematics("Entries of the vocabulary, special tokens included.", ge=300)
    sample_bytes: int = mathematics(
        "How much text of the first stage's training documents the merges are learned from, in bytes.",
        8_000_000,
        ge=1,
    )

    def check(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        entries = (run.model.from_config or {}).get("vocab_size")
        if type(entries) is int and self.vocab_size > entries > 0:
            yield ("vocab_size",), f"{self.vocab_size} is more than the model's vocab_size ({entries})."


class TokenizerConfig(Section):
    train: TrainTokenizerConfig | None = mathematics("Train a byte-level BPE on the first stage's documents.", None)
    from_pretrained: PathText | None = mathematics("A folder, a Hub id or a .gguf file of a tokenizer.", None)
    add_tokens: list[str] = mathematics(
        "Special tokens to add; a pretrained model's embedding grows by as many rows where it has to.", []
    )

    def check(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        if run.model.from_run is not None:
            yield (), "model.from_run brings that run's tokenizer; remove this key."
        if (self.train is None) == (self.from_pretrained is None):
            yield (), "give either train or from_pretrained."

    def check_here(self, run: RunConfig, stage: None) -> Broken:  # noqa: ARG002
        if self.from_pretrained is not None and _looks_like_path(self.from_pretrained):
            missing = missing_folder(self.from_pretrained, "tokenizer*")
            if missing:
                yield ("from_pretrained",), missing


def _sizes(values: dict[str, Any]) -> Broken:
    """What does not come out in a `from_config`."""
    at: KeyPath = ("from_config",)
    wrong = [
        key
        for key in SIZES
        if values.get(key) is not None and (type(values[key]) is not int or values[key] < 1)  # bool is an int
    ]
    for key in wrong:
        yield (*at, key), f"must be a whole number of at least 1, got {literal(values[key])}."
    if wrong:
        return
    heads, groups, width = (values.get(key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and groups and heads % groups:
        yield (*at, "num_key_value_heads"), f"num_attention_heads ({heads}) is no multiple of {groups}."
    if heads and width and width % heads and not values.get("head_dim"):
        yield (*at, "num_attention_heads"), f"hidden_size ({width}) is no multiple of {heads}; change one of them."


def _looks_like_path(name: str) -> bool:
    """Whether a `from_pretrained` is meant as a path; else it is a Hub id, `name` or `owner/name`."""
    return name.startswith(("/", ".")) or name.count("/") > 1 or name.endswith(".gguf") or Path(name).exists()


def missing_folder(name: str, needed: str) -> str | None:
    """What is wrong with a folder that must hold a file `needed` (a glob), or with a .gguf file."""
    path = Path(name)
    if path.is_dir():
        return None if any(path.glob(needed)) else f"the folder {name} holds no {needed.replace('*', '.json')}."
    if path.is_file():
        return None if name.endswith(".gguf") else f"{name} is a file; give its folder, or a .gguf file."
    return f"there is no folder {name} (looked in {Path.cwd()})."


def _config_in(folder: Path) -> Any:
    """Raises OSError and ValueError."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
