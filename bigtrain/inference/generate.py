"""Let a model continue a text or answer a message, with transformers' own generate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from bigtrain.errors import ConfigError
from bigtrain.inference.load import LoadedModel


def generate(
    opened: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool | None = None,
    show: Callable[[str], None] | None = None,
) -> str:
    """What the model says after `prompt`, without the prompt; the same for the same arguments.

    max_new_tokens: at most; fewer where the model's positions end. temperature: 0 always takes the likeliest token.
    top_p: draw from the smallest set of tokens with at least this probability.
    chat: give the prompt as a user's message of the tokenizer's chat template; None: if the model comes from an
    `sft` stage and there is a template. show: is given the answer in pieces as they come.

    Raises ConfigError for arguments out of range, a prompt that fills all positions, and `chat` without a template.
    """
    _check(max_new_tokens, temperature, top_p)
    if not opened.model.can_generate():
        raise ConfigError(f"{opened.what} is no model that generates text; `bigtrain eval` measures it.")
    ids = encode_prompt(opened, prompt, chat)
    room = _room(opened, len(ids))
    config = copy.deepcopy(opened.model.generation_config)
    config.max_length = None
    config.max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room)
    config.do_sample = temperature > 0
    # transformers' default of the 50 likeliest tokens, or a pretrained model's own, would cut the draw as well
    config.top_k = 0 if temperature > 0 else None
    config.temperature, config.top_p = (temperature, top_p) if temperature > 0 else (None, None)

    inputs = torch.tensor([ids], device=opened.device)
    devices = [opened.device] if opened.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        output = opened.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            streamer=_streamer(opened.tokenizer, show) if show is not None else None,
        )
    return _text(opened.tokenizer, output[0, len(ids) :].tolist())


def encode_prompt(opened: LoadedModel, prompt: str, chat: bool | None = None) -> list[int]:
    """The ids that the model is given. Without a chat template: as its training data begin, or, for a pretrained
    model, as its tokenizer encodes a text."""
    tokenizer = opened.tokenizer
    if chat is None:
        chat = opened.trained is not None and opened.trained.task.chats and tokenizer.chat_template is not None
    if chat:
        if tokenizer.chat_template is None:
            raise ConfigError(f"chat: the tokenizer of {opened.what} has no chat template.")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif opened.trained is None:
        ids = _begun(tokenizer, prompt)
    else:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = [*begin, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise ConfigError("prompt: it is empty, and the tokenizer has no token to begin with.")
    return ids


def _begun(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a text with what the tokenizer puts before it; what it would put behind, the model is to write."""
    marked = tokenizer(prompt, return_special_tokens_mask=True)
    ids: list[int] = marked["input_ids"]
    behind = len(ids) - len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    while behind and marked["special_tokens_mask"][len(ids) - 1]:
        ids, behind = ids[:-1], behind - 1
    return ids


def positions(model: Any) -> int | None:
    """How many tokens the model can look at; None for one without a limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _room(opened: LoadedModel, length: int) -> int | None:
    limit = positions(opened.model)
    if limit is None:
        return None
    if length >= limit:
        raise ConfigError(
            f"prompt: it has {length} tokens, and {opened.what} has {limit} positions for prompt and answer together; "
            "shorten the prompt."
        )
    return limit - length


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: {max_new_tokens} is less than 1.")
    if temperature < 0:
        raise ConfigError(f"temperature: {temperature} is below 0; 0 always takes the likeliest token.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: {top_p} is not in (0, 1].")


def _text(tokenizer: Any, ids: list[int]) -> str:
    """Of an answer, without the bytes of a character that is not complete."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def _streamer(tokenizer: Any, show: Callable[[str], None]) -> Any:
    from transformers.generation.streamers import BaseStreamer

    class Shown(BaseStreamer):
        """Shows what each token adds, once its characters are complete."""

        def __init__(self) -> None:
            self._ids: list[int] | None = None  # until the prompt has come
            self._shown = ""

        def put(self, value: Any) -> None:
            if self._ids is None:
                self._ids = []
                return
            self._ids += value.flatten().tolist()
            text = _text(tokenizer, self._ids)
            if len(text) > len(self._shown) and text.startswith(self._shown):
                show(text[len(self._shown) :])
                self._shown = text

        def end(self) -> None: ...

    return Shown()
