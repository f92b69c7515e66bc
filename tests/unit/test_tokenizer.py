"""The tokenizer that is trained here, and how documents become ids."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data import stdlib
from bigtrain.data.tokenizer import encode_texts, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from bigtrain.errors import ConfigError, DataError
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.tasks.sft import Sft


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
    [[(ids, *_)]] = Pretrain().encode([{"text": "a<|end|>b<|begin|>"}], tokenizer)
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
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_pretrain_encoding(tokenizer) -> None:
    rows = [{"text": "def f():\n    pass\n"}, {"text": ""}]
    [(ids, trained, *_)], empty = Pretrain().encode(rows, tokenizer)
    assert ids[0] == 0 and ids[-1] == 1
    assert tokenizer.decode(ids[1:-1]) == rows[0]["text"]
    assert trained is None
    assert empty == []


CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


def parts(tokenizer, document):
    """(what is only read, what is learned) as text, run after run."""
    ids, trained, *_ = document
    runs = itertools.groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [(learned, tokenizer.decode([i for i, _ in run])) for learned, run in runs]


def test_sft_learns_the_completion_and_its_end(tokenizer) -> None:
    rows = [{"prompt": "def f():\n  ", "completion": "  return 1\n"}, {"prompt": "x", "completion": ""}]
    [document], empty = Sft().encode(rows, tokenizer)
    assert parts(tokenizer, document) == [
        (False, "<|begin|><|user|>def f():\n  <|assistant|>"),
        (True, "  return 1\n<|end|>"),
    ]
    assert empty == []


@pytest.mark.parametrize("template", [None, CHATML])
def test_sft_learns_every_answer_of_a_conversation(tokenizer, template) -> None:
    messages = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "One é."},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "Two."},
    ]
    original, tokenizer.chat_template = tokenizer.chat_template, template or tokenizer.chat_template
    try:
        [[document]] = Sft().encode([{"messages": messages}], tokenizer)
        assert tokenizer.decode(document[0]) == tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    finally:
        tokenizer.chat_template = original
    learned = [text for is_learned, text in parts(tokenizer, document) if is_learned]
    assert learned == ["One é.<|end|>", "Two.<|end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "learn to stop"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}", "differently"),
    ],
)
def test_sft_refuses_templates_that_it_cannot_mark(folder: Path, template, message) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        [answer] = Sft().encode([{"where": "a.jsonl:7", "prompt": "a", "completion": "b"}], tokenizer)
        raise answer


def test_sft_without_a_template_joins_prompt_and_completion(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    [[document]] = Sft().encode([{"prompt": "def f():\n", "completion": "  return 1"}], tokenizer)
    assert parts(tokenizer, document) == [(False, "<|begin|>def f():\n"), (True, "  return 1<|end|>")]
    with pytest.raises(DataError, match="chat template"):
        Sft().encode([{"messages": []}], tokenizer)


def test_sft_needs_an_end_token(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template, tokenizer.eos_token = None, None
    with pytest.raises(DataError, match="eos_token"):
        Sft().encode([{"prompt": "a", "completion": "b"}], tokenizer)
    [[(ids, *_)]] = Pretrain().encode([{"text": "a"}], tokenizer)
    assert ids == [0, *encode_texts(tokenizer, ["a"])[0]]


def test_added_tokens_are_special_and_change_the_fingerprint(folder: Path) -> None:
    plain, added = load_tokenizer(folder), load_tokenizer(folder, ["<|tool|>"])
    assert len(added) == len(plain) + 1
    assert added.convert_tokens_to_ids(["<|user|>", "<|tool|>"]) == [3, len(plain)]
    assert tokenizer_fingerprint(added) != tokenizer_fingerprint(plain)
