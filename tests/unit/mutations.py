"""Things that people get wrong in a run's file, as functions that do it to a good one."""

import copy
import re
import string

from bigtrain.config.model import SIZES

# Mutations: each takes the recipe's values, changes one thing in place, and returns a word that the message must hold;
# or None where this recipe has nothing to change in this way.


def leaves(value, at=()):
    """(holder, key, path) of each value that is neither a mapping nor a list of mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in list(items):
        if isinstance(below, dict) or (isinstance(below, list) and below and isinstance(below[0], dict)):
            yield from leaves(below, (*at, key))
        else:
            yield value, key, (*at, key)


def mappings(value):
    """Every mapping whose keys the schema knows."""
    if isinstance(value, dict):
        yield value
    for key, below in value.items() if isinstance(value, dict) else enumerate(value):
        if key != "from_config" and isinstance(below, dict | list):
            yield from mappings(below)


def known_leaves(values):
    """The leaves that are checked before transformers is asked."""
    return [(h, key) for h, key, path in leaves(values) if "from_config" not in path or key in SIZES]


def typo(values, rng):
    known = {key for mapping in mappings(values) for key in mapping} | {"steps", "tokens", "epochs", "every", "keep"}
    mapping = rng.choice([m for m in mappings(values) if m])
    key = rng.choice(sorted(mapping))
    at = rng.randrange(len(key))
    letter = rng.choice(string.ascii_lowercase)
    wrong = rng.choice([key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :], key[:at] + key[at + 1 :]])
    if wrong in known or not wrong:
        return None
    mapping[wrong] = mapping.pop(key)
    return wrong


def wrong_type(values, rng):
    holder, key = rng.choice(known_leaves(values))
    old = holder[key]
    candidates = [{"a": 1}, "text", 7, [7], True]
    fits = [c for c in candidates if type(c) is type(old) or (type(c) in (int, float) and type(old) in (int, float))]
    holder[key] = rng.choice([c for c in candidates if c not in fits and not (isinstance(old, list) and c == [7])])
    if key == "processes":
        holder[key] = [7]
    return key if isinstance(key, str) else None


def quoted_number(values, rng):
    numbers = [(h, k) for h, k in known_leaves(values) if type(h[k]) in (int, float)]
    holder, key = rng.choice(numbers)
    holder[key] = str(holder[key])
    return key


def section_as_value(values, rng):
    inner = [(m, k) for m in mappings(values) for k in m if isinstance(m[k], dict)]
    holder, key = rng.choice(inner)
    holder[key] = rng.choice(["text", 5, [1, 2]])
    return key


OUT_OF_RANGE = {
    "lr": [0, -1e-3, float("nan"), float("inf")],
    "betas": [[1.5, 0.9], [0.9], [0.9, 0.9, 0.9], [-0.1, 0.9]],
    "weight_decay": [-0.1, float("nan"), float("inf")],
    "max_grad_norm": [0, -1.0, float("inf")],
    "sequence_length": [0, 1, -4],
    "global_batch_size": [0, -1],
    "steps": [0, -5],
    "tokens": [0],
    "epochs": [0, -1, float("inf")],
    "warmup_ratio": [-0.1, 1.5, float("nan")],
    "warmup_steps": [-1],
    "min_ratio": [-0.1, 2],
    "held_out": [-0.5, 1, 1.0],
    "every": [0, -1],
    "sequences": [0],
    "keep": [0],
    "seed": [-1, 2**31],
    "replicate": [0, 3],
    "processes": [0, -2],
    "micro_batch_size": [0],
    "vocab_size": [0, -1],
    "hidden_size": [0],
    "num_attention_heads": [0, 5],
    "num_key_value_heads": [0, 5],
    "max_position_embeddings": [0],
    "name": ["", "a/b", "-x", "ä"],
    "phone_region": ["us", "USA", "XX"],
    "min_characters": [0, 10**9],
    "duplicate_lines": [-0.1, 1.5, float("nan")],
    "duplicate_paragraph_characters": [-0.1, 1.5],
    "top_ngrams": [[0.2, 0.2], [0.2, 0.2, 1.2], []],
    "duplicate_ngrams": [[0.1] * 5, [-0.1] * 6],
    "threshold": [0, 1.5, float("nan")],
    "permutations": [0, 15],
    "words": [0, -1],
    "overlap": [0, 1.5],
}


def out_of_range(values, rng):
    here = [(holder, key) for holder, key, path in leaves(values) if key in OUT_OF_RANGE]
    holder, key = rng.choice(here)
    holder[key] = rng.choice(OUT_OF_RANGE[key])
    return key


def too_long(values, rng):
    positions = values["model"].get("from_config", {}).get("max_position_embeddings")
    if positions is None:
        return None
    rng.choice(values["stages"])["sequence_length"] = positions + rng.randint(1, 10**6)
    return "sequence_length"


def missing(values, rng):
    stage = rng.choice(values["stages"])
    length = next(key for key in ("steps", "tokens", "epochs") if key in stage)
    model = next(key for key in ("from_config", "from_pretrained") if key in values["model"])
    required = [
        *((values, key) for key in ("name", "model", "stages")),
        *((stage, key) for key in ("name", "task", "data", "sequence_length", "global_batch_size", "optimizer")),
        (stage, length),
        (stage["optimizer"], "lr"),
        (rng.choice(stage["data"]), "source"),
        (values["model"], model),
    ]
    if "from_config" in values["model"]:
        required += [(values, "tokenizer"), (values["model"]["from_config"], "model_type")]
    holder, key = rng.choice(required)
    del holder[key]
    return key


def nothing_after_the_key(values, rng):
    stage = rng.choice(values["stages"])
    key = rng.choice(["name", "task", "data", "sequence_length", "global_batch_size", "optimizer", "schedule"])
    stage[key] = None
    return key


def unknown_choice(values, rng):
    stage = rng.choice(values["stages"])
    holder, key = rng.choice(
        [
            (values, "precision"),
            (values, "attention"),
            (values["parallel"], "engine"),
            (values["parallel"], "device"),
            (values["parallel"], "activation_checkpointing"),
            (stage, "task"),
            (stage["optimizer"], "name"),
            (stage["schedule"], "name"),
        ]
    )
    holder[key] = "".join(rng.choices(string.ascii_lowercase, k=7))
    return holder[key]


def unknown_stage(values, rng):
    wrong = "".join(rng.choices(string.ascii_lowercase, k=9))
    rng.choice(values["stages"])["from"] = wrong
    return wrong


def stage_twice(values, rng):
    values["stages"].append(copy.deepcopy(rng.choice(values["stages"])))
    return values["stages"][-1]["name"]


def contradiction(values, rng):
    stage = rng.choice(values["stages"])
    length = next(key for key in ("steps", "tokens", "epochs") if key in stage)
    other = rng.choice([key for key in ("steps", "tokens", "epochs") if key != length])
    stage[other] = 5
    return other


def missing_data(values, rng):
    source = rng.choice(rng.choice(values["stages"])["data"])
    source["source"] = rng.choice(["data/nothing.jsonl", "/nowhere/*.txt", "./nothing", "data/nothing/"])
    return source["source"]


def missing_checkpoint(values, rng):
    plain = ["./nothing", "/nowhere/model", "models/a/b", "nothing.gguf"]
    wrong = rng.choice([*plain, "~/nothing-here", "~no-user/x", "$NOT_SET_AT_ALL/x", "${HOME"])
    values["model"] = {"from_pretrained": wrong}
    return wrong if wrong in plain else "model.from_pretrained"


def profile_backwards(values, rng):
    values["profile"] = {"steps": rng.choice([[5, 4], [0, 3], [-2, 1], [1], [1, 2, 3]])}
    return "profile.steps"


def tracker_twice(values, rng):
    values["trackers"] = [rng.choice(["wandb", "mlflow"]), "tensorboard", "tensorboard"]
    return "trackers"


VALUES = [
    typo,
    wrong_type,
    quoted_number,
    section_as_value,
    out_of_range,
    too_long,
    missing,
    nothing_after_the_key,
    unknown_choice,
    unknown_stage,
    stage_twice,
    contradiction,
    missing_data,
    missing_checkpoint,
    profile_backwards,
    tracker_twice,
]


# Mutations of the text: (lines, index of the line, its indentation, its key) -> a word that the message must hold.


def duplicate(lines, i, indent, key):
    lines.insert(i, f"{indent}{key}: 1")
    return f"{key} is given twice"


def indented_more(lines, i, indent, key):
    lines[i] = " " + lines[i]
    return key


def indented_less(lines, i, indent, key):
    lines[i] = lines[i][1:]
    return key


def tab(lines, i, indent, key):
    lines[i] = "\t" + lines[i].lstrip()
    return key


def open_bracket(lines, i, indent, key):
    lines[i] = f"{indent}{key}: {{a: 1"
    return f"line {i + 1}"


def open_quote(lines, i, indent, key):
    lines[i] = f'{indent}{key}: "a'
    return "not valid YAML"  # the next quote of the file closes it


def undefined_alias(lines, i, indent, key):
    lines[i] = f"{indent}{key}: *nowhere"
    return key


TEXTS = [duplicate, indented_more, indented_less, tab, open_bracket, open_quote, undefined_alias]


def indented_lines(lines):
    """(index, indentation, key) of the lines that hold an indented key after another of the same mapping."""
    matches = [re.match(r"( +)([a-z_]+): *[^\s#]", line) for line in lines]
    found = [(i, match[1], match[2]) for i, match in enumerate(matches) if match]
    return [
        (i, indent, key) for i, indent, key in found if i > 0 and re.match(rf"{indent}[a-z_]+: *[^\s#]", lines[i - 1])
    ]
