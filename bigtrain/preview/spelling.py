"""How a tokenizer spells its tokens, also those that are a part of a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

REPLACEMENT = "\ufffd"
ONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a token of SentencePiece's byte fallback


def spell(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token. A character that several tokens make up stands with the last of them; bytes that make
    up none, like those of a character that began in an earlier sample, are spelt `<0xE4>`."""
    decoder = codecs.getincrementaldecoder("utf-8")(SPELT)
    texts = [decoder.decode(_bytes(tokenizer, i)) for i in ids]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def spell_together(tokenizer: Any, ids: Sequence[int], texts: Sequence[str]) -> str:
    """The text of tokens that follow each other, of which `texts` are those of `spell`: as the tokenizer decodes them,
    unless a part of a character is at one of their ends."""
    decoded = _decode(tokenizer, ids)
    return "".join(texts) if REPLACEMENT in decoded else decoded


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _bytes(tokenizer: Any, token: int) -> bytes:
    alone = _decode(tokenizer, [token])
    piece = tokenizer.convert_ids_to_tokens(token)
    if REPLACEMENT not in alone:
        # some decoders take the space before the first word away
        return (piece.replace("▁", " ") if "▁" in piece and "▁" not in alone else alone).encode(errors="surrogatepass")
    if (byte := ONE_BYTE.fullmatch(piece)) is not None:
        return bytes([int(byte[1], 16)])
    values = [_alphabet().get(character) for character in piece]
    return alone.encode() if None in values else bytes(value for value in values if value is not None)


@cache
def _alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers name bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


SPELT = "bigtrain-spelt"


def _spelt(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error(SPELT, _spelt)
