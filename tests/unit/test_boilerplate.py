"""Cleaning of documents that share headers and footers, of short texts and of scripts without spaces; its advice."""

# ruff: noqa: RUF001 - Chinese punctuation

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.config import load
from bigtrain.config.clean import Boilerplate, Leakage, NearDuplicates, Repetition
from bigtrain.config.schema import CleanConfig, EvaluateConfig, SourceConfig, StageConfig
from bigtrain.data.cleaning import Decisions, decide, kept
from bigtrain.data.cleaning.repetition import too_repetitive
from bigtrain.data.cleaning.texts import words
from bigtrain.data.sources import documents
from bigtrain.errors import ConfigError, DataError
from bigtrain.observability.stream import Stream
from bigtrain.optim.adamw import AdamW
from bigtrain.pipeline.build import open_tokenizer, prepare_stages
from bigtrain.tasks.pretrain import Pretrain
from tests.support import Rows

HEADER = ["Skip to the main content of this page", "Home | Guide | Reference | Release notes | Community"]
FOOTER = [
    "Was this page helpful? Tell us what is missing and we will look into it",
    "Copyright 2001 to 2024 by the Example Project and the people who have written it for many years",
    "This documentation is licensed under the terms that stand in the file of the sources of the project",
    "Built by a program that makes pages of plain text; the newest version of every page is always online",
]
# The block of the README, but for what makes no difference here.
README = CleanConfig(
    min_characters=200,
    repetition=Repetition(),
    exact_duplicates=True,
    near_duplicates=NearDuplicates(),
    leakage=Leakage(),
)
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("l", "ne", "rt", "st", "m")]


def prose(rng: random.Random, count: int) -> str:
    """Random words in lines of ten: no two texts share anything."""
    drawn = [rng.choice(VOCABULARY) for _ in range(count)]
    return "\n".join(" ".join(drawn[i : i + 10]) for i in range(0, count, 10))


def page(title: str, body: str) -> str:
    return "\n".join([*HEADER, "", title, "", body, "", *FOOTER, ""])


def site(folder: Path, pages: int = 60, stubs: int = 12) -> Path:
    """Pages of 100 to 300 words, and stubs that are a title between header and footer."""
    folder.mkdir()
    rng = random.Random(0)
    for i in range(pages):
        (folder / f"page{i:03}.txt").write_text(page(f"Chapter {i}", prose(rng, rng.randrange(100, 300))))
    for i in range(stubs):
        (folder / f"stub{i:03}.txt").write_text(page(f"Index {i}", ""))
    return folder


def stage_of(
    *sources: Any, clean: CleanConfig, task: Any = "pretrain", held_out: float = 0.1, **values: Any
) -> StageConfig:
    return StageConfig(
        name="s",
        task=task,
        data=[SourceConfig(source=str(source)) for source in sources],
        held_out=held_out,
        evaluate=values.pop("evaluate", EvaluateConfig()),
        clean=clean,
        sequence_length=64,
        global_batch_size=4,
        steps=3,
        optimizer=AdamW(lr=1e-3),
        **values,
    )


def decided(folder: Path, stage: StageConfig) -> Decisions:
    decisions = decide(folder / "stores", stage, stage.task.columns)
    assert decisions is not None
    return decisions


def outcome(stage: StageConfig, decisions: Decisions, source: int = 0) -> dict[str, str]:
    """Name of each file of a source -> `kept`, `held out` or why it was dropped."""
    reasons = ["kept", *decisions.manifest["reasons"]]
    rows = documents(stage.data[source], stage.task.columns)
    return {
        row["where"].rsplit("/", 1)[-1]: reasons[code]
        for row, code in zip(rows, decisions.dropped(source), strict=True)
    }


def trained(stage: StageConfig, decisions: Decisions, source: int = 0) -> list[str]:
    rows = kept(documents(stage.data[source], stage.task.columns), decisions, source)
    return [decisions.steps(source)(row)["text"] for row in rows]


def test_pages_that_share_header_and_footer_stay_and_what_they_share_is_named(tmp_path: Path) -> None:
    stage = stage_of(site(tmp_path / "docs"), clean=README)
    decisions = decided(tmp_path / "out", stage)
    found = outcome(stage, decisions)
    held_out = {name for name, reason in found.items() if reason == "held out"}
    assert any(name.startswith("stub") for name in held_out) and any(name.startswith("page") for name in held_out)
    assert {reason for name, reason in found.items() if name.startswith("page")} == {"kept", "held out"}
    [shared] = decisions.report["boilerplate"]
    assert (shared["cut"], shared["lines"], shared["sampled"]) == (False, 6, 72 - len(held_out))
    assert {line["line"] for line in shared["examples"]} == {line.casefold() for line in HEADER + FOOTER}
    assert all(line["documents"] == shared["sampled"] for line in shared["examples"])
    assert trained(stage, decisions)[0].count(FOOTER[-1]) == 1  # named, and not cut
    compared = decisions.report["compared_with_held_out"]
    assert compared == {
        "documents": len(held_out),
        "do_not_count": sum(name.startswith("stub") for name in held_out),
    }


def test_what_is_leaked_is_found_between_shared_header_and_footer(tmp_path: Path) -> None:
    folder = site(tmp_path / "docs")
    first = outcome(stage_of(folder, clean=README), decided(tmp_path / "out", stage_of(folder, clean=README)))
    pages = {name: (folder / name).read_text().split("\n") for name in sorted(first)}
    source = next(name for name, reason in first.items() if reason == "held out" and name.startswith("page"))
    body = "\n".join(pages[source][5 : -len(FOOTER) - 2])
    (folder / "copy.txt").write_text(page("A title", f"{prose(random.Random(5), 200)}\n{body}"))
    stage = stage_of(folder, clean=README)
    decisions = decided(tmp_path / "out", stage)
    found = outcome(stage, decisions)
    assert {name for name, why in found.items() if why == "leaked" and not name.startswith("stub")} == {"copy.txt"}
    assert found["copy.txt"] == "leaked"
    drops = [json.loads(line) for line in (decisions.folder / "dropped.jsonl").read_text().splitlines()]
    [leaked] = [drop for drop in drops if drop["document"].endswith("copy.txt")]
    assert leaked["of"] == str(folder / source) and leaked["value"] > 0.9 and leaked["limit"] == 0.5
    example = next(
        e for e in decisions.report["dropped_for"]["leaked"]["examples"] if e["document"].endswith("copy.txt")
    )
    shown = example["shared"].removesuffix("[...]")
    assert shown in " ".join(words(body)) and "copyright" not in shown


def test_a_text_that_stands_in_many_training_documents_is_still_leaked(tmp_path: Path) -> None:
    """What many documents share does not count, unless it is all that they are."""
    rng = random.Random(1)
    text = prose(rng, 300)
    copies = [{"key": f"copy {i}", "text": f"Copy {i} of this\n{text}"} for i in range(40)]
    others = [{"key": f"other {i}", "text": prose(rng, 200)} for i in range(40)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in copies + others))
    (tmp_path / "held.txt").write_text(text)
    evaluate = EvaluateConfig(data=[SourceConfig(source=str(tmp_path / "held.txt"))])
    stage = stage_of(rows, clean=CleanConfig(leakage=Leakage()), held_out=0.0, evaluate=evaluate)
    assert list(outcome(stage, decided(tmp_path / "out", stage)).values()) == ["leaked"] * 40 + ["kept"] * 40


def test_a_system_prompt_that_all_conversations_share_is_no_leakage(tmp_path: Path) -> None:
    rng = random.Random(2)
    system = {"role": "system", "content": prose(rng, 80)}

    def chat() -> dict[str, Any]:
        asked, answered = ({"role": role, "content": prose(rng, 20)} for role in ("user", "assistant"))
        return {"messages": [system, asked, answered]}

    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps(chat()) + "\n" for _ in range(60)))
    stage = stage_of(rows, clean=CleanConfig(leakage=Leakage()), task="sft", held_out=0.2)
    decisions = decided(tmp_path / "out", stage)
    assert set(outcome(stage, decisions).values()) == {"kept", "held out"}
    assert decisions.report["boilerplate"][0]["lines"] == 0


def test_boilerplate_is_cut_from_the_source_that_shares_it_and_from_no_other(tmp_path: Path) -> None:
    docs, letters = site(tmp_path / "docs"), tmp_path / "letters.jsonl"
    rng = random.Random(3)
    quoting = [f"{prose(rng, 60)}\n{FOOTER[0]}\n{prose(rng, 60)}", *(prose(rng, 60) for _ in range(30))]
    letters.write_text("".join(json.dumps({"text": text}) + "\n" for text in quoting))
    clean = README.model_copy(update={"boilerplate": Boilerplate()})
    stage = stage_of(docs, letters, clean=clean, held_out=0.05)
    decisions = decided(tmp_path / "out", stage)
    pages = trained(stage, decisions)
    found = outcome(stage, decisions)
    assert pages and not any(line in text for text in pages for line in HEADER + FOOTER)
    assert all(text.startswith("Chapter") for text in pages)  # nor the blank lines around what was cut
    names = [name for name, reason in found.items() if reason == "kept"]
    assert pages[0] == "\n".join((docs / names[0]).read_text().split("\n")[3:-6]).rstrip("\n")
    assert {reason for name, reason in found.items() if name.startswith("stub")} <= {"too short", "held out"}
    told = decisions.report["changed"]["boilerplate"]
    assert told["documents"] == sum(reason != "held out" for reason in found.values())
    assert HEADER[0] in told["examples"][0]["before"] and HEADER[0] not in told["examples"][0]["after"]
    assert any(FOOTER[0] in text for text in trained(stage, decisions, 1))
    assert [shared["lines"] for shared in decisions.report["boilerplate"]] == [6, 0]


def test_only_boilerplate_is_said(tmp_path: Path) -> None:
    folder = site(tmp_path / "docs")
    (folder / "empty.txt").write_text("\n".join(HEADER + FOOTER))
    stage = stage_of(folder, clean=CleanConfig(boilerplate=Boilerplate()), held_out=0.0, evaluate=None)
    assert outcome(stage, decided(tmp_path / "out", stage))["empty.txt"] == "nothing but boilerplate"


# Short texts, and scripts without spaces.

GOOD = [
    "房间很大，很舒服，很大的落地窗户",
    "性价比不错；搭配合理；设计外观不错。",
    "喜来登真不错,下次若是去九寨,还会选择九寨沟喜来登大酒店.",
    "非常好的酒店，非常好的服务，我先生对酒店一向非常挑剔，只有这次他实在没话说！",
    "写的一般，完全没有价值，不值得买，买了也不值得看。",
    "这家酒店的房间很干净，酒店的服务也很好，下次来还住这家酒店",
    "広い部屋で、部屋からの眺めもよく、朝食もとてもよかったです。部屋がよかった。",
    "ห้องพักสะอาดมาก ห้องพักกว้าง พนักงานบริการดีมาก",
    "very good phone, very good price",
    "The room was clean and the staff was nice. The room was quiet.",
    "no no no, not again",
]
SPAM = [
    "物流速度太慢了," * 10,
    "不错" * 20,
    "一般一般一般一般一般一般一般一般一般",
    "buy now " * 10,
    "good good good good good good good good good good good good",
    "本当に" * 15,
]


def reason(text: str, limits: Repetition | None = None) -> str | None:
    drop = next(too_repetitive(text, words(text), limits or Repetition()), None)
    return None if drop is None else drop.reason


def test_short_texts_may_say_a_word_twice() -> None:
    assert [text for text in GOOD if reason(text) is not None] == []
    assert [text for text in SPAM if reason(text) is None] == []


def test_the_limits_are_gophers_for_long_texts_with_spaces() -> None:
    """What counts below `min_words` does not from there on; two characters are a word where there are no spaces."""
    rng = random.Random(4)
    repeated = "the same five words here"
    for filler, count, expected in ((100, 5, "most frequent 2-gram"), (100, 1, None)):
        text = f"{prose(rng, filler)} " + f"{repeated} " * count
        assert (reason(text) is not None) == (expected is not None)
    characters = [chr(c) for c in range(0x4E00, 0x4E00 + 3000)]
    sentence = "".join(rng.choice(characters) for _ in range(20))
    article = "".join(rng.choice(characters) for _ in range(300))
    assert reason(article) is None
    assert reason(article[:150] + sentence + article[150:] + sentence) is None  # a tenth of it stood there before
    assert reason(article + sentence * 6) is not None
    drop = next(too_repetitive("good " * 12, words("good " * 12), Repetition()))
    assert drop.value == 1.0 and drop.limit == round(0.2 + 0.8 * (1 - 12 / 50), 4)
    assert reason("very good phone, very good price", Repetition(min_words=1)) is not None


# What is refused or warned of says what to change, and following it works.


def config(folder: Path, texts: list[str], clean: dict[str, Any]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:40]))
    stage = {
        "name": "s",
        "task": "pretrain",
        "data": [{"source": str(folder / "rows.jsonl")}],
        "evaluate": {"data": [{"source": str(folder / "held.jsonl")}]},
        "clean": clean,
        "sequence_length": 64,
        "global_batch_size": 4,
        "steps": 3,
        "optimizer": {"lr": 1e-3},
    }
    run = {
        "name": "r",
        "output": str(folder / "out"),
        "model": {"from_config": {"model_type": "llama"}},
        "tokenizer": {"train": {"vocab_size": 300}},
        "stages": [stage],
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


RNG = random.Random(6)
UNIQUE = [prose(RNG, 100) for _ in range(80)]
TIGHT = {"duplicate_lines": 0.0, "top_ngrams": [0.0] * 3}


@pytest.mark.parametrize(
    ("texts", "clean", "knob"),
    [
        (UNIQUE, {"min_characters": 10_000}, "clean=null"),
        (UNIQUE, {"min_characters": 10_000, "exact_duplicates": True}, "clean.min_characters=null"),
        (UNIQUE, {"max_characters": 10, "exact_duplicates": True}, "clean.max_characters=null"),
        (UNIQUE[:40], {"leakage": {}, "near_duplicates": {}}, "clean.leakage=null"),
        (
            [f"{text} " * 4 for text in UNIQUE],
            {"repetition": {}, "repair": True},
            "clean.repetition.duplicate_ngrams=null",
        ),
        (
            [f"{text}\n" * 3 for text in UNIQUE[:40]],
            {"repetition": TIGHT, "leakage": {}, "min_characters": 9000, "exact_duplicates": True},
            "clean.leakage=null",
        ),
        ([UNIQUE[0]] * 50, {"min_characters": 9000, "exact_duplicates": True}, "clean=null"),
    ],
)
def test_following_the_advice_of_a_refusal_works(
    tmp_path: Path, texts: list[str], clean: dict[str, Any], knob: str
) -> None:
    file = config(tmp_path, texts, clean)
    [stage] = load(file).run.stages
    with pytest.raises(DataError, match=r"stages\.s\.clean: no training document is left of \d+: \d+ \w+") as error:
        decided(tmp_path / "out", stage)
    message = str(error.value)
    changes = re.findall(r"`([^`]+)`", message)[0].split()
    assert knob in " ".join(changes)
    [refused] = (tmp_path / "out" / "stores").glob("*.refused")
    assert str(refused / "dropped.jsonl") in message and str(refused / "report.json") in message
    drops = [json.loads(line) for line in (refused / "dropped.jsonl").read_text().splitlines()]
    assert [drop["document"] for drop in drops] == [f"{tmp_path}/rows.jsonl:{i + 1}" for i in range(len(texts))]
    assert all("limit" in drop and "value" in drop for drop in drops if drop["reason"] != "exact duplicate")
    report = json.loads((refused / "report.json").read_text())
    assert report["dropped"] == len(texts) and report["warning"] in message
    [stage] = load(file, changes).run.stages
    decisions = decide(tmp_path / "out" / "stores", stage, Pretrain.columns)
    assert decisions is None or 2 * decisions.report["kept"] >= len(set(texts))
    assert decisions is None or not refused.exists()


def test_a_report_of_refused_decisions_goes_when_others_leave_documents(tmp_path: Path) -> None:
    docs, stores = site(tmp_path / "docs"), tmp_path / "out" / "stores"
    for characters in (5000, 6000):
        with pytest.raises(DataError, match="no training document is left"):
            decided(tmp_path / "out", stage_of(docs, clean=README.model_copy(update={"min_characters": characters})))
        assert len(list(stores.glob("*.refused"))) == 1
    decided(tmp_path / "out", stage_of(docs, clean=README.model_copy(update={"min_characters": 1})))
    assert list(stores.glob("*.refused*")) == []


def test_boilerplate_that_may_be_why_is_named_with_its_knob(tmp_path: Path) -> None:
    stage = stage_of(site(tmp_path / "docs"), clean=README.model_copy(update={"min_characters": 5000}))
    with pytest.raises(DataError, match=r"6 lines stand in many documents.*`stages\.s\.clean\.boilerplate=\{\}` cuts"):
        decided(tmp_path / "out", stage)


@pytest.mark.parametrize(("short", "warns"), [(24, False), (25, True)])
def test_more_than_three_tenths_dropped_is_a_warning_and_an_event(tmp_path: Path, short: int, warns: bool) -> None:
    texts = [*UNIQUE[: 80 - short], *(f"short {i}" for i in range(short))]
    file = config(tmp_path, texts, {"min_characters": 50, "exact_duplicates": True})
    run = load(file).run
    events = Rows()
    prepare_stages(run.stages, open_tokenizer(run), stores=run.stores, seed=run.seed, stream=Stream([events]))
    told = [event for event in events if event["kind"] == "cleaned_too_much"]
    assert len(told) == warns
    if warns:
        assert "31% were dropped of 80: 25 too short (measured 7 to 8, limit 50)" in told[0]["text"]
        assert "`stages.s.clean.min_characters=null`" in told[0]["text"]


def test_boilerplate_of_conversations_is_refused(tmp_path: Path) -> None:
    file = config(tmp_path, UNIQUE[:2], {"boilerplate": {}})
    assert load(file).run.stages[0].clean == CleanConfig(boilerplate=Boilerplate())
    with pytest.raises(ConfigError, match=r"stages\.s\.clean\.boilerplate: what many conversations share"):
        load(file, ["stages.s.task=sft"])
