"""What is done to a text: repair, normal form, boilerplate, redaction; and the words and lines that comparisons see."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from bigtrain.config.schema import CleanConfig
from bigtrain.data.cleaning.ngrams import hash_text
from bigtrain.data.cleaning.redaction import Redaction
from bigtrain.data.files import ABOUT

if TYPE_CHECKING:
    from bigtrain.data.sources import Row

REPAIR_PASSES = 8  # one repair can uncover another; texts settle after two or three
# Scripts written without spaces: each character counts as a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
UNSPACED_CHARACTER = re.compile(rf"[{UNSPACED}]")
WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
UNCLEAN_ASCII = re.compile(r"[\x00-\x08\x0b\x0d-\x1f\x7f]")  # what of ASCII the repair would change

Change = tuple[str, str, str]  # step, text before, text after


def repair(text: str) -> str:
    """Undo mojibake, broken surrogates, control characters, terminal escapes and odd line ends, with ftfy.

    What may be meant stays: quotation marks, ligatures, full-width forms, HTML entities. Idempotent.
    """
    if text.isascii() and not UNCLEAN_ASCII.search(text):
        return text
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization=None,
        explain=False,
    )
    for _ in range(REPAIR_PASSES):
        text, before = ftfy.fix_text(text, config), text
        if text == before:
            break
    return text


def words(text: str) -> list[str]:
    """The words of a text as comparisons see them: case, punctuation and spacing do not count (NFKC, case folded)."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def is_unspaced(word: str) -> bool:
    """Whether a word of `words` is a character of a script without spaces."""
    return len(word) == 1 and UNSPACED_CHARACTER.match(word) is not None


def lines_of(text: str) -> list[str]:
    """The lines of a text as boilerplate is compared by: case and runs of white space do not count."""
    return [" ".join(line.casefold().split()) for line in text.split("\n")]


def without(text: str, lines: Collection[int]) -> str:
    """The text without the lines of these hashes, and without the blank lines that they leave."""
    hashes = [hash_text(line) for line in lines_of(text)]
    if not any(number in lines for number in hashes):
        return text
    kept: list[str] = []
    cutting = True
    for line, number in zip(text.split("\n"), hashes, strict=True):
        blank = not line.strip()
        if number in lines or (cutting and blank and not (kept and kept[-1].strip())):
            cutting = True
        else:
            cutting = False
            kept.append(line)
    while kept and not kept[-1].strip():
        kept.pop()
    return "\n".join(kept)


def row_text(row: Row) -> str:
    """All that a row says, for filters and comparisons; roles, keys and descriptions of tools left out."""
    return "\n".join(_strings(value) for name, value in row.items() if name not in ABOUT and name != "tools")


class TextSteps:
    """The steps that change texts, of a stage's `clean`, in their order: repair, normalize, boilerplate, redact."""

    def __init__(self, clean: CleanConfig, boilerplate: Collection[int] = (), kinds: Counter[str] | None = None):
        """boilerplate: hashes of the lines to cut. kinds: counts what is redacted."""
        self._steps: list[tuple[str, Callable[[str], str]]] = []
        if clean.repair:
            self._steps.append(("repair", repair))
        if (form := clean.normalize) is not None:
            self._steps.append(("normalize", lambda text: unicodedata.normalize(form, text)))
        if boilerplate:
            self._steps.append(("boilerplate", lambda text: without(text, boilerplate)))
        if clean.redact:
            redaction = Redaction(clean.redact, clean.phone_region)
            self._steps.append(("redact", lambda text: redaction(text, kinds)))

    def __call__(self, row: Row, told: Callable[[Change], None] | None = None) -> Row:
        """The row with its texts cleaned: `messages` keep their form. `told` hears of each change."""
        if not self._steps:
            return row
        return {name: value if name in ABOUT else self._cleaned(value, told) for name, value in row.items()}

    def _cleaned(self, value: Any, told: Callable[[Change], None] | None) -> Any:
        if isinstance(value, str):
            for name, step in self._steps:
                value, before = step(value), value
                if told is not None and value != before:
                    told((name, before, value))
            return value
        if isinstance(value, list):
            return [self._cleaned(item, told) for item in value]
        if isinstance(value, dict):
            return {key: below if key == "role" else self._cleaned(below, told) for key, below in value.items()}
        return value


def _strings(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [below for key, below in value.items() if key != "role"]
    return "\n".join(_strings(item) for item in value) if isinstance(value, list) else ""
