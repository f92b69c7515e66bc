"""The tokenizer that is trained here, and how documents become ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data import stdlib
from bigtrain.data.tokenizer import encode_texts, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from bigtrain.errors import DataError
from bigtrain.tasks import TASKS


def texts():
    return (row["text"] for row in stdlib.modules())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(), 1000, 200_000, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return load_tokenizer(folder)


def test_special_tokens(tokenizer) -> None:
    assert len(tokenizer) == 1000
    names = ["<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer("<|user|>hi<|end|>", add_special_tokens=False)["input_ids"][::3][0] == 3
    assert tokenizer.decode(tokenizer("hi")["input_ids"], skip_special_tokens=True) == "hi"


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer, text: str) -> None:
    ids = encode_texts(tokenizer, [text])[0]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", [" a  b ", "\r\n\t\x00\x0c", "é e\u0301 ﬁ", "🎉👩‍👩‍👧", "a , b . c ' s", "<|end|><|pad|>"]
)
def test_awkward_texts_survive_the_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(encode_texts(tokenizer, [text])[0]) == text


def test_a_document_cannot_forge_special_tokens(tokenizer) -> None:
    [(ids, _)] = TASKS["pretrain"]().encode([{"text": "a<|end|>b<|begin|>"}], tokenizer)
    assert [i for i in ids if i < 5] == [0, 1]
    assert tokenizer("<|end|>", add_special_tokens=False)["input_ids"] == [1]  # a chat template still can


def test_it_compresses_what_it_was_trained_on(tokenizer) -> None:
    text = next(iter(texts()))
    assert len(text) / len(encode_texts(tokenizer, [text])[0]) > 2


def test_training_is_reproducible_and_fingerprinted(folder: Path, tokenizer, tmp_path: Path) -> None:
    train_tokenizer(texts(), 1000, 200_000, tmp_path / "same")
    train_tokenizer(texts(), 1000, 150_000, tmp_path / "other")
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "same")) == fingerprint
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "other")) != fingerprint
    changed = load_tokenizer(folder)
    changed.eos_token = "<|user|>"
    assert tokenizer_fingerprint(changed) != fingerprint


def test_encoding_is_not_truncated_by_an_earlier_call(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer(["a b c d", "a"], padding=True, truncation=True, max_length=2)
    long, short = encode_texts(tokenizer, ["a b c d e f", "a"])
    assert tokenizer.decode(long) == "a b c d e f"
    assert len(short) == 1


def test_only_the_sample_is_read(tmp_path: Path) -> None:
    def endless():
        for number in range(100):
            yield f"text {number} " * 10
        raise AssertionError("read on after the sample was full")

    train_tokenizer(endless(), 300, 1000, tmp_path)
    assert 261 < len(load_tokenizer(tmp_path)) <= 300


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_pretrain_encoding(tokenizer) -> None:
    rows = [{"text": "def f():\n    pass\n"}, {"text": ""}]
    (ids, trained), empty = TASKS["pretrain"]().encode(rows, tokenizer)
    assert ids[0] == 0 and ids[-1] == 1
    assert tokenizer.decode(ids[1:-1]) == rows[0]["text"]
    assert trained is None
    assert empty == ([], None)


def test_sft_encoding_trains_the_completion_alone(tokenizer) -> None:
    rows = [{"prompt": "def f():\n  ", "completion": "  return 1\n"}, {"prompt": "x", "completion": ""}]
    (ids, trained), (empty, _) = TASKS["sft"]().encode(rows, tokenizer)
    border = trained.index(True)
    assert trained == [False] * border + [True] * (len(ids) - border)
    assert ids[0] == 0 and ids[-1] == 1
    assert tokenizer.decode(ids[1:border]) == rows[0]["prompt"]
    assert tokenizer.decode(ids[border:-1]) == rows[0]["completion"]
    assert empty == []


def test_sft_needs_an_end_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        TASKS["sft"]().encode([{"prompt": "a", "completion": "b"}], tokenizer)
    [(ids, _)] = TASKS["pretrain"]().encode([{"text": "a"}], tokenizer)
    assert ids == [0, *encode_texts(tokenizer, ["a"])[0]]
