"""Cleaning: each step on texts that it must and must not touch; duplicates and leakage on real text; the report."""

# ruff: noqa: RUF001 - letters that look alike are what this is about

from __future__ import annotations

import copy
import importlib.util
import io
import ipaddress
import json
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import load
from bigtrain.config.clean import Leakage, NearDuplicates, Repetition
from bigtrain.config.model import TrainTokenizerConfig
from bigtrain.config.schema import (
    CleanConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
)
from bigtrain.data import stdlib
from bigtrain.data.cleaning import Decisions, decide, kept
from bigtrain.data.cleaning.duplicates import ExactIndex, LeakageIndex, NearIndex
from bigtrain.data.cleaning.ngrams import hash_words, ngrams, shingles
from bigtrain.data.cleaning.redaction import KINDS, Redaction, passes_luhn
from bigtrain.data.cleaning.repetition import too_repetitive
from bigtrain.data.cleaning.texts import TextSteps, repair, row_text, words
from bigtrain.data.prepare import prepare_stage
from bigtrain.data.sources import documents
from bigtrain.errors import ConfigError, DataError
from bigtrain.observability.events import Cleaned
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Stream
from bigtrain.optim.adamw import AdamW
from bigtrain.pipeline.build import open_tokenizer, prepare_stages
from bigtrain.tasks.pretrain import Pretrain
from tests.support import Rows
from tests.unit.mutations import VALUES

redact = Redaction(region="US")
MODULES = [row["text"] for row in stdlib.modules() if 2_000 < len(row["text"]) < 20_000]

# Secrets are put together here, so that no scanner takes this file for a leak.
SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a",
    "github_pat_" + "11ABCDEFG0abcdefghijkl_MNOPQRSTUVWXYZ",
    "glpat-" + "x1Y2z3A4b5C6d7E8f9G0",
    "sk-" + "proj-abcDEF123456ghiJKL789mno",
    "sk-" + "ant-api03-AbCdEf0123456789_-xyz",
    "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "xoxb-" + "123456789012-abcdefGHIJKL",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "hf_" + "abcdefghijABCDEFGHIJabcdefghijABCD",
    "npm_" + "abcdefghijABCDEFGHIJ0123456789abcdef",
    "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "-----BEGIN RSA PRIVATE" + " KEY-----\nMIIEpAIBAAKCAQEA7bq+\n/x9=\n-----END RSA PRIVATE" + " KEY-----",
    "-----BEGIN PGP PRIVATE" + " KEY BLOCK-----\nVersion: 2\n\nlQOYBF\n-----END PGP PRIVATE" + " KEY BLOCK-----",
    "-----BEGIN PRIVATE" + " KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ",  # torn
]
EMAILS = ["joe@example.com", "jane.doe+news@mail.example.co.uk", "o_r-g%x@sub-domain.example.org", "A@B.CO"]
CARDS = ["4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009", "3782 822463 10005", "6011000000000004"]
ADDRESSES = ["8.8.4.4", "192.168.17.254", "203.0.113.9", "2001:db8::8a2e:370:7334", "fe80::1ff:fe23:4567:890a",
             "2001:0db8:85a3:0000:0000:8a2e:0370:7334", "fd12:3456:789a:1::1"]  # fmt: skip
PHONES = [
    "+49 30 901820",
    "+1 (212) 555-2368",
    "+86 10 6552 9988",
    "+44 20 7946 0958",
    "(212) 555-2368",
    "415-555-2671",
]
OF_KIND = {"secret": SECRETS, "email": EMAILS, "card": CARDS, "ip": ADDRESSES, "phone": PHONES}

INNOCENT = [
    "@functools.cache", "x = a @ b.T", "@dataclass(frozen=True)", "user@localhost", "1@2", "see user@ or @user",
    "version 1.2.3.4", "v2.0.0.1", "Chrome/120.0.0.0", "foo==1.2.3.4", "1.2.3.4.5", "10.0.19041.1", "3.11.4",
    "127.0.0.1", "0.0.0.0", "255.255.255.0", "1.3.6.1.4.1.311", "§ 2.1.3.4",
    "std::vector", "x[1::2]", "a[::-1]", "::", "::1", "dead::beef",
    "12:30:45", "00:1A:2B:3C:4D:5E", "9:30", "{a: b}",
    "4111 1111 1111 1112", "1234567890123456", "0000 0000 0000 0000", "3.141592653589793", "1700000000000000000",
    "978-3-16-148410-0", "a4111111111111111f", "0x4111111111111111", "4111111111111111.5",
    "Decimal('+35236450.6')", "2024-06-15", "+1", "1 + 2 = 3", "+12", "100,000,000", "10 000",
    "sk-learn", "sk-short-1", "task-management-in-a-long-hyphenated-phrase", "AKIA", "AKIAshort", "ghp_x", "eyJ.x.y",
    "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----", "https://example.com/a:b@c",
    "<EMAIL> <PHONE> <SECRET>",
]  # fmt: skip


# Repair and normal form.


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("schÃ¶n", "schön"),
        ("âœ” done", "✔ done"),
        ("Itâ€™s", "It’s"),
        ("a\x00b\x07c", "abc"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("\ufeffbegin", "begin"),
        ("\ud83d\ude00", "😀"),
    ],
)
def test_repair_mends(broken: str, mended: str) -> None:
    assert repair(broken) == mended


@pytest.mark.parametrize(
    "text",
    [
        "plain\n\ttext\x0c",
        "“quotes” ‘stay’",
        "你好，世界！（全角）",
        "&lt;b&gt; &amp;",
        "ﬁ Å Å",
        "schön",
        "日本語テキスト",
        "",
        "ＡＢＣ",
    ],
)
def test_repair_leaves_what_is_meant(text: str) -> None:
    assert repair(text) == text


MOJIBAKE = st.text(max_size=40).map(lambda s: s.encode("utf-8", "surrogatepass").decode("latin-1"))


@given(st.one_of(st.text(), MOJIBAKE, st.text("Ã¶âœ€™\x80\x9d\x85 a\r\n\x1b[m", max_size=30)))
@settings(max_examples=300, deadline=None)
def test_repair_is_idempotent(text: str) -> None:
    assert repair(repair(text)) == repair(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_the_short_cut_for_ascii_changes_nothing(text: str) -> None:
    """It passes over texts that ftfy would leave alone."""
    assert repair(text) == repair(text + "Ā").removesuffix("Ā")


def test_the_standard_library_needs_no_repair() -> None:
    assert all(repair(text) == text for text in MODULES)


def test_normal_forms() -> None:
    assert TextSteps(CleanConfig(normalize="NFC"))({"key": "e\u0301", "text": "e\u0301 ﬁ"}) == {
        "key": "e\u0301",
        "text": "é ﬁ",
    }
    assert TextSteps(CleanConfig(normalize="NFKC"))({"key": "k", "text": "ﬁ"})["text"] == "fi"


def test_every_text_of_a_row_is_cleaned_and_its_form_stays() -> None:
    steps = TextSteps(CleanConfig(redact=["email"]))
    mail, gone = "a@example.com", "<EMAIL>"
    call = {"function": {"name": "send", "arguments": {"to": mail, "times": 3}}}
    row = {
        "key": mail,
        "messages": [{"role": mail, "content": mail}, {"role": "assistant", "content": "", "tool_calls": [call]}],
    }
    cleaned = steps(row)
    assert cleaned["key"] == mail
    assert cleaned["messages"][0] == {"role": mail, "content": gone}
    assert cleaned["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"to": gone, "times": 3}
    assert row["messages"][0]["content"] == mail
    assert steps({"key": "k", "prompt": mail, "completion": f"x {mail}"}) == {
        "key": "k",
        "prompt": gone,
        "completion": f"x {gone}",
    }


# Redaction.


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in OF_KIND.items() for text in texts])
@pytest.mark.parametrize("around", ["{}", "Write to {}, please.", "联系方式：{}。", "({})", '"{}"', "x = '{}'\n"])
def test_personal_data_is_replaced(kind: str, text: str, around: str) -> None:
    found: Counter[str] = Counter()
    torn = text.startswith("-----") and "END" not in text
    assert redact(around.format(text), found) == around.format(f"<{kind.upper()}>") or torn
    assert found == {kind: 1}
    assert text not in redact(around.format(text))


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert redact(text) == text
    assert redact(f"so {text} it is") == f"so {text} it is"


def test_the_password_of_an_address() -> None:
    assert redact("git clone https://me:hunter2@host.example.com/x") == "git clone https://<SECRET>@host.example.com/x"


def test_only_the_chosen_kinds() -> None:
    text = " ".join(texts[0] for texts in OF_KIND.values())
    for kind, texts in OF_KIND.items():
        assert Redaction([kind], "US")(text) == text.replace(texts[0], f"<{kind.upper()}>")
    assert Redaction(["phone"])("call 415-555-2671") == "call 415-555-2671"  # no country is known for it


@pytest.mark.parametrize("number", ["79927398713", "4111111111111111", "378282246310005", "0"])
def test_luhn(number: str) -> None:
    assert passes_luhn(number)
    for digit in "0123456789":
        assert passes_luhn(number[:-1] + digit) == (digit == number[-1])


@given(st.integers(10**14, 10**15 - 1))
def test_visa_numbers_are_redacted_just_with_the_right_check_digit(body: int) -> None:
    cards = Redaction(["card"])
    numbers = [f"4{body}{digit}"[:15] + str(digit) for digit in range(10)]
    redacted = [number for number in numbers if cards(f"pay {number} now") == "pay <CARD> now"]
    assert redacted == [number for number in numbers if passes_luhn(number)]
    assert len(redacted) == 1


def test_a_card_beside_other_numbers() -> None:
    assert redact("12 2024 4111 1111 1111 1111 99") == "12 2024 <CARD> 99"


@given(st.ip_addresses())
@settings(max_examples=300)
def test_addresses_are_addresses(address: Any) -> None:
    redacted = Redaction(["ip"])(f"from {address} to")
    if address.version == 4:
        nobodys = address.is_loopback or str(address).startswith(("0.", "255."))
        assert redacted == (f"from {address} to" if nobodys else "from <IP> to")
    elif address in ipaddress.ip_network("2000::/3"):
        assert redacted == "from <IP> to"


PIECES = st.sampled_from(
    [text for texts in OF_KIND.values() for text in texts]
    + INNOCENT
    + [" ", "", "\n", ".", "-", "1", "+", "@", ":", "a"]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=8).map("".join), st.text("0123456789 -.+():@a/sk_", max_size=60)))
@settings(max_examples=400, deadline=None)
def test_redaction_is_idempotent_and_complete(text: str) -> None:
    once, again = redact(text), Counter()
    assert redact(once, again) == once
    assert not again


def test_precision_and_recall_on_labelled_text() -> None:
    """Real prose and code without personal data, into which known pieces are put at known places."""
    rng = random.Random(0)
    hits: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    clean = [text for text in MODULES if redact(text) == text][:60]
    assert len(clean) == 60
    for text in clean:
        lines = text.split("\n")
        kinds = [rng.choice(KINDS) for _ in range(10)]
        for kind in kinds:
            lines.insert(rng.randrange(len(lines)), f"# ask {rng.choice(OF_KIND[kind][:4])} about it")
        found: Counter[str] = Counter()
        redact("\n".join(lines), found)
        hits.update(found & Counter(kinds))
        wrong.update(found - Counter(kinds))
    assert sum(hits.values()) == 600  # recall 1 on forms that are known
    assert sum(wrong.values()) == 0
    touched = [text for text in MODULES if Redaction(["secret", "card", "phone"])(text) != text]
    assert len(touched) <= len(MODULES) * 0.01  # precision where nothing is known to be there


def test_redaction_takes_linear_time() -> None:
    """Runs that could make a pattern try every start and every end; trying them all would take minutes."""
    pem = "-----BEGIN PRIVATE KEY-----"
    for unit in ("a", "a.", "1", "1 ", "1.", "f:", "2001:1", "@", "a@", pem, pem + "?", "eyJ-", "sk-", "://a:", "a "):
        text = unit * (60_000 // len(unit))
        begun = time.process_time()
        Redaction(["secret", "email", "card", "ip"])(f"2001:{text}z")
        assert time.process_time() - begun < 10, unit


# Filters.


def fails(text: str, **limits: Any) -> str | None:
    off = {name: None for name in Repetition.model_fields if name != "min_words"}
    return failed(text, Repetition(**{**off, "min_words": 1, **limits}))


def failed(text: str, limits: Repetition) -> str | None:
    """The reason of the first filter that a text fails."""
    drop = next(too_repetitive(text, words(text), limits), None)
    return None if drop is None else drop.reason


PROSE = """When a run breaks, what it knew is written down: the step, the weights and moments, and nothing that can be
computed again. Any number of processes may take over from there.

The order of samples follows from a key, so that no loader has to remember where it stood. Schedules likewise are plain
functions, and whoever resumes asks them for the value at that point.
"""


def test_prose_passes_and_repeated_prose_does_not() -> None:
    gopher = Repetition()
    assert failed(PROSE, gopher) is None
    assert failed(PROSE * 3, gopher) == "duplicate lines"
    for text in ("", " \n ", "one", "one two", "中文"):
        assert failed(text, gopher) is None
    assert failed("buy now " * 40, gopher) == "most frequent 2-gram"


def test_shares_of_lines_and_paragraphs() -> None:
    text = "a\nbb\n\na\n\n\na\nccc\n"  # 5 lines with text, two of which were there before: 2 of 8 characters
    assert fails(text, duplicate_lines=0.39) == "duplicate lines"
    assert fails(text, duplicate_lines=0.41) is None
    assert fails(text, duplicate_line_characters=0.24) == "characters in duplicate lines"
    assert fails(text, duplicate_line_characters=0.26) is None
    text = "one\ntwo\n\nthree\n \none\ntwo\n\n\nfour"  # 4 paragraphs, the third was there before: 7 of 23 characters
    assert fails(text, duplicate_paragraphs=0.24) == "duplicate paragraphs"
    assert fails(text, duplicate_paragraphs=0.26) is None
    assert fails(text, duplicate_paragraph_characters=0.29) == "characters in duplicate paragraphs"
    assert fails(text, duplicate_paragraph_characters=0.31) is None


def slow_top(parts: list[str], n: int) -> float:
    grams = Counter(tuple(parts[i : i + n]) for i in range(len(parts) - n + 1))
    most = max(grams.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in grams.items() if count == most)
    shares = []
    for gram in (g for g, count in grams.items() if count == most and sum(map(len, g)) == longest):
        inside = {i + k for i in range(len(parts) - n + 1) if tuple(parts[i : i + n]) == gram for k in range(n)}
        shares.append(sum(len(parts[i]) for i in inside) / sum(map(len, parts)))
    return max(shares)


def slow_duplicate(parts: list[str], n: int) -> float:
    seen: set[tuple[str, ...]] = set()
    inside: set[int] = set()
    for i in range(len(parts) - n + 1):
        gram = tuple(parts[i : i + n])
        inside |= set(range(i, i + n)) if gram in seen else set()
        seen.add(gram)
    return sum(len(parts[i]) for i in inside) / max(1, sum(map(len, parts)))


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=30), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_ngram_shares_against_a_slow_reference(parts: list[str], at: int) -> None:
    text = " ".join(parts)
    share = slow_duplicate(parts, 5 + at)
    limits = [1.0] * 6
    for limit, expected in ((share - 1e-9, f"duplicate {5 + at}-grams"), (share + 1e-9, None)):
        limits[at] = min(1.0, max(0.0, limit))
        assert fails(text, duplicate_ngrams=limits) == (expected if share else None)
    n = 2 + at % 3
    share = slow_top(parts, n)
    if share:
        limits = [1.0] * 3
        limits[n - 2] = max(0.0, min(1.0, share + 1e-9))
        assert fails(text, top_ngrams=limits) is None


# Duplicates and leakage.


def edited(text: str, rng: random.Random, share: float) -> str:
    """The text with this share of its lines replaced."""
    lines = text.split("\n")
    for i in rng.sample(range(len(lines)), round(share * len(lines))):
        lines[i] = " ".join(
            rng.choice(["ant", "bee", "cat", "dog", "elk"]) + str(rng.randrange(1000)) for _ in range(8)
        )
    return "\n".join(lines)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    both = len(np.intersect1d(one, other))
    return both / (len(one) + len(other) - both)


def test_words_of_any_script() -> None:
    assert words("Straße STRASSE, it's ＡＢＣ-1") == ["strasse", "strasse", "it", "s", "abc", "1"]
    assert words("我爱abc语言。") == ["我", "爱", "abc", "语", "言"]
    assert words("?!") == []


def test_ngrams_are_runs_of_words() -> None:
    hashes = hash_words(list("abcabd"))
    pairs = ngrams(hashes, 2)
    assert len(pairs) == 5
    assert pairs[0] == pairs[3] and len(set(pairs.tolist())) == 4
    assert len(ngrams(hashes, 7)) == 0
    assert len(shingles(["a", "b"], "a b", 5)) == 1
    assert shingles([], "?!", 5) == shingles([], " ?! ", 5) != shingles([], "!!", 5)
    assert hash_words(["word"]).tolist() == [10776770685243991114]  # for ever: decisions are kept


def test_exact_duplicates_are_equal_but_for_white_space() -> None:
    index = ExactIndex()
    assert index.first(0, "A cafe\u0301\n  here") is None
    assert index.first(1, " A café here\n") == 0
    assert index.first(2, "a café here") is None
    assert index.first(3, "A café here") == 0


def test_near_duplicates_on_real_text() -> None:
    """Modules and edited copies: what is above the threshold by more than the estimate's error is found, what is below
    is not."""
    rng, near = random.Random(1), NearIndex(NearDuplicates())
    originals = rng.sample(MODULES, 120)
    sets = [shingles(words(text), text, 5) for text in originals]
    unique = [i for i, grams in enumerate(sets) if near.nearest(i, grams) is None]
    assert len(unique) >= 118
    right = missed = wrong = tried = 0
    for i in unique:
        for share in (0.0, 0.02, 0.05, 0.2, 0.5):
            grams = shingles(words(copy := edited(originals[i], rng, share)), copy, 5)
            similarity, error = jaccard(sets[i], grams), 3 * 0.4 / 128**0.5
            found = NearIndex.nearest(near, 1000, grams) if similarity > 0.8 - error else None
            if similarity > 0.8 + error:
                right, missed = right + (found is not None and found[0] == i), missed + (found is None)
                assert found is None or abs(found[1] - similarity) < error
    assert right > 150 and missed <= right * 0.02
    fresh = NearIndex(NearDuplicates())
    for number, i in enumerate(unique):
        for share in (0.08, 0.11, 0.14, 0.17):
            grams = shingles(words(copy := edited(originals[i], rng, share)), copy, 5)
            if 0.5 < jaccard(sets[i], grams) < 0.65:  # a candidate at times, and four errors below the threshold
                tried += 1
                wrong += fresh.nearest(2 * number, sets[i]) is not None
                wrong += fresh.nearest(2 * number + 1, grams) is not None
                break
    assert tried > 40
    assert wrong == 0


def test_leakage_finds_held_out_text_within_training_text_and_the_reverse() -> None:
    held_out, others = MODULES[:40], MODULES[40:140]
    index = LeakageIndex(Leakage(), (shingles(words(text), text, 13) for text in held_out))
    leaked = lambda text: index.leaked(shingles(words(text), text, 13))  # noqa: E731
    rng = random.Random(2)
    for number, text in enumerate(held_out[:20]):
        lines = text.split("\n")
        assert leaked(text)[1] == 1.0
        assert leaked("\n".join(others[0:3]) + text)[0] == number  # all of it, in something much longer
        assert leaked("\n".join(lines[len(lines) // 3 : len(lines) // 3 * 2])) is not None  # a piece of it
        assert leaked(edited(text, rng, 0.05)) is not None
        assert leaked(edited(text, rng, 0.9)) is None
    assert sum(leaked(text) is not None for text in others) <= 1
    nothing = LeakageIndex(Leakage(), [])
    assert nothing.leaked(shingles(words(PROSE), PROSE, 13)) is None


# A stage's decisions.


def write_rows(file: Path, rows: Iterable[Any]) -> str:
    file.write_text("".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows))
    return str(file)


def stage_of(*sources: str, task: str = "pretrain", **values: Any) -> StageConfig:
    defaults: dict[str, Any] = {"sequence_length": 64, "global_batch_size": 4, "steps": 3}
    data = [SourceConfig(source=source) for source in sources]
    return StageConfig(name="s", task=task, data=data, optimizer=AdamW(lr=1e-3), **{**defaults, **values})


def decided(folder: Path, stage: StageConfig) -> Decisions:
    decisions = decide(folder / "stores", stage, stage.task.columns)
    assert decisions is not None
    return decisions


def training(stage: StageConfig, decisions: Decisions) -> list[list[dict[str, Any]]]:
    """Of each source what is trained on."""
    return [
        list(map(decisions.steps(i), kept(documents(source, stage.task.columns), decisions, i)))
        for i, source in enumerate(stage.data)
    ]


EVERYTHING: dict[str, Any] = {
    "repair": True,
    "normalize": "NFC",
    "redact": list(KINDS),
    "phone_region": "US",
    "min_characters": 20,
    "max_characters": 19_000,
    "repetition": Repetition(),
    "exact_duplicates": True,
    "near_duplicates": NearDuplicates(),
    "leakage": Leakage(),
}


def messy(folder: Path) -> StageConfig:
    """Two sources and held-out documents of which it is known what has to go."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(3)
    short = [text for text in MODULES if len(text) < 15_000]
    good = [text for text in short if failed(text, Repetition()) is None]
    held_out, one, two = good[:5], good[5:25], good[25:45]
    first = [
        *one,
        "short",
        "x" * 20_000,
        "spam and eggs " * 50,
        one[3],
        f"{PROSE} schÃ¶n",
    ]
    second = [*two, one[0].replace("\n", "\n\n"), edited(one[1], rng, 0.02), held_out[2] + two[0][:300], held_out[4]]
    second += [f"Letter {i} to {secret}, about {good[50 + i]}" for i, secret in enumerate(SECRETS + EMAILS + PHONES)]
    return stage_of(
        write_rows(folder / "one.jsonl", first),
        write_rows(folder / "two.jsonl", second),
        evaluate=EvaluateConfig(data=[SourceConfig(source=write_rows(folder / "held-out.jsonl", held_out))]),
        clean=CleanConfig(**EVERYTHING),
    )


def held_out_text(stage: StageConfig, number: int) -> str:
    assert stage.evaluate is not None and stage.evaluate.data is not None
    rows = list(documents(stage.evaluate.data[0], Pretrain.columns))
    return str(rows[number]["text"])


def test_a_stage_without_cleaning_is_left_alone(tmp_path: Path) -> None:
    assert decide(tmp_path / "out" / "stores", stage_of("stdlib"), Pretrain.columns) is None
    assert list(tmp_path.iterdir()) == []


def test_what_must_go_goes_and_what_must_stay_stays(tmp_path: Path) -> None:
    stage = messy(tmp_path / "data")
    decisions = decided(tmp_path / "out", stage)
    reasons = ["kept", *decisions.manifest["reasons"]]
    first, second = ([reasons[code] for code in decisions.dropped(i)] for i in range(2))
    assert first == ["kept"] * 20 + ["too short", "too long", "most frequent 2-gram", "exact duplicate", "kept"]
    assert second[:20] == ["kept"] * 20
    assert second[20:24] == ["exact duplicate", "near duplicate", "leaked", "leaked"]
    assert set(second[24:]) == {"kept"}
    one, two = training(stage, decisions)
    assert len(one) == first.count("kept") and len(two) == second.count("kept")
    assert one[-1]["text"] == f"{PROSE} schön"
    report = decisions.report
    assert report["documents"] == len(first) + len(second)
    assert report["kept"] == len(one) + len(two) == sum(source["kept"] for source in report["sources"])
    assert report["dropped"] == sum(tally["documents"] for tally in report["dropped_for"].values())
    assert report["characters_kept"] == sum(len(row["text"]) for row in one + two)
    removed = sum(tally["characters_removed"] for tally in report["changed"].values())
    lost = sum(tally["characters"] for tally in report["dropped_for"].values())
    assert report["characters"] == report["characters_kept"] + removed + lost
    kinds = report["changed"]["redact"]["kinds"]
    assert kinds["secret"] >= len(SECRETS) and kinds["email"] >= len(EMAILS) and kinds["phone"] >= len(PHONES)
    [repaired] = report["changed"]["repair"]["examples"]
    assert "schÃ¶n" in repaired["before"] and "schön" in repaired["after"]
    near = report["dropped_for"]["near duplicate"]["examples"][0]
    assert near["of"].endswith("one.jsonl:2") and near["value"] >= near["limit"] == 0.8
    assert near["document"].endswith("two.jsonl:22")
    [part, whole] = report["dropped_for"]["leaked"]["examples"]
    assert part["of"].endswith("held-out.jsonl:3") and whole["value"] == 1.0
    shared = part["shared"].removesuffix("[...]")
    assert shared in " ".join(words(held_out_text(stage, 2))) and len(shared) > 100
    every = [json.loads(line) for line in (decisions.folder / "dropped.jsonl").read_text().splitlines()]
    assert [drop["document"].rsplit(".", 1)[-1] for drop in every] == [
        f"jsonl:{row + 1}" for codes in (first, second) for row, reason in enumerate(codes) if reason != "kept"
    ]
    assert [drop["reason"] for drop in every] == [r for r in first + second if r != "kept"]
    assert {drop["reason"]: (drop["value"], drop["limit"]) for drop in every[:2]} == {
        "too short": (5, 20),
        "too long": (20_000, 19_000),
    }
    assert decisions.summary()["dropped"]["leaked"] == 2


def test_no_secret_is_in_what_is_written(tmp_path: Path) -> None:
    """Not in the examples of any step, whether or not the stage redacts, nor through a key or a change of spelling."""
    personal = [text for texts in OF_KIND.values() for text in texts]
    rows = [{"key": text, "text": f"{text} {PROSE}\x00 schÃ¶n {text}\x1b[0mabc\n{text}"} for text in personal]
    source = write_rows(tmp_path / "rows.jsonl", [*rows, *rows, *({"text": text} for text in personal)])
    for number, clean in enumerate(
        (
            {"redact": list(KINDS), "phone_region": "US"},
            {"redact": ["phone"], "phone_region": "US", "repair": True},
            {"repair": True, "normalize": "NFKC", "exact_duplicates": True, "redact": ["phone"], "phone_region": "US"},
            {"min_characters": 300, "redact": ["phone"], "phone_region": "US"},
            {"near_duplicates": NearDuplicates(), "redact": ["phone"], "phone_region": "US"},
            {"max_characters": 30, "repair": True, "redact": ["phone"], "phone_region": "US"},
        )
    ):
        decisions = decided(tmp_path / str(number), stage_of(source, clean=CleanConfig(**clean)))
        examples = [e for tally in (*decisions.report["changed"].values(), *decisions.report["dropped_for"].values())
                    for e in tally["examples"]]  # fmt: skip
        assert examples
        written = "".join(file.read_text("utf-8", "replace") for file in decisions.folder.iterdir())
        assert [text for text in personal if text in written or json.dumps(text)[1:-1] in written] == []


def test_numbers_without_a_known_form_are_not_in_examples(tmp_path: Path) -> None:
    numbers = ["415-555-2671", "(030) 901 820 11", "078-05-1120", "4111111111111112"]
    source = write_rows(tmp_path / "a.jsonl", [f"{number} schÃ¶n" for number in numbers] + [PROSE])
    for clean in (CleanConfig(min_characters=50), CleanConfig(repair=True)):
        decisions = decided(tmp_path / "out", stage_of(source, clean=clean))
        written = (decisions.folder / "report.json").read_text()
        assert "[hidden]" in written and "<NUMBER>" not in written
        assert [number for number in numbers if number in written] == []


def test_a_spelling_that_repair_hides_is_not_in_examples(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", ["from 8.8.4.4\x1b[0m.5 to there"])
    examples = decided(tmp_path, stage_of(source, clean=CleanConfig(repair=True))).report["changed"]["repair"][
        "examples"
    ]
    assert examples == [{"document": f"{source}:1", "after": "from 8.8.4.4.5 to there"}]


def test_damaged_decisions_are_said(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", MODULES[:5])
    stage = stage_of(source, clean=CleanConfig(exact_duplicates=True))
    for damage in (lambda file: file.write_bytes(b"\0"), Path.unlink):
        decisions = decided(tmp_path / "out", stage)
        damage(decisions.folder / "dropped.bin")
        with pytest.raises(DataError, match=r"dropped\.bin has [01] bytes instead of 5\. Remove the folder"):
            training(stage, decisions)


def test_decisions_are_the_same_each_time_and_made_once(tmp_path: Path) -> None:
    stage = messy(tmp_path / "data")
    one, two = decided(tmp_path / "one", stage), decided(tmp_path / "two", stage)
    for name in ("dropped.bin", "report.json", "manifest.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    before = {file: file.stat().st_mtime_ns for file in one.folder.iterdir()}
    assert decided(tmp_path / "one", stage) == one
    assert {file: file.stat().st_mtime_ns for file in one.folder.iterdir()} == before


def test_other_ingredients_decide_anew(tmp_path: Path) -> None:
    stage = messy(tmp_path / "data")
    assert stage.clean is not None and stage.evaluate is not None
    swapped = stage.model_copy(update={"data": stage.data[::-1]})
    strict = stage.model_copy(update={"clean": stage.clean.model_copy(update={"min_characters": 30})})
    fewer = stage.model_copy(update={"evaluate": EvaluateConfig(data=[stage.data[0]])})
    renamed = stage.model_copy(update={"name": "other", "steps": 9})
    folders = [decided(tmp_path / "out", s).folder for s in (stage, strict, swapped, renamed)]
    assert folders[0] == folders[3]
    planned = decide(tmp_path / "out" / "stores", fewer, Pretrain.columns, make=False)
    assert planned is not None and not planned.folder.exists()
    assert len({*folders, planned.folder}) == 4


def test_the_first_one_stays_in_the_order_of_the_sources(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", MODULES[:6]), write_rows(tmp_path / "b.jsonl", MODULES[3:9])
    for clean in (CleanConfig(exact_duplicates=True), CleanConfig(near_duplicates=NearDuplicates())):
        for order in ((a, b), (b, a)):
            decisions = decided(tmp_path / "out", stage_of(*order, clean=clean))
            assert decisions.dropped(0).tolist() == [0] * 6
            assert (decisions.dropped(1) > 0).sum() == 3


def test_held_out_documents_stay_as_they_are_and_lose_their_copies_in_training(tmp_path: Path) -> None:
    rows = [{"key": f"key {i}", "text": text} for i, text in enumerate(MODULES[:60])]
    copies = [{"key": f"copy {i}", "text": edited(text, random.Random(i), 0.03)} for i, text in enumerate(MODULES[:60])]
    source = write_rows(tmp_path / "rows.jsonl", rows + copies)
    stage = stage_of(source, held_out=0.2, evaluate=EvaluateConfig(), clean=CleanConfig(leakage=Leakage()))
    decisions = decided(tmp_path / "out", stage)
    reasons = ["kept", *decisions.manifest["reasons"]]
    codes = [reasons[code] for code in decisions.dropped(0)]
    held_out = {i for i, reason in enumerate(codes) if reason == "held out"}
    assert 10 < len(held_out) < 40
    twins = {(i + 60) % 120 for i in held_out} - held_out
    assert {i for i, reason in enumerate(codes) if reason == "leaked"} == twins
    assert [row["key"] for row in training(stage, decisions)[0]] == [
        (rows + copies)[i]["key"] for i, reason in enumerate(codes) if reason == "kept"
    ]


def test_conversations(tmp_path: Path) -> None:
    def chat(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    source = write_rows(tmp_path / "a.jsonl", [chat("who?", "joe@example.com"), chat("who?", "jane@example.com")])
    stage = stage_of(source, task="sft", clean=CleanConfig(redact=["email"], exact_duplicates=True))
    decisions = decided(tmp_path / "out", stage)
    [[row]] = training(stage, decisions)
    assert [m["content"] for m in row["messages"]] == ["who?", "<EMAIL>"]
    assert row_text(row) == "who?\n<EMAIL>"


@pytest.mark.parametrize(
    "clean", [CleanConfig(redact=["email"]), CleanConfig(repair=True), CleanConfig(min_characters=100)]
)
def test_what_the_report_hides_is_not_taken_for_a_change_of_the_text(tmp_path: Path, clean: CleanConfig) -> None:
    """A placeholder stands in an example where the training text has one, and nowhere else."""
    source = write_rows(tmp_path / "a.jsonl", ["schÃ¶n: joe@example.com or 8.8.4.4", PROSE])
    decisions = decided(tmp_path / "out", stage_of(source, clean=clean))
    report = decisions.report
    tallies = (*report["changed"].values(), *report["dropped_for"].values())
    [example] = [example for tally in tallies for example in tally["examples"]]
    shown = example.get("after") or example["text"]
    [trained] = [decisions.steps(0)(row)["text"] for row in documents(stage_of(source).data[0], Pretrain.columns)][:1]
    hidden = trained.replace("8.8.4.4", "[hidden]").replace("joe@example.com", "[hidden]")
    assert shown == hidden
    assert ("<EMAIL>" in shown) == ("<EMAIL>" in trained) == bool(clean.redact)
    assert "[hidden]" in report["note"]


def test_a_source_that_changes_between_two_readings(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", MODULES[:5])
    stage = stage_of(source, clean=CleanConfig(exact_duplicates=True))
    decisions = decided(tmp_path / "out", stage)
    for count in (4, 6):
        write_rows(tmp_path / "a.jsonl", MODULES[:count])
        with pytest.raises(DataError, match="has changed while it was being read"):
            training(stage, decisions)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """As many documents, ten times as long: the signatures are what is kept of them."""
    peaks = []
    for factor in (1, 10):
        rng = random.Random(factor)
        near, exact = NearIndex(NearDuplicates()), ExactIndex()
        tracemalloc.start()
        for number in range(200):
            text = " ".join(str(rng.randrange(10**6)) for _ in range(100 * factor))
            exact.first(number, text)
            near.nearest(number, np.unique(ngrams(np.array([rng.getrandbits(64) for _ in text.split()], np.uint64), 5)))
        peaks.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 200 * 16_000


# Stores and tokenizers.


def run_of(folder: Path, *stages: StageConfig) -> RunConfig:
    return RunConfig(
        name="r",
        output=str(folder),
        model=ModelConfig(from_config={"model_type": "llama"}),
        tokenizer=TokenizerConfig(train=TrainTokenizerConfig(vocab_size=400)),
        stages=list(stages),
    )


def test_stores_hold_what_cleaning_leaves_and_held_out_ones_what_there_was(tmp_path: Path) -> None:
    stage = messy(tmp_path / "data")
    run = run_of(tmp_path / "out", stage)
    tokenizer = open_tokenizer(run)
    events = Rows()
    task = Pretrain()
    data = prepare_stages(run.stages, tokenizer, stores=run.stores, seed=run.seed, stream=Stream([events]))["s"]
    decisions = decided(tmp_path / "out", stage)
    assert data.cleaning == decisions
    for store, rows in zip(data.train, training(stage, decisions), strict=True):
        assert store.manifest["documents"] == len(rows)
        assert store.manifest["tokens"] == sum(
            len(ids) for answer in task.encode(rows, tokenizer) for ids, *_ in answer
        )
        assert store.manifest["decisions"] == decisions.manifest["fingerprint"]
    assert data.held_out[0].manifest["documents"] == 5
    [told] = [event for event in events if event["kind"] == "cleaned"]
    assert told["kept"] == decisions.report["kept"] and told["folder"] == str(decisions.folder)

    plain = stage.model_copy(update={"clean": None})
    dirty = prepare_stage(plain, task, tokenizer, stores=run.stores, seed=run.seed)
    assert dirty.cleaning is None
    assert dirty.held_out[0].folder == data.held_out[0].folder
    assert not {store.folder for store in dirty.train} & {store.folder for store in data.train}
    assert sum(store.manifest["documents"] for store in dirty.train) == decisions.report["documents"]


def test_a_tokenizer_learns_from_cleaned_text(tmp_path: Path) -> None:
    mail = "somebody.rare@example.com"
    source = write_rows(tmp_path / "a.jsonl", [f"{mail} " * 50 + text for text in [PROSE, *MODULES[:20]]])
    runs = [run_of(tmp_path / "out", stage_of(source, clean=c)) for c in (CleanConfig(redact=["email"]), None)]
    clean, plain = (open_tokenizer(run) for run in runs)
    assert len(clean.tokenize("somebody")) > len(plain.tokenize("somebody"))


def test_what_is_shown_while_it_runs(tmp_path: Path) -> None:
    decisions = decided(tmp_path / "out", messy(tmp_path / "data"))
    shown = io.StringIO()
    Progress(shown)(Cleaned(stage="s", **decisions.summary()))
    report = decisions.report
    assert f"{report['kept']} of {report['documents']} training documents stay" in shown.getvalue()
    assert "2 leaked" in shown.getvalue() and "1 near duplicate" in shown.getvalue()
    assert f"{decisions.folder}/report.json" in shown.getvalue()


# The run's file.

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def recipe(clean: Any, **changes: Any) -> dict[str, Any]:
    values = yaml.safe_load(RECIPE.read_text())
    values["stages"][0]["optimizer"]["lr"] = 2e-3  # YAML 1.1 reads 2e-3 as text
    values["stages"][1]["optimizer"]["lr"] = 5e-4
    values["stages"][0] |= {"clean": copy.deepcopy(clean), **changes}
    return values


CLEAN = {
    **{name: EVERYTHING[name] for name in ("repair", "normalize", "phone_region", "min_characters", "max_characters")},
    "redact": ["email", "phone"],
    "exact_duplicates": True,
    "repetition": Repetition().model_dump(),
    "near_duplicates": NearDuplicates().model_dump(),
    "leakage": Leakage().model_dump(),
}


def loaded(folder: Path, values: dict[str, Any]) -> Any:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return load(file, here=True).run


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        ({}, "stages.pretrain.clean: does nothing"),
        ({"phone_region": "US"}, "stages.pretrain.clean: does nothing"),
        ({"exact_duplicate": True}, "did you mean `exact_duplicates`"),
        ({"redact": ["emails"]}, "emails is not one of"),
        ({"redact": ["email", "email"]}, "clean.redact: names a kind twice"),
        ({"redact": ["email"], "phone_region": "US"}, "clean.phone_region: is for `redact: [phone]`"),
        ({"redact": ["phone"], "phone_region": "XX"}, "clean.phone_region: XX is no country"),
        ({"redact": ["phone"], "phone_region": "us"}, "clean.phone_region"),
        ({"min_characters": 9, "max_characters": 8}, "clean.min_characters: 9 is more than max_characters (8)"),
        ({"near_duplicates": {"threshold": 1.5}}, "clean.near_duplicates.threshold"),
        ({"near_duplicates": {"permutations": 1}}, "clean.near_duplicates.permutations"),
        ({"near_duplicates": True}, "clean.near_duplicates: expected keys and values below it, got true"),
        ({"leakage": {"overlap": 0}}, "clean.leakage.overlap"),
        ({"repetition": {"top_ngrams": [0.1]}}, "clean.repetition.top_ngrams"),
        ({"repetition": {"duplicate_ngrams": [2.0] * 6}}, "clean.repetition.duplicate_ngrams"),
        ({"repetition": {"duplicate_lines": float("nan")}}, "clean.repetition.duplicate_lines"),
        ({"normalize": "NFD"}, "clean.normalize: NFD is not one of"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(tmp_path: Path, clean: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, recipe(clean))
    assert message in str(error.value)


def test_leakage_needs_held_out_documents(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clean\.leakage: needs held-out documents"):
        loaded(tmp_path, recipe({"leakage": {}}, held_out=0.0, evaluate=None))


def test_a_missing_package_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasketch" else found(name))
    assert loaded(tmp_path, recipe({"exact_duplicates": True})).stages[0].clean.exact_duplicates
    with pytest.raises(
        ConfigError, match=r"near_duplicates: datasketch is not installed; `pip install 'bigtrain\[clean\]'"
    ):
        loaded(tmp_path, recipe({"near_duplicates": {}}))


def test_every_mutation_of_a_cleaning_run_is_refused(tmp_path: Path) -> None:
    assert loaded(tmp_path, recipe(CLEAN)).stages[0].clean == CleanConfig(**EVERYTHING | {"redact": ["email", "phone"]})
    rng = random.Random(0)
    for mutate in VALUES * 12:
        values = recipe(CLEAN)
        word = mutate(values, rng)
        if word is not None:
            with pytest.raises(ConfigError) as error:
                loaded(tmp_path, values)
            assert word in str(error.value), (mutate.__name__, word, str(error.value))
