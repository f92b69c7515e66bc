"""Each command that prints what came from outside: names of files, rows, templates, models."""

import re
import sys

import pytest

from bigtrain import cli
from bigtrain.config import load, load_config
from bigtrain.config.environment import tell
from bigtrain.errors import ConfigError, DataError
from bigtrain.inference import evaluate, generate
from bigtrain.inference import load as loading
from bigtrain.launching.dry_run import dry_run
from bigtrain.launching.launch import Asked, launch
from bigtrain.preview.batch import Lengths, Piece, Sequence, SourceView, Token, View
from bigtrain.preview.terminal import show
from tests.support import small_config

EVIL = "evil\x1b[2J\x1b]0;title\x9b31m\u202e"
SPELT = r"evil\x1b[2J\x1b]0;title\x9b31m\u202e"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def command(monkeypatch, capsys, *arguments):
    """What the command prints on its two streams, and its exit code; nothing of it controls a terminal."""
    monkeypatch.setattr(sys, "argv", ["bigtrain", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to be put back: the command guards them
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(cli.atexit, "register", lambda _: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert not CONTROL.search(out + err)
    return out, err, left.value.code


def test_names_of_files_and_values_in_messages(tmp_path, monkeypatch, capsys):
    _, err, code = command(monkeypatch, capsys, "run", tmp_path / EVIL)
    assert code == 2 and SPELT in err
    path = small_config(tmp_path).rename(tmp_path / f"{EVIL}.yaml")
    _, err, code = command(monkeypatch, capsys, "run", path, r'stages.pretrain.data=[{source: "evil\e[2J"}]')
    assert code == 2 and r"evil\x1b" in err
    path.write_text(path.read_text().replace("name: small", f"nome: '{EVIL[:4]}'\n{EVIL[:4]}: \"\\e[2J\""))
    _, err, code = command(monkeypatch, capsys, "run", path)
    assert code == 2 and SPELT in err


def test_what_a_rank_says_of_a_row(capsys, monkeypatch):
    monkeypatch.delenv("BIGTRAIN_FAILURE_FILE", raising=False)
    tell(str(DataError(f"{EVIL}.jsonl, line 3: column `{EVIL}` holds\nno text")), 2)
    assert capsys.readouterr().err == f"{SPELT}.jsonl, line 3: column `{SPELT}` holds\nno text\n"


def test_answers_keep_their_lines(monkeypatch, capsys):
    def answer(opened, prompt, *, show, **_):
        for piece in ("one\n", "\ttwo\x1b", "[2J\r", EVIL):
            show(piece)

    monkeypatch.setattr(loading, "load_model", lambda where: where)
    monkeypatch.setattr(generate, "generate", answer)
    out, _, code = command(monkeypatch, capsys, "generate", "somewhere", "a prompt")
    assert code == 0 and out == f"one\n\ttwo\\x1b[2J\\r{SPELT}\n"


def test_what_is_evaluated(monkeypatch, capsys):
    found = evaluate.Evaluation({"loss": 1.0, "accuracy": 0.5, "targets": 10}, f"a model, on {EVIL}")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: found)
    out, _, code = command(monkeypatch, capsys, "eval", "somewhere")
    assert code == 0 and SPELT in out


def test_dry_runs_and_scripts(tmp_path, monkeypatch, capsys):
    path = small_config(tmp_path).rename(tmp_path / f"{EVIL}.yaml")
    dry_run(load(path, [f"stages.pretrain.prompts=['{EVIL[:4]}\\n']", 'stages.pretrain.prompts.0="\\e[2J"']))
    out = capsys.readouterr().out
    assert f"{SPELT}.yaml" in out and r"\u001b[2J" in out and not CONTROL.search(out)
    with pytest.raises(ConfigError, match="cannot show control characters"):
        launch(Asked(str(path), (), "torchrun", processes=1), print_only=True)


@pytest.mark.parametrize("coloured", [False, True])
def test_previews(tmp_path, monkeypatch, capsys, coloured):
    if coloured:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    stage = load_config(small_config(tmp_path)).stages[0]
    counted = {"documents": 1, "tokens": 1, "sequences": 1, "dropped": {EVIL: 1}, "cut": 0}
    counted |= {"examples": {EVIL: EVIL}, "documents_are": "all", "parts": {}, "cut_tokens": 0, "left_over": 0}
    token = Token(1, EVIL, True)
    view = View(
        stage=stage,
        step=0,
        steps=1,
        rows=1,
        supervised=1,
        filled=1,
        positions=1,
        sources=[SourceView({"source": EVIL, **counted}, 1.0, 1.0, 1)],
        lengths=Lengths([(1, 1, 1)], 1, 1.0, 1),
        sequences=[Sequence(EVIL, 0, [Piece(0, True, [token], [(f"{EVIL}\n\tmore", True)])], 0)],
        cleaned=None,
    )
    show(view)
    out = capsys.readouterr().out
    assert ("\x1b[32m" in out) == coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out) if coloured else out
    assert plain.count(SPELT) == 5 and re.search(rf"{re.escape(SPELT)}\n +more", plain)
    assert not CONTROL.search(plain)


def test_a_failing_rank_is_told_of_once_and_the_exit_code_stays(tmp_path, monkeypatch, capsys):
    from bigtrain.launching import spawn

    failures = [tmp_path / f"rank-{rank}.json" for rank in range(2)]
    monkeypatch.setenv("BIGTRAIN_FAILURE_FILE", str(failures[1]))
    tell(f"rank 1 failed:\n{EVIL} https://user:hunter2@host", 1)
    assert capsys.readouterr() == ("", "")
    assert spawn._explain([-15, 1], [None, 1], failures) == (1, f"rank 1 failed:\n{EVIL} https://user:***@host")
    monkeypatch.setenv("BIGTRAIN_FAILURE_FILE", str(tmp_path / "gone" / "rank-0.json"))
    tell("nobody waits", 1)
    assert capsys.readouterr().err == "nobody waits\n"
    for code, expected in ((2, 2), (1, 1), (7, 1)):  # it had told what it could
        given, reason = spawn._explain([code, -15], [code, None], [tmp_path / "a", tmp_path / "b"])
        assert given == expected and f"rank 0 ended with exit code {code}" in reason


def test_a_rank_whose_failure_file_cannot_be_written_says_it_itself(tmp_path, monkeypatch, capsys):
    (tmp_path / "rank-0.partial").symlink_to("/dev/full")
    monkeypatch.setenv("BIGTRAIN_FAILURE_FILE", str(tmp_path / "rank-0.json"))
    tell("why it ends", 2)
    assert capsys.readouterr().err == "why it ends\n"
    assert list(tmp_path.glob("*.json")) == []
