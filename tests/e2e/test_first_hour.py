"""The first hour with texts of any script: cleaned, prepared, previewed, trained, evaluated and continued."""

# ruff: noqa: RUF001 - Chinese punctuation

import itertools
import json
from pathlib import Path

import pytest

from bigtrain import evaluate, generate, load_model, run
from bigtrain.config import load
from bigtrain.preview import preview
from bigtrain.run_folder import RunFolder
from tests import tiny

PARTS = {
    "chinese": ("房间 早餐 服务 位置 这本书 屏幕", "很大 很好 不错 一般 太慢了 很漂亮", "", "，", "。"),
    "arabic": ("الغرفة الفطور الخدمة الكتاب", "كبيرة جيدة عادية جميلة👍🏽", " ", "، ", "."),
}


def reviews(script):
    """Short texts of which no two are the same."""
    things, words, space, comma, end = PARTS[script]
    said = [f"{thing}{space}{word}" for thing in things.split() for word in words.split()]
    return [comma.join(three) + end for three in itertools.islice(itertools.combinations(said, 3), 0, 300, 2)]


@pytest.mark.parametrize("script", sorted(PARTS))
def test_reviews_of_any_script_go_all_the_way(tmp_path, capsys, script):
    texts = reviews(script)
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = tiny.config(
        tmp_path,
        data=[{"source": str(tmp_path / "reviews.jsonl")}],
        held_out=0.1,
        evaluate={"sequences": 8},
        clean={"repair": True, "redact": ["email", "card"], "repetition": {}, "exact_duplicates": True},
        prompts=[texts[0][:4]],
        export=True,
    )
    config = load(file).run
    preview(config, stage=None, step=0, rows=2, html=tmp_path / "page.html")
    shown = capsys.readouterr().out
    assert "\ufffd" not in shown + (tmp_path / "page.html").read_text()
    assert any(text[:6] in shown for text in texts)

    result = run(file)
    assert result.finished and result.stages["p"].held_out_loss > 0
    metadata = RunFolder(config.folder).metadata()["stages"]["p"]
    stores = tmp_path / "runs" / "stores"
    report = json.loads((stores / Path(metadata["cleaned"]).name / "report.json").read_text())
    assert report["kept"] + report["held_out"] == len(texts) and report["warning"] is None
    assert metadata["answers"][0]["prompt"] == texts[0][:4]
    assert evaluate(result.folder).loss == pytest.approx(result.stages["p"].held_out_loss, abs=1e-6)
    models = [load_model(where) for where in (result.folder, result.stages["p"].export)]
    answers = [generate(model, texts[1][:5], max_new_tokens=8, temperature=0) for model in models]
    assert answers[0] == answers[1]
