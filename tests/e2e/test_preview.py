"""`bigtrain preview`: what it shows is what the batches hold."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from bigtrain.config import load
from bigtrain.data.batches import Batches
from bigtrain.data.types import IGNORE
from bigtrain.errors import ConfigError
from bigtrain.observability.stream import Stream
from bigtrain.pipeline.build import open_tokenizer, prepare_stages
from bigtrain.preview import preview
from bigtrain.preview.batch import view
from tests.support import bigtrain, small_config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(path of the run's file, what was printed when it was previewed first, path of the page)."""
    folder = tmp_path_factory.mktemp("preview")
    path = small_config(folder)
    config = yaml.safe_load(path.read_text())
    (folder / "odd.jsonl").write_text(
        "".join(json.dumps({"text": f"<b>tags & “quotes” {i}</b> " * 8}) + "\n" for i in range(40))
    )
    pretrain = config["stages"][0]
    pretrain["data"] = [
        {**pretrain["data"][0], "weight": 3},
        {"source": str(folder / "odd.jsonl"), "weight": 1},
    ]
    pretrain["global_batch_size"] = 16
    path.write_text(yaml.safe_dump(config))
    page = folder / "page.html"
    shown = bigtrain("preview", path, "--step", 2, "--rows", 16, "--html", page)
    assert (shown.returncode, shown.stderr) == (0, "")
    return path, shown.stdout, page


def views(path, step, rows):
    """Of each stage: (its batch, its view, its tokenizer)."""
    run = load(path, []).run
    tokenizer = open_tokenizer(run)
    data = prepare_stages(run.stages, tokenizer, stores=run.stores, seed=run.seed, stream=Stream())
    for stage in run.stages:
        batches = Batches(
            data[stage.name].train,
            data[stage.name].weights,
            seed=run.seed,
            global_batch_size=stage.global_batch_size,
            total_samples=data[stage.name].samples(stage),
            data_rank=0,
            data_size=1,
        )
        yield batches(step), view(stage, data[stage.name], tokenizer, run.seed, step, rows), tokenizer


def test_every_token_and_mark_is_that_of_the_batch(prepared):
    path, _, _ = prepared
    for batch, seen, tokenizer in views(path, step=2, rows=16):
        inputs, targets, positions = (batch.tensors[key] for key in ("input_ids", "targets", "position_ids"))
        assert seen.supervised == int((targets != IGNORE).sum())
        assert sum(piece.trained for row in seen.sequences for piece in row.pieces) == seen.supervised
        for i, row in enumerate(seen.sequences):
            length = inputs.shape[1]
            begins = (positions[i] == 0).nonzero().flatten().tolist()  # of documents, and of what is unused
            assert (row.padding > 0) == (len(begins) > len(row.pieces))
            assert begins[-1] + row.padding == length or row.padding == 0
            for piece, begin, end in zip(row.pieces, begins, [*begins[1:], length], strict=False):
                ids = [token.id for token in piece.tokens]
                assert ids[: end - begin] == inputs[i, begin:end].tolist()
                assert len(ids) - (end - begin) == int(targets[i, end - 1] != IGNORE)
                learned = [token.id for token in piece.tokens if token.trained]
                assert learned == [target for target in targets[i, begin:end].tolist() if target != IGNORE]
                spelt = re.sub(r"<0x[0-9A-F]{2}>", "", "".join(text for text, _ in piece.runs))  # of cut characters
                assert spelt == tokenizer.decode(ids).replace("\ufffd", "")
        assert sum(source.in_batch for source in seen.sources) == seen.rows == len(seen.sequences)


def test_the_terminal_shows_all_of_it(prepared):
    path, shown, _ = prepared
    for _, seen, _ in views(path, step=2, rows=16):
        assert f"{seen.stage.name} ({seen.stage.task.name}), step 2 of 0 to 5" in shown
        assert f"{seen.supervised:,} trained targets" in shown
        for row in seen.sequences:
            assert f"{row.source}, sample {row.sample}\n" in shown
            for piece in row.pieces:
                assert "".join(f"[{text}]" if trained else text for text, trained in piece.runs) in shown
    assert re.search(r"75\.0% of the stage, which reads it [\d.]+ times; 12 of this batch's 16 sequences", shown)
    assert re.search(r"25\.0% of the stage, which reads it [\d.]+ times; 4 of this batch's 16 sequences", shown)
    assert re.search(r"lengths    of [\d,]+ documents, in tokens: median", shown)
    assert "% full" in shown
    assert "cut to sequence_length" in shown


class Page(HTMLParser):
    """The text of the tokens of a page, and what it would load."""

    def __init__(self):
        super().__init__()
        self.tokens, self.loads, self._open = [], [], None

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.loads += [value for key, value in attributes if key in ("src", "href")]
        if tag in ("b", "span") and "title" in named:
            self.tokens.append([int(named["title"]), tag == "b", ""])
            self._open = tag

    def handle_endtag(self, tag):
        if tag == self._open:
            self._open = None

    def handle_data(self, data):
        if self._open:
            self.tokens[-1][2] += data


def test_the_page_shows_the_same_and_loads_nothing(prepared):
    path, _, page = prepared
    parser = Page()
    parser.feed(page.read_text())
    assert parser.loads == [] and "@import" not in page.read_text() and "url(" not in page.read_text()
    expected = [
        [token.id, token.trained, token.text]
        for _, seen, _ in views(path, step=2, rows=16)
        for row in seen.sequences
        for piece in row.pieces
        for token in piece.tokens
    ]
    assert parser.tokens == expected
    assert any("<" in text for _, _, text in expected)


def test_a_step_that_some_stages_lack_is_shown_of_the_others(prepared, capsys):
    path, _, _ = prepared
    run = load(path, ["stages.finetune.steps=2"]).run
    preview(run, stage=None, step=3, rows=0, html=None)
    told = capsys.readouterr().out
    assert "pretrain (pretrain), step 3 of 0 to 5" in told and "finetune (sft), step" not in told
    assert told.endswith("--step 3: stage finetune has steps 0 to 1.\n")
    with pytest.raises(ConfigError, match=r"^--step 3: stage finetune has steps 0 to 1\.$"):
        preview(run, stage="finetune", step=3, rows=0, html=None)


def test_chinese_text_is_shown_whole(tmp_path, capsys):
    """Its characters are several tokens each, and sequences begin and end within them."""
    texts = ["书很好，字迹清晰，孩子很喜欢，下次还买！", "房间很大，很舒服，很大的落地窗户，早餐也不错。"] * 30  # noqa: RUF001
    rows = [json.dumps({"text": f"{text}{i}"}) for i, text in enumerate(texts)]
    (tmp_path / "reviews.jsonl").write_text("\n".join(rows))
    config = load(small_config(tmp_path), [f"stages.pretrain.data.0.source={tmp_path}/reviews.jsonl"]).run
    config = config.model_copy(update={"stages": config.stages[:1]})
    page = tmp_path / "page.html"
    preview(config, stage=None, step=0, rows=5, html=page)
    shown, parser = capsys.readouterr().out, Page()
    parser.feed(page.read_text())
    assert "\ufffd" not in shown + page.read_text()
    assert "字迹清晰" in shown and "字迹清晰" in "".join(text for _, _, text in parser.tokens)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--step", 6], "--step 6: stage pretrain has steps 0 to 5.\n--step 6: stage finetune has steps 0 to 5."),
        (["--stage", "pretain"], "there is no such stage; did you mean `pretrain`?"),
        (["--html", "/dev/null/page.html"], "--html /dev/null/page.html: cannot be written"),
    ],
)
def test_what_is_not_there(prepared, options, told):
    path, _, _ = prepared
    refused = bigtrain("preview", path, *options)
    assert refused.returncode == 2
    assert told in refused.stderr
    assert "Traceback" not in refused.stderr
