"""The commands: parse, call, print."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import bigtrain
from bigtrain.errors import BigtrainError, ConfigError, one_line
from bigtrain.terminal import guard, guarded, say, show

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="The run's file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Like stages.pretrain.optimizer.lr=1e-4", show_default=False),
]


@contextmanager
def _product() -> Iterator[None]:
    """Around a command that is there for what it prints. Raises BigtrainError if that could not be written; a reader
    that has gone, like `head`, has what it wanted."""
    out = guarded(sys.stdout)
    yield
    if out.failure is not None and not isinstance(out.failure, BrokenPipeError):
        raise BigtrainError(f"standard output cannot be written: {one_line(out.failure)}.")


def _version(asked: bool) -> None:
    if asked:
        with _product():
            show(f"bigtrain {bigtrain.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train large models from one file."""


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    restart: Annotated[
        str | None, typer.Option(help="Begin this stage anew, and those that follow from it; the old is set aside.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run amounts to, and the values given and where.")
    ] = False,
    every_value: Annotated[bool, typer.Option("--all", help="With --dry-run: the defaults too.")] = False,
) -> None:
    """Run all stages of CONFIG; started again, it continues where it was."""
    from bigtrain.config import load

    if every_value and not dry_run:
        raise ConfigError("--all: it says what --dry-run prints; give both.")
    if dry_run:
        loaded = load(config, overrides or [])
        from bigtrain.launching.dry_run import dry_run as tell

        with _product():
            return tell(loaded, every_value)
    from bigtrain.launching.start import load_here, start

    raise typer.Exit(start(load_here(config, overrides or []), restart))


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option(help="That share the work on this machine. Default: one for every 8 cores.", min=1)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also read the token stores to the end and compare their checksums.")
    ] = False,
) -> None:
    """Turn the sources of CONFIG into token stores, ahead of its run; started again, it continues where it was."""
    from bigtrain.config import load
    from bigtrain.launching.preparing import prepare as make

    raise typer.Exit(make(load(config, overrides or [], here=True).run, processes, verify))


@app.command()
def preview(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="The stage to look at; default: all.")] = None,
    step: Annotated[int, typer.Option(help="The step whose batch is shown, from 0.", min=0)] = 0,
    rows: Annotated[int, typer.Option(help="Sequences of the batch that are shown.", min=0)] = 2,
    html: Annotated[Path | None, typer.Option(help="Write the same as one page.", metavar="FILE")] = None,
) -> None:
    """Show what the model will see: tokens and which are trained, documents, sources, lengths, what was dropped."""
    from bigtrain.config import load
    from bigtrain.preview import preview as look

    with _product():
        look(load(config, overrides or [], here=True).run, stage=stage, step=step, rows=rows, html=html)


@app.command(name="import")
def import_state(
    config: Config,
    folder: Annotated[
        Path,
        typer.Argument(help="A Trainer's checkpoint-N, or a universal checkpoint of DeepSpeed.", show_default=False),
    ],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="The stage that goes on from it; default: the first.")] = None,
) -> None:
    """Continue a Hugging Face Trainer's or DeepSpeed's checkpoint with CONFIG: weights, Adam's moments and step."""
    from bigtrain.config import load
    from bigtrain.pipeline.import_state import import_state as take

    say(take(load(config, overrides or [], here=True).run, folder, stage))


@app.command()
def launch(
    config: Annotated[str, typer.Argument(help="The run's file.")],
    launcher: Annotated[
        str, typer.Option("--with", help="torchrun, deepspeed, accelerate, slurm or kubernetes.", metavar="LAUNCHER")
    ],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines that take part.")] = 1,
    processes: Annotated[
        int | None,
        typer.Option(
            help="On each node. Default: parallel.processes, where there is one node; if that is auto, one per GPU of "
            "this machine, and 8 for slurm and kubernetes."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="torchrun and accelerate on several nodes: where they meet."),
    ] = None,
    hostfile: Annotated[
        str | None, typer.Option(help="deepspeed on several nodes: a file with a line `NAME slots=GPUS` for each.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="kubernetes: a container image with bigtrain in it.")] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the script instead of starting it.")] = False,
) -> None:
    """Start CONFIG with another launcher, on one machine or many."""
    from bigtrain.launching.launch import Asked
    from bigtrain.launching.launch import launch as start

    asked = Asked(config, tuple(overrides or ()), launcher, nodes, processes, head, hostfile, image)
    with _product():
        code = start(asked, print_only)
    raise typer.Exit(code)


@app.command()
def bench(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps to time.", min=1)] = 20,
    stage: Annotated[str | None, typer.Option(help="The stage to time; default: the first.")] = None,
) -> None:
    """Time the steps of CONFIG: tokens per second, MFU, and where the time goes. Trains nothing that is kept."""
    from bigtrain.config import load
    from bigtrain.launching.bench import bench as measure

    with _product():
        code = measure(load(config, overrides or [], here=True).run, stage, steps)
    raise typer.Exit(code)


@app.command()
def save(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run that is training.")],
) -> None:
    """Ask a running job for a checkpoint now, and wait until it is complete."""
    from bigtrain.launching.asking import ask_to_save

    say(str(ask_to_save(run_dir)))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, or RUN_DIR/STAGE.")],
    to: Annotated[Path | None, typer.Option(help="The folder to write; default RUN_DIR/STAGE/export.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: the run's precision.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights (optimizer.ema).")] = False,
) -> None:
    """Write a folder that transformers' from_pretrained opens."""
    from bigtrain.inference.export import export as write
    from bigtrain.pretrained import quiet

    quiet()
    say(str(write(run_dir, to=to, dtype=dtype, ema=ema)))


@app.command()
def generate(
    where: Annotated[str, typer.Argument(help="A run's folder, RUN_DIR/STAGE, a Hugging Face folder or a Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to answer or to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer in tokens, at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chat: Annotated[
        bool | None, typer.Option(help="Speak through the chat template; default: for finetuned stages.")
    ] = None,
) -> None:
    """Answer PROMPT with a trained model."""
    from bigtrain.inference.generate import generate as answer
    from bigtrain.inference.load import load_model
    from bigtrain.pretrained import quiet

    quiet()
    with _product():
        answer(
            load_model(where),
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=chat,
            show=lambda piece: show(piece, end=""),
        )
        show("")


@app.command(name="eval")
def evaluate(
    where: Annotated[str, typer.Argument(help="A run's folder, RUN_DIR/STAGE, a Hugging Face folder or a Hub id.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Sources of documents, instead of the run's held-out ones.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option(help="Also write each document's place, beginning and loss as JSONL.", metavar="FILE")
    ] = None,
) -> None:
    """The task's metrics on held-out documents: loss, perplexity, accuracy and the like."""
    from bigtrain.config.load import source
    from bigtrain.inference.evaluate import evaluate as measure
    from bigtrain.pretrained import quiet

    quiet()
    found = measure(where, [source(text, "--data") for text in data] if data else None, documents=documents)
    with _product():
        say(f"{found.what}: {found.metrics['targets']} targets")
        say("   ".join(f"{name} {value:.6f}" for name, value in found.metrics.items() if name != "targets"))
        if documents is not None:
            say(f"each document: {documents}")


def main() -> None:
    """The `bigtrain` command. Exit codes: 0 done, 1 the run failed, 2 the user's input is wrong, 75 asked to stop."""
    guard()
    # else Python looks through all of torch and transformers for cycles as it ends, for 1.5 s
    atexit.register(gc.freeze)
    try:
        app()
    except BigtrainError as error:
        _end(str(error), error.exit_code)
    except Exception:  # noqa: BLE001 - told in full, with the rank that it happened on
        rank = os.environ.get("RANK")
        _end((f"rank {rank} failed:\n" if rank else "") + traceback.format_exc(), 1)


def _end(text: str, code: int) -> NoReturn:
    """Tell why the process ends, and end it. A rank leaves at once: taking its group down may abort."""
    from bigtrain.config.environment import tell

    tell(text, code)
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
