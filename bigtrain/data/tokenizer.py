"""The tokenizer: trained here on the run's own documents, or opened from a folder or the Hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from bigtrain.config.environment import threads
from bigtrain.data.chat import Rendered, Span
from bigtrain.data.marks import MARK
from bigtrain.data.types import Document
from bigtrain.data.words import Words
from bigtrain.errors import ConfigError
from bigtrain.pretrained import arguments, opening

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FEW_THREADS = 2  # of the `tokenizers` library: with so many its batch call is half as fast as word by word

Masked = tuple[list[int], list[bool]]  # ids; which of them are learned

BEGIN, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"

# Of tokenizers that are trained here: whoever is not the assistant is read as the user.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int, sample_bytes: int, folder: Path) -> None:
    """Learn a byte-level BPE from the first `sample_bytes` of the texts, in a form that AutoTokenizer opens.

    Any text comes back from its tokens unchanged. A text encoded with special tokens starts with `<|begin|>`,
    as the documents of a token store do. A small sample may give fewer than `vocab_size` entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, sample_bytes), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B:1",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def load_tokenizer(source: str | Path, add_tokens: Sequence[str] = (), key: str = "tokenizer") -> Any:
    """Open a transformers PreTrainedTokenizerFast and add special tokens to it. key: that names it in the run's file.

    Raises ConfigError if there is none, or none of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    name, options = arguments(str(source))
    with opening(str(source), key):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if not tokenizer.is_fast:
        raise ConfigError(f"{key}: {source} has no fast (tokenizers) version, which bigtrain needs.")
    if add_tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": list(add_tokens)}, replace_extra_special_tokens=False)
    return tokenizer


def num_ids(tokenizer: Any) -> int:
    """How many rows an embedding needs: one more than the largest id. Ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what turns text into ids: tokenizer.json, the ids of the special tokens, the chat template."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for left_by_calls in ("truncation", "padding"):
        content.pop(left_by_calls, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([content, special, tokenizer.chat_template], sort_keys=True).encode()).hexdigest()


def encode_rendered(tokenizer: Any, tokens: frozenset[str], documents: list[Rendered]) -> list[Document]:
    """Ids of what a chat template made, and which of them are learned. No special token is added; those that stand
    there are obeyed, unless between two MARKs, as `tokens` may.

    What comes before an answer is tokenized apart from it, as when a model is asked. Only with tokenizers that begin
    every text with a blank (SentencePiece's) both are tokenized as one, and a token that begins before an answer and
    reaches into it is read: no model could begin its answer with it.
    """
    with _untouched(tokenizer, encode_special_tokens=False) as backend:
        way = _way(tokenizer)
        pieces = [_pieces(document, way) for document in documents]
        texts = [text for parts in pieces for text, learned in parts if isinstance(learned, bool) and MARK not in text]
        ids = iter(_obeying_ids(tokenizer, way, texts))
        mixed = [text for parts in pieces for text, learned in parts if not isinstance(learned, bool)]
        encodings = iter(backend.encode_batch([t for t in mixed if MARK not in t], add_special_tokens=False))
    encoded = []
    for parts in pieces:
        all_ids: list[int] = []
        loss_mask: list[bool] = []
        for text, learned in parts:
            if MARK in text:
                spans = [(0, len(text))] * learned if isinstance(learned, bool) else learned
                new, flags = _encode_disguised(tokenizer, tokens, text, spans)
            elif isinstance(learned, bool):
                new = next(ids)
                flags = [learned] * len(new)
            else:
                new, flags = _masked(next(encodings), learned)
            all_ids += new
            loss_mask += flags
        encoded.append(Document(all_ids, loss_mask))
    return encoded


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text, whole: no special token is added, and one that is spelt out is not obeyed."""
    with _untouched(tokenizer, encode_special_tokens=True) as backend:  # twice as fast as calling the tokenizer itself
        words = _words(tokenizer)
        found = [None if words is None else words.encode(backend, text) for text in texts]
        rest = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        encodings = iter(backend.encode_batch_fast(rest, add_special_tokens=False))
        return [next(encodings).ids if ids is None else ids for ids in found]


_WORDS: WeakKeyDictionary[Any, tuple[int, Words | None]] = WeakKeyDictionary()


def _words(tokenizer: Any) -> Words | None:
    """Those of a tokenizer, until it gets more tokens; None where the library's threads are faster."""
    if (threads("RAYON_NUM_THREADS") or os.cpu_count() or 1) > FEW_THREADS:
        return None
    size, words = _WORDS.get(tokenizer, (None, None))
    if size != len(tokenizer):
        words = Words.of(tokenizer.backend_tokenizer)
        _WORDS[tokenizer] = len(tokenizer), words
    return words


@contextmanager
def _untouched(tokenizer: Any, *, encode_special_tokens: bool) -> Iterator[Tokenizer]:
    """The `tokenizers` object, for a while neither cutting nor padding; afterwards it is as it was."""
    backend = tokenizer.backend_tokenizer
    truncation, padding, flag = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = encode_special_tokens
    try:
        yield backend
    finally:
        backend.encode_special_tokens = flag
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


class _Way(NamedTuple):
    """What can be done with a tokenizer's rendered texts.

    cut: a text may be cut before an answer. behind: special tokens behind which it may be cut. special: matches special
    tokens, in a group, if what stands between them can be encoded apart; ids: theirs.
    """

    cut: bool
    behind: tuple[str, ...]
    special: re.Pattern[str] | None
    ids: dict[str, int]


_WAYS: WeakKeyDictionary[Any, tuple[int, _Way]] = WeakKeyDictionary()


def _way(tokenizer: Any) -> _Way:
    size, way = _WAYS.get(tokenizer, (None, None))
    if way is None or size != len(tokenizer):
        backend = tokenizer.backend_tokenizer
        added = {number: token for number, token in backend.get_added_tokens_decoder().items() if token.special}
        ids = {token.content: number for number, token in added.items()}
        cut = _ids(backend, "\nab") == _ids(backend, "\n") + _ids(backend, "ab")
        after = {text: _ids(backend, text) for text in ("\nab", " ab", "ab")}
        behind = [t for t, i in ids.items() if all(_ids(backend, t + x) == [i, *their] for x, their in after.items())]
        alone = cut and not any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added.values())
        longest_first = sorted(map(re.escape, ids), key=len, reverse=True)
        special = re.compile(f"({'|'.join(longest_first)})") if alone and ids else None
        way = _Way(cut, tuple(behind) if cut else (), special, ids)
        _WAYS[tokenizer] = len(tokenizer), way
    return way


def _obeying_ids(tokenizer: Any, way: _Way, texts: list[str]) -> list[list[int]]:
    """Ids of each text, special tokens obeyed."""
    backend, words = tokenizer.backend_tokenizer, _words(tokenizer)
    if words is None or way.special is None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    found: list[list[int]] = []
    for text in texts:
        ids: list[int] = []
        for number, piece in enumerate(way.special.split(text)):
            if number % 2:
                ids.append(way.ids[piece])
            elif piece:
                known = words.encode(backend, piece)
                ids += _ids(backend, piece) if known is None else known
        found.append(ids)
    return found


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def _pieces(document: Rendered, way: _Way) -> list[tuple[str, bool | list[Span]]]:
    """Its text up to the first answer, then from each answer up to the next, with what is learned of each piece: all,
    nothing, or some characters. An answer and what follows it are two pieces where that makes no difference."""
    if not way.cut:
        return [(document.text, list(document.learned))]
    boundaries = [0, *document.answers, len(document.text)]
    pieces: list[tuple[str, bool | list[Span]]] = [(document.text[: boundaries[1]], False)]
    spans = list(document.learned)
    for begin, end in itertools.pairwise(boundaries[1:]):
        here = [(a - begin, b - begin) for a, b in spans if begin <= a < end]
        text = document.text[begin:end]
        if len(here) == 1 and here[0][0] == 0 and text[: here[0][1]].endswith(way.behind):
            pieces += [(text[: here[0][1]], True), (text[here[0][1] :], False)]
        else:
            pieces.append((text, here))
    return [piece for piece in pieces if piece[0]]


def _masked(encoding: Encoding, learned: Sequence[Span]) -> Masked:
    """learned: spans of characters, in order."""
    ids, offsets = encoding.ids, encoding.offsets  # each access makes a new list
    loss_mask = [False] * len(ids)
    at = 0
    for start, stop in learned:
        while at < len(loss_mask) and offsets[at][0] < stop:
            begin, end = offsets[at]
            loss_mask[at] = begin >= start and end > start  # a blank before it may have been trimmed to no width
            at += 1
    return ids, loss_mask


def _encode_disguised(tokenizer: Any, tokens: frozenset[str], whole: str, learned: Sequence[Span]) -> Masked:
    """With the template's own tokens written as characters that no text has, so that the others are text like any."""
    backend, names = _disguised(tokenizer, tokens)
    any_token = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    either = re.compile(f"{MARK}({any_token}){MARK}|({any_token})")
    boundaries = [0, *(place for span in learned for place in span), len(whole)]
    text, moved = "", []
    for start, stop in itertools.pairwise(boundaries):
        text += either.sub(lambda found: found[1] or names[found[2]], whole[start:stop])
        moved.append(len(text))
    return _masked(backend.encode(text, add_special_tokens=False), list(zip(moved[::2], moved[1::2], strict=False)))


_DISGUISED: WeakKeyDictionary[Any, tuple[Any, tuple[Tokenizer, dict[str, str]]]] = WeakKeyDictionary()


def _disguised(tokenizer: Any, tokens: frozenset[str]) -> tuple[Tokenizer, dict[str, str]]:
    """(A tokenizer with the same ids, where each of `tokens` is written as one private-use character, which)."""
    state, made = _DISGUISED.get(tokenizer, (None, None))
    if made is None or state != (len(tokenizer), tokens):
        names = {token: chr(0xF0000 + number) for number, token in enumerate(sorted(tokens))}
        made = _renamed(tokenizer.backend_tokenizer.to_str(), names), names
        _DISGUISED[tokenizer] = (len(tokenizer), tokens), made
    return made


def _renamed(serialized: str, names: dict[str, str]) -> Tokenizer:
    from tokenizers import Tokenizer

    content = json.loads(serialized)
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), *rest] for piece, *rest in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for added_around in ("post_processor", "truncation", "padding"):
        content[added_around] = None
    return Tokenizer.from_str(json.dumps(content))


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    left = limit
    for text in texts:
        data = text.encode()
        yield data[:left].decode(errors="ignore")
        left -= len(data)
        if left <= 0:
            return
