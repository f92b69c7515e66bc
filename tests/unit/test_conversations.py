"""The shapes that conversations come in, read from files to what the chat template is given."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigtrain.config.schema import SourceConfig
from bigtrain.data.sources import documents
from bigtrain.data.tally import Tally
from bigtrain.errors import DataError
from bigtrain.tasks.sft import Sft

ASKED = {"role": "user", "content": "a?"}
SAID = {"role": "assistant", "content": "b"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}},
]}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}


def read(tmp_path, *rows, **source):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(documents(SourceConfig(source=str(file), **source), Sft.columns))


def messages_of(tmp_path, row):
    [found] = read(tmp_path, row)
    return found["messages"]


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (["user", "User", "USER", "human", "Human", " human "], "user"),
        (["assistant", "Assistant", "gpt", "GPT", "model", "bot", "Bot", "ai", "AI", "chatgpt"], "assistant"),
        (["system", "System", "developer"], "system"),
        (["tool", "Tool", "function", "observation", "tool_response", "ipython"], "tool"),
    ],
)
def test_roles_that_are_known_are_mapped_whatever_their_case(tmp_path, names, role) -> None:
    for name in names:
        for speaker, said, column in (("role", "content", "messages"), ("from", "value", "conversations")):
            found = messages_of(tmp_path, {column: [{speaker: name, said: "x"}]})
            assert found == [{"role": role, "content": "x"}]


@pytest.mark.parametrize("name", ["robot", "", "assistant2", "\x1b[2Jx"])
def test_other_roles_are_refused_with_the_row_and_the_list(tmp_path, name) -> None:
    rows = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, {"role": name, "content": "b"}]}]
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: .*turn 2 has the role `.*`; known are .*human.*gpt.*bot"
    ) as told:
        read(tmp_path, *rows)
    assert "\x1b" not in str(told.value)
    assert len(read(tmp_path, *rows, on_error="skip")) == 1


def test_an_instruction_has_a_system_turn_and_a_history_whose_answers_are_learned(tmp_path) -> None:
    row = {
        "instruction": "add",
        "input": "1",
        "output": "2",
        "system": "Be brief.",
        "history": [["q", "a"], ["r", "b"]],
    }
    said = [turn["content"] for turn in messages_of(tmp_path, row)]
    assert said == ["Be brief.", "q", "a", "r", "b", "add\n\n1", "2"]
    roles = [turn["role"] for turn in messages_of(tmp_path, row | {"history": json.dumps(row["history"])})]
    assert roles == ["system", *["user", "assistant"] * 3]
    [plain] = read(tmp_path, row | {"system": "", "history": [], "input": None})
    assert (plain["prompt"], plain["completion"]) == ("add", "2")
    for history in ("x", [["q"]], [["q", 1]], {"q": "a"}):
        with pytest.raises(DataError, match=r":1: column `history`"):
            read(tmp_path, row | {"history": history})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a?", "output": "b"},
        {"prompt": "a?", "completion": "b"},
    ],
)
def test_system_and_tools_stand_beside_every_shape(tmp_path, row) -> None:
    for tools in (
        [TOOL],
        json.dumps([TOOL]),
        [TOOL["function"]],
        {"type": ["function"], "function": [TOOL["function"]]},
    ):
        [found] = read(tmp_path, row | {"system": "Be brief.", "tools": tools})
        assert found["tools"] == [TOOL]
        assert found["messages"] == [{"role": "system", "content": "Be brief."}, ASKED, SAID]
    [found] = read(tmp_path, row | {"rules": "Be brief."}, columns={"system": "rules"})
    assert found["messages"][0] == {"role": "system", "content": "Be brief."}


def test_two_system_turns_that_differ_are_refused(tmp_path) -> None:
    turns = [{"role": "system", "content": "A"}, ASKED, SAID]
    assert messages_of(tmp_path, {"messages": turns, "system": "A"}) == turns
    with pytest.raises(DataError, match=r":1: has a system turn, and another in its column `system`"):
        read(tmp_path, {"messages": turns, "system": "B"})


def test_columns_of_which_nothing_is_used_are_named_and_pictures_refused(tmp_path) -> None:
    rows = [{"messages": [ASKED, SAID], "chosen": "x", "parallel_tool_calls": False, "rejected": None, "mine": 1}] * 2
    (tmp_path / "noted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    list(documents(SourceConfig(source=str(tmp_path / "noted.jsonl")), Sft.columns, tally := Tally()))
    assert tally.unread == {"chosen": 2, "parallel_tool_calls": 2}
    [found] = read(tmp_path, {"q": "a?", "chosen": "b"}, columns={"prompt": "q", "completion": "chosen"})
    assert found["completion"] == "b"
    with pytest.raises(DataError, match=r":1: has the column `images`; this task reads text alone"):
        read(tmp_path, {"messages": [ASKED, SAID], "images": ["a.png"]})
    assert len(read(tmp_path, {"messages": [ASKED, SAID], "images": []})) == 1


ARGUMENTS = [{"x": 1}, '{"x": 1}']


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]},
        {"role": "assistant", "tool_calls": [{"name": "add"}]},
        {"role": "assistant", "content": "", "tool_calls": {"type": ["function"], "function": [{"name": "add"}]}},
        {"role": "assistant", "content": None, "function_call": {"name": "add"}},
        {"from": "function_call", "value": {"name": "add"}},
    ],
)
def test_calls_of_tools_old_and_new(tmp_path, turn, arguments) -> None:
    turn = json.loads(json.dumps(turn).replace('"add"', '"add", "arguments": ' + json.dumps(arguments)))
    if "value" in turn:
        turn["value"] = json.dumps(turn["value"])
    [_, called] = messages_of(tmp_path, {"messages": [ASKED, turn]})
    [call] = called["tool_calls"]
    assert (called["role"], called["content"]) == ("assistant", "")
    assert call == {"type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", '"x"', [1], 3])
def test_arguments_that_are_no_object_are_refused(tmp_path, arguments) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}]}
    with pytest.raises(DataError, match=r":1: .*turn 2: call 1 of a tool: .*`arguments`.* JSON"):
        read(tmp_path, {"messages": [ASKED, called]})


def test_nulls_that_a_table_fills_in_are_gone_at_every_depth(tmp_path) -> None:
    """The same rows as lines and as a table, where each row has the keys of all."""
    calls = [{"expression": "1+1"}, {"city": "Paris", "unit": {"of": "C"}}]
    rows = [
        {
            "messages": [ASKED, {**CALLED, "tool_calls": [{"function": {"name": "f", "arguments": a}}]}],
            "tools": [{"function": {"name": "f", "parameters": a}}],
        }
        for a in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = SourceConfig(source=str(tmp_path / "rows.parquet"))
    tables = list(documents(source, Sft.columns))
    lines = read(tmp_path, *rows)
    assert [(row["messages"], row["tools"]) for row in tables] == [(row["messages"], row["tools"]) for row in lines]
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in tables] == calls


def test_a_null_that_a_call_means_stays_in_its_text(tmp_path) -> None:
    call = {"function": {"name": "f", "arguments": '{"city": null}'}}
    found = messages_of(tmp_path, {"messages": [ASKED, {**CALLED, "tool_calls": [call]}]})
    assert found[1]["tool_calls"][0]["function"]["arguments"] == '{"city": null}'


def test_a_row_of_a_table_has_the_shape_whose_columns_it_fills(tmp_path) -> None:
    rows = [
        {"messages": [ASKED, SAID], "prompt": None, "completion": None},
        {"messages": None, "prompt": "p", "completion": "c"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = documents(SourceConfig(source=str(tmp_path / "rows.parquet")), Sft.columns)
    assert (first["messages"], second["prompt"]) == ([ASKED, SAID], "p")


@pytest.mark.parametrize(("weight", "learned"), [(0, False), (1, True), (0.0, False), (False, False), (None, True)])
def test_a_turn_of_weight_zero_is_only_read(tmp_path, weight, learned) -> None:
    found = messages_of(tmp_path, {"messages": [ASKED, SAID | {"weight": weight}]})
    assert found == [ASKED, SAID | ({} if learned else {"train": False})]
    found = messages_of(tmp_path, {"messages": [ASKED, SAID | {"train": learned}]})
    assert found == [ASKED, SAID | ({} if learned else {"train": False})]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (SAID | {"weight": 0.5}, "turn 1 has the weight 0.5; known are 1, and 0"),
        (SAID | {"weight": 2}, "turn 1 has the weight 2"),
        (SAID | {"weight": "0"}, "turn 1 has the weight 0"),
        (SAID | {"train": "no"}, "turn 1: `train` must be true, or false"),
        (SAID | {"train": 0}, "turn 1: `train` must be true, or false"),
        (ASKED | {"train": True}, "turn 1 has `train: true`; only what the assistant says"),
    ],
)
def test_other_weights_are_refused(tmp_path, turn, message) -> None:
    with pytest.raises(DataError, match=f":1: column `messages`: {message}"):
        read(tmp_path, {"messages": [turn]})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        ([{"text": "a"}, "b"], "ab"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
        ([{"type": "text", "text": "a", "image_url": None}], "a"),
        ([], ""),
        (None, ""),
    ],
)
def test_contents_of_parts_and_of_nothing(tmp_path, content, text) -> None:
    for role in ("user", "assistant", "tool"):
        assert messages_of(tmp_path, {"messages": [{"role": role, "content": content}]})[0]["content"] == text


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "thinking", "tool_use", "refusal"])
def test_parts_that_are_no_text_are_named(tmp_path, kind) -> None:
    rows = [
        {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": "x"}}]}]},
        {"messages": [ASKED, SAID]},
    ]
    with pytest.raises(DataError, match=f":1: .*turn 1 has a part of the type `{kind}`; this task reads text alone"):
        read(tmp_path, *rows)
    assert len(read(tmp_path, *rows, on_error="skip")) == 1


@pytest.mark.parametrize(
    "value",
    [
        json.dumps([ASKED, SAID]),
        {"role": ["user", "assistant"], "content": ["a?", "b"]},
        {"from": ["human", "gpt"], "value": ["a?", "b"], "weight": None},
        [ASKED | {"name": None}, SAID | {"tool_calls": None, "weight": None}],
    ],
)
def test_messages_as_json_and_as_a_dict_of_lists(tmp_path, value) -> None:
    for column in ("messages", "conversations"):
        assert messages_of(tmp_path, {column: value}) == [ASKED, SAID]


@pytest.mark.parametrize(
    "value",
    ["x", "3", "[1]", 7, {"role": ["user"], "content": []}, {"role": "user", "content": "a"}, [[ASKED]], [ASKED, None]],
)
def test_what_is_no_conversation(tmp_path, value) -> None:
    with pytest.raises(DataError, match=r":1: column `messages` must be a list of \{role, content\}"):
        read(tmp_path, {"messages": value})


def test_values_that_are_no_json_and_depths_without_end(tmp_path) -> None:
    import datetime

    call = [{"function": {"name": "f", "arguments": {"at": datetime.datetime(2024, 1, 1)}}}]
    rows = [{"messages": [{"role": "assistant", "content": "x", "tool_calls": call}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"turn 1 holds a datetime; give it as text"):
        list(documents(SourceConfig(source=str(tmp_path / "rows.parquet")), Sft.columns))
    with pytest.raises(DataError, match=r":1: column `messages` (is nested too deeply|must be a list)"):
        read(tmp_path, {"messages": "[" * 100_000})
