"""Word by word a text becomes the ids that the library makes of it whole."""

import inspect
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from bigtrain.data import stdlib, words
from bigtrain.data.words import GPT2, PATTERNS, PLAIN, Words

TEXTS = [row["text"] for row in stdlib.modules()]
CHARACTERS = [chr(code) for code in range(0x10000) if PLAIN.fullmatch(chr(code))]


def cutting(pattern):
    if pattern == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def make(pattern, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = cutting(pattern)
    tokenizer.normalizer = None if pattern == GPT2 else normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:60], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=sorted(PATTERNS), ids=["gpt2", "llama3", "qwen"])
def backend(request):
    return make(request.param)


def whole(backend, texts):
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@pytest.fixture(scope="module")
def ours(backend):
    return Words.of(backend)


@pytest.mark.parametrize("others", ["aD1 \n\t'-\xa0\xe9\xb2", pytest.param(CHARACTERS, marks=pytest.mark.soak)])
def test_every_character_beside_others(backend, ours, others):
    """Between letters, blanks, digits and at both ends."""
    assert len(CHARACTERS) == 28 + 96 + 96 + 24
    for before, after in (("a", "b"), (" ", " "), ("1", "\n"), ("", "")):
        pairs = itertools.chain(itertools.product(CHARACTERS, others), itertools.product(others, CHARACTERS))
        texts = [f"{before}{one}{two}{after}" for one, two in pairs]
        assert [ours.encode(backend, text) for text in texts] == whole(backend, texts)


def test_real_text(backend, ours):
    found = [ours.encode(backend, text) for text in TEXTS]
    assert [ids for ids in found if ids is not None] == [
        ids for ids, mine in zip(whole(backend, TEXTS), found, strict=True) if mine is not None
    ]
    assert sum(ids is not None for ids in found) > 0.9 * len(TEXTS)


@given(text=st.text(st.sampled_from([*" \t\n\r'sStTdDllVE019_-.(){}\"", *CHARACTERS]), max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_plain_text(backend, ours, text):
    assert [ours.encode(backend, text)] == whole(backend, [text])


def test_what_is_remembered_is_bounded(backend, monkeypatch):
    monkeypatch.setattr(words, "REMEMBERED", 100)
    monkeypatch.setattr(words, "LONGEST", 6)
    ours = Words.of(backend)
    for text, ids in zip(TEXTS[:30], whole(backend, TEXTS[:30]), strict=True):
        assert ours.encode(backend, text) in (ids, None)
        assert all(len(word) <= 6 for word in ours._known)


@pytest.mark.parametrize("text", ["caf\u0065\u0301", "\u4f60\u597d", "a\x1cb", "1\u2003m", "it\u2019\u017f"])
def test_other_characters_are_left_to_the_library(backend, text):
    assert Words.of(backend).encode(backend, text) is None


def test_tokens_that_were_added_are_left_to_the_library(backend):
    backend = Tokenizer.from_str(backend.to_str())
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    assert Words.of(backend).encode(backend, "a <tool> b") is None
    assert [Words.of(backend).encode(backend, "a <tool b")] == whole(backend, ["a <tool b"])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"pre_tokenizer": pre_tokenizers.Metaspace()}, id="sentencepiece"),
        pytest.param({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, id="prefix"),
        pytest.param({"pre_tokenizer": cutting(r"\w+|\W+")}, id="unknown-pattern"),
        pytest.param({"pre_tokenizer": pre_tokenizers.Sequence([])}, id="no-step"),
        pytest.param({"normalizer": normalizers.NFKC()}, id="normalizer"),
    ],
)
def test_other_tokenizers_are_left_to_the_library(backend, change):
    backend = Tokenizer.from_str(backend.to_str())
    for name, value in change.items():
        setattr(backend, name, value)
    assert Words.of(backend) is None


def test_dropout_is_left_to_the_library():
    assert Words.of(make(GPT2, dropout=0.1)) is None


@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer, Qwen2Tokenizer])
def test_tokenizers_of_transformers_are_known(tokenizer):
    assert Words.of(tokenizer().backend_tokenizer) is not None


def test_the_pattern_of_llama_3_is_known():
    assert inspect.signature(TikTokenConverter).parameters["pattern"].default in PATTERNS
