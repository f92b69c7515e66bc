"""Every row that is read is trained on, held out, or counted under a named reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.schema import Model, Optimizer, Run, Source, Stage, Tokenizer
from bigtrain.data.prepare import StageData, prepare_stage
from bigtrain.data.tokenizer import load_tokenizer, train_tokenizer
from bigtrain.errors import DataError
from bigtrain.tasks import TASKS

ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["def f(): return 'a b c'\n" * 20]), 300, 10_000, folder)
    found = load_tokenizer(folder)
    found.chat_template = ALTERNATING
    return found


def prepared(folder: Path, tokenizer: Any, task: str, *sources: Source, **stage: Any) -> StageData:
    """The stores of a run with one stage."""
    settings = {"sequence_length": 16, "max_cut_answers": 1.0} | stage
    only = Stage(
        name="s",
        task=task,
        data=list(sources),
        global_batch_size=1,
        steps=1,
        optimizer=Optimizer(lr=1e-3),
        **settings,
    )
    run = Run(
        name="r",
        output=str(folder / "out"),
        model=Model(from_config={"model_type": "llama"}),
        tokenizer=Tokenizer(from_pretrained=str(folder)),
        stages=[only],
    )
    return prepare_stage(run, only, TASKS[task](), tokenizer)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_row_that_the_template_refuses_is_named_or_skipped(tmp_path: Path, tokenizer: Any) -> None:
    good = {"messages": [turn("user", "a"), turn("assistant", "b")]}
    refused = {"messages": [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]}
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([json.dumps(good), "", json.dumps(refused), json.dumps(good)]))
    with pytest.raises(DataError, match=r"^\S*chats\.jsonl:3: .*roles must alternate.*`on_error: skip`") as error:
        prepared(tmp_path, tokenizer, "sft", Source(source=str(file)))
    assert "key" not in str(error.value)
    data = prepared(tmp_path, tokenizer, "sft", Source(source=str(file), on_error="skip"))
    assert data.train[0].manifest["documents"] == 2
    assert data.train[0].manifest["dropped"] == {"refused by the chat template": 1}
