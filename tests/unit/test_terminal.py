"""What is printed holds no control characters and no secrets, and a stream that is lost ends nothing."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import bigtrain
from bigtrain.errors import BigtrainError, DamagedError, DataError
from bigtrain.masking import MASK, masked, masked_values
from bigtrain.observability.console import console
from bigtrain.observability.events import Preparing, Tokenizing
from bigtrain.observability.progress import Progress
from bigtrain.terminal import Guarded, guarded, printable, say, show

FULL = Path("/dev/full")
ATTACKS = {
    "\x1b[2J\x1b[31mred": r"\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x9b31mred": r"\x9b31mred",  # the same as ESC [ in one character
    "over\rwritten\b": r"over\rwritten\x08",
    "\u202eevil\u2066": r"\u202eevil\u2066",
    "half\ud800": r"half\ud800",
    "nul\0 del\x7f": r"nul\x00 del\x7f",
}
KEPT = "ordinary\ttext\nof é, 漢字, 👩\u200d💻 and \u05d0\n"


@pytest.mark.parametrize("text", ATTACKS)
def test_control_characters_are_spelt(text):
    assert printable(text) == ATTACKS[text]


def test_other_text_stays():
    assert printable(KEPT) == KEPT


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_that_is_printed_holds_control_characters(text, capsys):
    say(text)
    show(text, end="")
    say(text, error=True)
    out, err = capsys.readouterr()
    assert out == f"{ATTACKS[text]}\n{ATTACKS[text]}"
    assert err == f"{ATTACKS[text]}\n"


@pytest.mark.parametrize("text", [text for text in ATTACKS if not set(text) & set("\a\b\r")])  # rich drops these
def test_a_console_prints_its_own_colours_and_nobody_elses(text):
    file = io.StringIO()
    out = console(file, force_terminal=True, color_system="standard", width=100)
    table = Table()
    table.add_column(text)
    table.add_row(text)
    out.print(Text(text, "red"))
    out.print(f"[bold]:smile:{text}", style="bold")
    out.print(table)
    assert file.getvalue().count(ATTACKS[text]) == 4
    assert "\x1b[31m" in file.getvalue() and "[bold]:smile:" in file.getvalue()
    assert text not in file.getvalue()


def test_progress_prints_no_control_characters_of_an_event():
    for terminal in (False, True):
        file = io.StringIO()
        file.isatty = lambda terminal=terminal: terminal
        progress = Progress(file)
        progress(Preparing(what="data of \x1b[31mstage"))
        event = {"source": "evil\x1b[2J.jsonl", "documents_are": "all", "documents": 1, "text_bytes": 1e6, "tokens": 1}
        rates = dict.fromkeys(("documents_per_second", "text_bytes_per_second", "tokens_per_second"), 1.0)
        progress(Tokenizing(expected_bytes=None, seconds_left=None, **event, **rates))
        assert r"\x1b[31mstage" in file.getvalue() and r"evil\x1b[2J.jsonl" in file.getvalue()
        assert "\x1b[31m" not in file.getvalue() and "\x1b[2J" not in file.getvalue()


def test_what_an_encoding_lacks_is_spelt(tmp_path):
    for encoding, expected in (("ascii", r"2 \xb7 \u6f22 \x1b"), ("latin-1", "2 · \\u6f22 \\x1b")):
        path = tmp_path / encoding
        with path.open("w", encoding=encoding) as file:
            console(file).print("2 · 漢 \x1b")
        assert path.read_text(encoding=encoding) == expected + "\n"


def lost_streams(tmp_path):
    """(stream, what its failure is) of each way in which a stream can be lost."""
    reader, writer = os.pipe()
    os.close(reader)
    closed = (tmp_path / "closed").open("w")
    closed.close()
    return [
        (FULL.open("w"), OSError),
        (os.fdopen(writer, "w"), BrokenPipeError),
        (closed, ValueError),
    ]


def test_a_stream_that_is_lost_says_so_and_raises_nothing(tmp_path, monkeypatch):
    for stream, kind in lost_streams(tmp_path):
        lost = guarded(stream)
        assert guarded(lost) is lost and lost.failure is None
        monkeypatch.setattr(sys, "stdout", lost)
        show("one")
        assert isinstance(lost.failure, kind)
        say("two")
        print("by a library", flush=True)
        console().print("three")
    none = Guarded(None)
    none.write("x")
    none.flush()
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it for one that was closed before the start
    say("x", error=True)


def test_progress_tells_its_stream_that_it_is_lost(tmp_path):
    for stream, kind in lost_streams(tmp_path):
        with pytest.raises(kind):
            Progress(stream)(Preparing(what="data"))


def command(arguments, environment=None, **streams):
    """The exit code of the command, whose Python is told to say what goes wrong as it ends."""
    process = subprocess.run(
        [sys.executable, "-m", "bigtrain", *arguments], env={**os.environ, **(environment or {})}, timeout=60, **streams
    )
    return process.returncode


def test_exit_codes_without_the_streams(tmp_path):
    """Wrong input is 2 whatever happens to stderr; lost output is a failure where it was the purpose, but for a reader
    that had enough."""
    wrong = ["run", str(tmp_path / "no.yaml")]
    with FULL.open("w") as full:
        assert command(wrong, stderr=full, stdout=full) == 2
    closed = subprocess.run(["sh", "-c", f'"{sys.executable}" -m bigtrain run no.yaml 2>&- >&-'], cwd=tmp_path)
    assert closed.returncode == 2
    closed = subprocess.run(["sh", "-c", f'"{sys.executable}" -m bigtrain --help 2>&- >&-'])
    assert closed.returncode == 0
    with (tmp_path / "errors").open("w") as errors, FULL.open("w") as full:
        assert command(["--version"], stdout=full, stderr=errors) == 1
    assert (tmp_path / "errors").read_text() == "standard output cannot be written: No space left on device.\n"
    reader, writer = os.pipe()
    os.close(reader)
    assert command(["--help"], stdout=writer, environment={"PYTHONIOENCODING": "ascii"}) == 0
    os.close(writer)


SECRETS = [
    ("https://user:hunter2@host/x.jsonl?page=2", "https://user:***@host/x.jsonl?page=2", "hunter2"),
    ("https://user:hun@ter2@host/x", "https://user:***@host/x", "ter2"),
    ("s3://key:wJalr/XUt+n@bucket/a@b.jsonl", "s3://key:***@bucket/a@b.jsonl", "XUt"),
    ("s3://AKIAIOSFODNN7EXAMPLE:secret@bucket/a", "s3://***:***@bucket/a", "AKIA"),
    ("zip://*.jsonl::https://u:pw@host/a.zip", "zip://*.jsonl::https://u:***@host/a.zip", "pw"),
    ("https://ghp_0123456789abcdef@github.com/x", "https://***@github.com/x", "ghp_"),
    ("https://h/x?a=1&token=t0p&b=2", "https://h/x?a=1&token=***&b=2", "t0p"),
    ("https://h/x?key=t0p and more", "https://h/x?key=*** and more", "t0p"),
    ("https://h/x?sv=1&sig=a%2Fb%3D", "https://h/x?sv=1&sig=***", "a%2Fb"),
    (
        "https://h/x?X-Amz-Credential=A%2F1&X-Amz-Signature=ff'",
        "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***'",
        "ff",
    ),
    ("[{source: https://h/?token=t0p}, {a: 1}]", "[{source: https://h/?token=***}, {a: 1}]", "t0p"),
    ("HF_TOKEN=abc: refused", "HF_TOKEN=*** refused", "abc"),
    (f"401 for hf_{'a' * 34}.", "401 for ***.", "hf_"),
    ("Authorization: Bearer abc.def", "Authorization: Bearer ***", "abc"),
]
PLAIN = [
    "http://host:8080/a@2x.png",
    "http://[::1]:80/a@b",
    "https://host/x: cannot be opened, mail me@example.com",
    "s3://bucket/key=1/part.parquet",
    "zip://*.jsonl::s3://bucket/a.zip",
    "stages.pretrain.optimizer.lr=1e-4",
    "the token store of model.tokenizer; the row with key 17",
]


@pytest.mark.parametrize(("text", "expected", "secret"), SECRETS)
def test_secrets_are_masked(text, expected, secret):
    assert masked(text) == masked(masked(text)) == expected
    assert secret not in expected
    assert masked_values({"a": [text, 1, None], "b": {"c": text}}) == {"a": [expected, 1, None], "b": {"c": expected}}


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


def test_values_of_secret_variables_are_masked(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecretvalue")
    monkeypatch.setenv("BENCH_TOKEN_COUNT", "notasecretvalue")
    assert masked("signed with verysecretvalue, notasecretvalue") == f"signed with {MASK}, notasecretvalue"


def test_errors_hold_no_secrets(capsys):
    for kind in (BigtrainError, DataError):
        assert str(kind("https://u:hunter2@h/x: gone")) == "https://u:***@h/x: gone"
    assert "hunter2" not in str(DamagedError("x", "https://u:hunter2@h/x"))
    say("https://u:hunter2@h/x")
    assert capsys.readouterr().out == "https://u:***@h/x\n"


def test_everything_is_printed_in_one_place():
    """`print`, a console of its own and the standard streams are for `terminal` and `console` only."""
    root = Path(bigtrain.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).as_posix() in ("terminal.py", "observability/console.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "Console", "typer.echo", "rprint"):
                found.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write"):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []
