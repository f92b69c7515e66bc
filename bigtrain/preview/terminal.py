"""A view as text: colours on a terminal, brackets around what is trained where there are none."""

from __future__ import annotations

from rich.text import Text

from bigtrain.observability.console import console
from bigtrain.observability.progress import contents, dropped, plural
from bigtrain.preview.batch import Lengths, Piece, SourceView, View

TRAINED, READ = "green", "bright_black"
BAR = 40  # characters of the longest bar


def show(view: View) -> None:
    """Print a stage's view."""
    out = console()
    stage = view.stage
    out.print(
        f"\n{stage.name} ({stage.task.name}), step {view.step} of 0 to {view.steps - 1}: "
        f"{plural(view.rows, 'sequence', 'sequences')} of {stage.sequence_length} tokens",
        style="bold",
    )
    told = [line for source in view.sources for line in _source(source, view.rows)]
    for line in (*summary(view), *told, *_histogram(view.lengths)):
        out.print(f"  {line}")
    coloured = out.color_system is not None
    legend = Text("  tokens     ").append("trained" if coloured else "[trained]", TRAINED if coloured else "")
    out.print(legend.append(", ").append("only read", READ if coloured else ""))
    for row, sequence in enumerate(view.sequences):
        out.print(f"\n  -- row {row}: {sequence.source}, sample {sequence.sample}")
        for piece in sequence.pieces:
            out.print(f"  -- {heading(piece)}")
            out.print(_tokens(piece, coloured))
        if sequence.padding:
            out.print(f"  -- {plural(sequence.padding, 'unused position', 'unused positions')}")
    hidden = view.rows - len(view.sequences)
    if hidden:
        out.print(f"\n  -- and {plural(hidden, 'row', 'rows')} more; --rows says how many are shown")


def heading(piece: Piece) -> str:
    """What stands over a piece of a document."""
    begins = "" if piece.whole else ", begun in an earlier sample"
    return f"document {piece.number}: {len(piece.tokens)} tokens, {piece.trained} trained{begins}"


def summary(view: View) -> list[str]:
    """Lines about the batch, and what cleaning did to the stage's documents."""
    told = [
        f"batch      {view.filled / view.positions:.1%} of its {view.positions:,} positions filled, "
        f"{view.supervised:,} trained targets ({view.supervised / view.positions:.1%})"
    ]
    if view.cleaned is not None:
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in view.cleaned["dropped"].items() if number)
        told.append(
            f"cleaned    {view.cleaned['kept']:,} of {view.cleaned['documents']:,} documents kept; "
            f"dropped: {dropped or 'none'}; examples in {view.cleaned['folder']}/report.json"
        )
    return told


def _source(source: SourceView, rows: int) -> list[str]:
    """Lines about a training store."""
    return [
        f"source     {contents(source.metadata)}",
        f"           {source.share:.1%} of the stage, which reads it {source.epochs:.3g} times; "
        f"{source.in_batch} of this batch's {rows} sequences; dropped or cut: {dropped(source.metadata) or 'none'}",
    ]


def _histogram(lengths: Lengths) -> list[str]:
    """Lines with a bar for each range of lengths."""
    most = max(documents for _, _, documents in lengths.ranges)
    told = f"median {lengths.median:g}, longest {lengths.longest:,}"
    lines = [f"lengths    of {lengths.documents:,} documents, in tokens: {told}"]
    for first, last, documents in lengths.ranges:
        bar = "#" * round(BAR * documents / most)
        lines.append(f"           {first:>9,} to {last:<9,} {documents:>9,} {bar}".rstrip())
    return lines


def _tokens(piece: Piece, coloured: bool) -> Text:
    text = Text()
    for words, trained in piece.runs:
        if coloured:
            text.append(words, TRAINED if trained else READ)
        else:
            text.append(f"[{words}]" if trained else words)
    return text
