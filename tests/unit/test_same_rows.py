"""The same rows give the same documents, in whatever format they lie, and whatever else stands in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from bigtrain.config.schema import SourceConfig
from bigtrain.data.sources import documents
from bigtrain.data.tally import Tally
from bigtrain.errors import DataError
from bigtrain.tasks.sft import Sft

Rows = list[dict[str, Any]]
DEEP = 20_000  # brackets; Python's reader gives up long before


def spelt(row: dict[str, Any], indent: int | None = None) -> str:
    """JSON of a row; `odd` stands there as it is spelt."""
    plain = {name: value for name, value in row.items() if name != "odd"}
    text = json.dumps(plain, indent=indent)
    return text if "odd" not in row else text.rstrip("}\n") + ("," if plain else "") + f'"odd": {row["odd"]}}}'


def lines(file: Path, rows: Rows) -> None:
    file.write_text("".join(f"{spelt(row)}\n" for row in rows))


def one_list(file: Path, rows: Rows) -> None:
    file.write_text(f"[{','.join(spelt(row) for row in rows)}]")


def pretty_list(file: Path, rows: Rows) -> None:
    file.write_text(f"\n[\n  {','.join(spelt(row, 2) for row in rows)}\n]\n", encoding="utf-8-sig")


def one_after_another(file: Path, rows: Rows) -> None:
    file.write_text("\n".join(spelt({"a": None} | row, 1) for row in rows))


def wrapped(file: Path, rows: Rows) -> None:
    rest = json.dumps({"version": 1, "data": [{"text": 'no", ]}'}], "nested": {"rows": []}})
    file.write_text(f'{rest[:-1]}, "rows": [{", ".join(spelt(row) for row in rows)}], "after": {{}}}}')


def table(rows: Rows) -> pa.Table:
    columns = dict.fromkeys(name for row in rows for name in row if name != "odd")
    types = {"text": pa.string(), "key": pa.string(), "n": pa.float64()}
    map_ = pa.array([[("a", 1)]] * len(rows), pa.map_(pa.string(), pa.int32()))
    arrays = {name: pa.array([row.get(name) for row in rows], types[name]) for name in columns}
    return pa.table(arrays | {"map": map_})


def a_parquet(file: Path, rows: Rows) -> None:
    parquet.write_table(table(rows), file, row_group_size=2)


def an_arrow_file(file: Path, rows: Rows) -> None:
    with ipc.new_file(file, (found := table(rows)).schema) as writer:
        writer.write_table(found, max_chunksize=2)


def an_arrow_stream(file: Path, rows: Rows) -> None:
    with ipc.new_stream(file, (found := table(rows)).schema) as writer:
        writer.write_table(found.slice(0, 0))
        writer.write_table(found)


def a_feather(file: Path, rows: Rows) -> None:
    feather.write_feather(table(rows), file)


def saved(file: Path, rows: Rows) -> None:
    datasets.Dataset(table(rows).drop(["map"])).save_to_disk(file)


JSON_FORMS: list[tuple[str, Callable[[Path, Rows], None], dict[str, Any]]] = [
    *((f"a.{kind}", lines, {}) for kind in ("jsonl", "jsonlines", "ndjson", "jl", "json")),
    ("list.json", one_list, {}),
    ("pretty.json", pretty_list, {}),
    ("after.json", one_after_another, {}),
    ("wrapped.json", wrapped, {"field": "rows"}),
]
TABLES: list[tuple[str, Callable[[Path, Rows], None], dict[str, Any]]] = [
    ("a.parquet", a_parquet, {}),
    ("file.arrow", an_arrow_file, {}),
    ("stream.arrow", an_arrow_stream, {}),
    ("a.feather", a_feather, {}),
    ("saved", saved, {}),
]


def read(source: Path, **fields: Any) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(key and text of each document, what is left out)."""
    tally = Tally()
    try:
        rows = list(documents(SourceConfig(source=str(source), on_error="skip", **fields), (("text",),), tally))
    except DataError as error:
        if "no row can be used" not in str(error):
            raise
        rows = []
    return [(row["key"], row["text"]) for row in rows], tally.dropped


ODD = st.sampled_from(["9" * 5000, "NaN", "-Infinity", "1e999", "[" * DEEP + "]" * DEEP, '{"a": {"b": [1, {}]}}'])
MORE = {
    "key": st.text(max_size=3) | st.none(),
    "n": st.floats() | st.none(),
    "odd": ODD,
}
ROWS = st.lists(
    st.fixed_dictionaries({"text": st.text(max_size=20) | st.none()}, optional=MORE), min_size=1, max_size=6
)


@given(rows=ROWS)
@example(rows=[{"text": 'a\\" ] } [ {'}, {"text": "\u2028\x00\ufeff"}, {"text": "", "odd": "9" * 5000}])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_formats_give_the_same_documents(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    folder = tmp_path_factory.mktemp("rows")
    found = {}
    for name, write, fields in [*JSON_FORMS, *TABLES]:
        write(folder / name, rows)
        found[name] = read(folder / name, **fields)
    expected = found["a.jsonl"]
    assert [text for _, text in expected[0]] == [row["text"] for row in rows if row["text"] is not None]
    for name, documents_ in found.items():
        assert documents_ == expected, name


BROKEN = {
    '{"text": "half a pair \\ud83d"}': "with half of a surrogate pair",
    '{"text": 7}': "with a column that is no text",
    f'{{"text": {"9" * 5000}}}': "not JSON",
    f'{{"text": {"[" * DEEP}{"]" * DEEP}}}': "not JSON",
    '{"text": "a", "n": 1.}': "not JSON",
    '{"text": "a",}': "not JSON",
    '{"text": "\\x"}': "not JSON",
    '["text"]': "not a JSON object",
    "7": "not a JSON object",
    '{"txt": "a"}': "without a column that the task reads",
    '{"text": "a", "key": "\\udc00"}': "with half of a surrogate pair",
    f'{{"text": "{"x" * 200}"}}': "longer than max_characters",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_row_is_left_out_alone(tmp_path: Path, broken: str) -> None:
    """In a list of rows as in lines of them: what follows it is read, and it is named."""
    parts = ['{"text": "first"}', broken, '{"text": "last ✓"}']
    forms = {"a.jsonl": "\n".join(parts), "b.json": f"[{','.join(parts)}]", "c.json": f'{{"d":[{", ".join(parts)}]}}'}
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        fields: dict[str, Any] = {"max_characters": 100} | ({"field": "d"} if name == "c.json" else {})
        documents_, dropped = read(tmp_path / name, **fields)
        assert [text for _, text in documents_] == ["first", "last ✓"], name
        assert dropped == {BROKEN[broken]: 1}, name
        with pytest.raises(DataError, match=r"a\.jsonl:2: |\.json, row 1: "):
            list(documents(SourceConfig(source=str(tmp_path / name), **fields), (("text",),)))


def test_bytes_that_are_no_text_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "\xff"}, {"text": "b\xc3\xa9"}]')
    assert [text for _, text in read(tmp_path / "a.json")[0]] == ["a", "bé"]
    assert read(tmp_path / "a.json")[1] == {"not UTF-8": 1}
    binary = pa.array([b"a", b"\xff", b"b"], pa.binary())
    parquet.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), 3, binary.buffers())}), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet") == (read(tmp_path / "a.parquet")[0], Counter({"not UTF-8": 1}))
    assert [text for _, text in read(tmp_path / "a.parquet")[0]] == ["a", "b"]
    with pytest.raises(DataError, match=r"a\.parquet, row 1: is not UTF-8"):
        list(documents(SourceConfig(source=str(tmp_path / "a.parquet")), (("text",),)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b]', r"row 1: is not JSON: the file ends in it. What follows it cannot be read"),
        ('[{"text": "a}, {"text": "b"}, {"text": "c"}]', r"row 0: is not JSON: the file ends in it"),
        ('[{"text": "a}, {"text": b"}, {"text": "c"}]', r"row 0: is not JSON: a quote is missing or too many"),
        ('[{"text": "a"}, {"text": ["b"}]', r"row 1: is not JSON: a bracket is closed by \}"),
        ('[{"text": "a"} {"text": "b"}]', r"row 0: is not JSON: after it there is neither a comma nor an end"),
        ('[{"text": "a"},]', r"row 1: is not JSON: there is nothing before \]"),
        ('[{"text": "a"}] [{"text": "b"}]', r"holds more after its list of rows"),
    ],
)
def test_a_list_whose_rows_cannot_be_told_apart_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """Leaving rows out would lose an unknown number of them."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"text": "a"}]}', r"there is no field `rows` in its object; known here: data"),
        ('{"row": 1, "data": []}', r"no field `rows` in its object; did you mean `row`"),
        ('{"rows": {"text": "a"}}', r"its field `rows` is no list of rows"),
        ('[{"text": "a"}]', r"is no object with a field `rows`; remove `field`"),
        ("{", r"no field `rows`"),
    ],
)
def test_a_field_that_is_not_there(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json", field="rows")
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"`field` is for files of JSON"):
        read(tmp_path / "a.csv", field="rows")


def test_wrapped_rows_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"data": [{"text": "a"}]}')
    with pytest.raises(DataError, match=r"If the rows are the list in `data`, write `field: data`"):
        list(documents(SourceConfig(source=str(tmp_path / "a.json")), (("text",),)))


def test_a_column_that_is_not_read_is_not_opened(tmp_path: Path) -> None:
    """Its pages may be damaged."""
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"], "other": ["c" * 99, "d" * 99]}), file, use_dictionary=False)
    page = parquet.ParquetFile(file).metadata.row_group(0).column(1).data_page_offset
    whole = file.read_bytes()
    file.write_bytes(whole[:page] + b"\xff" * 16 + whole[page + 16 :])
    with pytest.raises(OSError):
        parquet.read_table(file)
    assert [text for _, text in read(file)[0]] == ["a", "b"]


def test_a_row_has_the_columns_that_are_not_null(tmp_path: Path) -> None:
    """A table has every column in every row."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows: Rows = [{"messages": messages}, {"prompt": "p", "completion": "c"}, {"instruction": "i", "output": "o"}]
    lines(tmp_path / "a.jsonl", rows)
    parquet.write_table(pa.Table.from_pylist([dict.fromkeys(name for r in rows for name in r) | r for r in rows]),
                        tmp_path / "a.parquet")  # fmt: skip
    spelt_, in_a_table = (
        [{name: value for name, value in row.items() if name not in ("where", "key")} for row in found]
        for found in (
            documents(SourceConfig(source=str(tmp_path / name)), Sft.columns) for name in ("a.jsonl", "a.parquet")
        )
    )
    assert spelt_ == in_a_table and len(spelt_) == 3


# CSV.


def test_a_quote_that_is_never_closed_costs_one_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    rows = [f'{i},"text ""{i}"" of\ntwo lines"' if i % 3 else f"{i},text {i}" for i in range(1500)]
    plain = [f"{i},text {i}" for i in range(1500)]
    for name, good, place in (("a.csv", plain, 0), ("b.csv", plain, 700), ("c.csv", rows, 700), ("d.csv", rows, 1500)):
        file = tmp_path / name
        file.write_text("\n".join(["n,text", *good[:place], '-1,"never closed', *good[place:]]) + "\n")
        documents_, dropped = read(file)
        assert dropped == {"not CSV": 1}, name
        assert len(documents_) == 1500, name
        line = 2 + sum(row.count("\n") + 1 for row in good[:place])
        with pytest.raises(DataError, match=rf"{name}:{line}: is not CSV"):
            list(documents(SourceConfig(source=str(file)), (("text",),)))


def test_a_quote_that_is_not_closed_before_a_line_that_is_too_long(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("bigtrain.data.files.OTHER_COLUMNS", 100)
    (tmp_path / "a.csv").write_text('text\n"open\nb\n' + "x" * 1000 + "\nc\n")
    documents_, dropped = read(tmp_path / "a.csv", max_characters=50)
    assert [text for _, text in documents_] == ["b", "c"]
    assert dropped == {"not CSV": 1, "longer than max_characters": 1}


# Links.


def test_a_real_file_counts_once(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "sub" / "deep" / "a.txt").write_text("a")
    (top / "b.txt").write_text("b")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "c.txt").write_text("c")
    (top / "self").symlink_to(top)
    (top / "again").symlink_to(".")
    (top / "sub" / "deep" / "up").symlink_to("../..")
    (top / "0-same").symlink_to(top / "sub")
    (top / "0.txt").symlink_to("b.txt")
    (top / "1.txt").symlink_to("0.txt")
    (top / "out").symlink_to(tmp_path / "outside")
    (top / "out2").symlink_to(tmp_path / "outside")
    (top / "gone.txt").symlink_to("nowhere")
    for source in (top, f"{top}/**/*.txt", f"{top}/**", f"file://{top}"):
        rows = documents(SourceConfig(source=str(source)), (("text",),))
        places = [(Path(row["where"]).relative_to(top).as_posix(), row["text"]) for row in rows]
        assert places == [("b.txt", "b"), ("out/c.txt", "c"), ("sub/deep/a.txt", "a")], source
    assert len(read(Path(f"{top}/*.txt"))[0]) == 1
    assert len(read(Path(f"{top}/*/**/deep/*.txt"))[0]) == 1
