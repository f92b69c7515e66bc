"""A preview spells each token; characters that several make up are whole, and bytes that make up none are spelt."""

# ruff: noqa: RUF001 - Chinese punctuation

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bigtrain.data.tokenizer import load_tokenizer, train_tokenizer
from bigtrain.preview.spelling import spell, spell_together

TEXTS = [
    "书很好，字迹清晰，孩子很喜欢！👍🏽 vg",
    "Straße, naïve, 日本語テキスト, ภาษาไทย",
    "already broken \ufffd here \ufffd\ufffd, 好\ufffd",
    "plain <0xE4> text",
    " ",
    "",
]


def byte_level(tmp_path: Any) -> Any:
    train_tokenizer(iter(["the cat sat on the mat. " * 50]), 300, 10_000, tmp_path)
    return load_tokenizer(str(tmp_path), ())


def byte_fallback(_: Any) -> Any:
    """As SentencePiece makes them: words begin with a mark, unknown characters are bytes."""
    pieces = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz,. <>0Ex4S",
        "好",
        "\ufffd",
    ]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_tokens_spell_the_text_and_no_character_is_torn(tmp_path: Any, make: Any) -> None:
    tokenizer = make(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = spell(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == text
        for cut in range(len(ids) + 1):  # as where trained tokens begin
            halves = [(ids[:cut], texts[:cut]), (ids[cut:], texts[cut:])]
            together = "".join(spell_together(tokenizer, *half) for half in halves)
            assert together.replace("\ufffd", "").replace(" ", "") == text.replace("\ufffd", "").replace(" ", "")
            assert together.count("\ufffd") == text.count("\ufffd")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_a_character_that_is_not_all_there_are_spelt(tmp_path: Any, make: Any) -> None:
    tokenizer = make(tmp_path)
    ids = tokenizer("a很b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    for begin, end, expected in ((2, 5, "<0xBE><0x88>b"), (0, 3, "a<0xE5><0xBE>"), (2, 3, "<0xBE>"), (0, 5, "a很b")):
        texts = spell(tokenizer, ids[begin:end])
        assert "".join(texts) == expected
        assert spell_together(tokenizer, ids[begin:end], texts) == expected
    assert spell(tokenizer, ids) == ["a", "", "", "很", "b"]


def test_special_tokens_are_spelt(tmp_path: Any) -> None:
    tokenizer = byte_level(tmp_path)
    ids = [*tokenizer("a很", add_special_tokens=False)["input_ids"][:2], tokenizer.eos_token_id]
    assert spell(tokenizer, ids) == ["a", "", f"<0xE5>{tokenizer.eos_token}"]
