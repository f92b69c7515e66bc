"""Supervised finetuning: the completion is learned, the prompt is only read."""

from __future__ import annotations

from typing import Any

from bigtrain.data.sources import COLUMNS
from bigtrain.data.tokenizer import encode_texts
from bigtrain.data.writing import Document
from bigtrain.errors import DataError
from bigtrain.tasks.causal_lm import CausalLM


class Sft(CausalLM):
    """Documents of columns `prompt` and `completion`, packed whole into bins."""

    layout = "bins"
    encoding = "sft-1"
    columns = COLUMNS["sft"]

    def encode(self, rows: list[dict[str, str]], tokenizer: Any) -> list[Document]:
        """bos (where the tokenizer has one) + prompt, then completion + eos, which are trained. The two are
        tokenized apart: no token spans the border. A row without a completion becomes an empty document.

        Raises DataError if the tokenizer has no end token: the model would never learn to stop.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end token (eos_token), so a completion could not be ended.")
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        prompts = encode_texts(tokenizer, [row["prompt"] for row in rows])
        completions = encode_texts(tokenizer, [row["completion"] for row in rows])
        encoded: list[Document] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            read = [*begin, *prompt]
            learned = [*completion, tokenizer.eos_token_id] if completion else []
            trained = [False] * len(read) + [True] * len(learned)
            encoded.append(([*read, *learned], trained) if learned else ([], []))
        return encoded
