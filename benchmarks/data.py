"""The data's way against the usual ones: tokenizing, feeding, packing, seeking.

    python benchmarks/data.py [--rounds 7] [--only tokenizing,chats,feeding,checking,packing,seeking]

On the source of Python's standard library, on a CPU. The contestants of a comparison take turns in one run, so that
whatever disturbs the machine disturbs all of them; a ratio is the median of the rounds' ratios with a 95 % confidence
interval (bootstrap). Ratios above 1 are in bigtrain's favour.

tokenizing  `prepare_stage` (sources read, shards and the shuffled store written, synced to the disk) against
            `tokenizers`' encode_batch on texts that lie in memory, in one process with the same threads; and two
            processes of it against `datasets`' map(batched=True, num_proc=2) with the same tokenizer.
chats       `ChatTemplate.documents` (text, answers and what is learned) against transformers' apply_chat_template
            (text alone) on conversations of 4 to 16 turns and a system turn, with the templates of trl and a tokenizer
            that is trained here; and all that finetuning does to them, ids included. Qwen3's rewrites earlier turns, so
            that each answer needs a text of its own; it is measured with reasoning in every answer, too.
feeding     `batches(step)` of 8 x 2048 tokens against a torch DataLoader over a tokenized `datasets` set with a
            collator that packs documents and restarts positions; one core each.
checking    what the checksums of a store cost a sample, in blocks that were compared before and in the first pass over
            a store, as ratios to the same code on plain arrays; windows of 2048 tokens and bins of 256, in any order.
packing     finetuning a small Llama on conversations that are packed, against the same conversations one a
            row, padded to the longest of each batch: tokens per second that are no padding.
seeking     batches(1,000,000) of a new Batches, and opening a store of 10 billion tokens (sparse files).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch.utils.data import DataLoader

from bigtrain.config import RunConfig, load_config
from bigtrain.data.batches import Batches
from bigtrain.data.chat import ChatTemplate
from bigtrain.data.columns import BLOCK, CHECKSUMS, Column
from bigtrain.data.prepare import prepare_stage, prepare_tokenizer
from bigtrain.data.sources import documents
from bigtrain.data.store import FORMAT, SEAL, Sequences, open_store
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.data.types import IGNORE, Layout
from bigtrain.data.writing import gather
from bigtrain.pipeline.build import open_tokenizer
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.tasks.sft import Sft

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ROWS, LENGTH = 8, 2048
COPIES = 2  # of the standard library, so that starting processes is not all that is measured


def median(values: list[float], digits: int = 2) -> str:
    """The median with its 95 % confidence interval (bootstrap)."""
    draws = np.random.default_rng(0).choice(values, size=(4000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return f"{np.median(values):,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def seconds_of(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def turns(rounds: int, contestants: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each contestant returns in each round, in rotating order, after a round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            value = contestants[name]()
            if number:
                found[name].append(value)
    return found


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


# Tokenizing.


def library() -> Iterator[dict[str, str]]:
    """The rows of the source that is tokenized: COPIES of the standard library."""
    for copy in range(COPIES):
        for row in documents(load_config(CONFIG).stages[0].data[0], (("text",),)):
            yield {"key": f"{copy}/{row['key']}", "text": row["text"]}


def pretraining(output: str, folder: Path) -> RunConfig:
    given = [f"output={output}", "seed=1", f"stages.pretrain.data=[{{source: {folder / 'texts'}}}]"]
    return load_config(CONFIG, [*given, "stages.pretrain.held_out=0.0", "stages.pretrain.evaluate=null"])


def write_texts(folder: Path) -> list[str]:
    """The documents as files, and as texts in memory."""
    (folder / "texts").mkdir()
    texts = [row["text"] for row in library()]
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    return texts


def prepare(run: RunConfig, tokenizer: Any) -> Sequences:
    return prepare_stage(run.stages[0], Pretrain(), tokenizer, stores=run.stores, seed=run.seed).train[0]


def helper(pipe: Any, folder: Path) -> None:
    """A process that prepares what it is told to, together with another; with the threads of `bigtrain prepare`."""
    os.environ["RAYON_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // 2))
    for output in iter(pipe.recv, None):
        run = pretraining(output, folder)
        prepare(run, open_tokenizer(run))
        pipe.send("done")


def tokenizing(rounds: int, folder: Path) -> None:
    from datasets import Dataset, disable_caching, disable_progress_bars

    disable_progress_bars()
    disable_caching()
    texts = write_texts(folder)
    size = sum(len(text.encode()) for text in texts)
    first = pretraining(str(folder / "runs"), folder)
    tokenizer = open_tokenizer(first)
    backend = tokenizer.backend_tokenizer
    dataset = Dataset.from_dict({"text": texts})
    dataset.save_to_disk(str(folder / "set"))
    dataset = Dataset.load_from_disk(str(folder / "set"))
    fresh = itertools.count()
    spawned = multiprocessing.get_context("spawn")
    pipes = [spawned.Pipe() for _ in range(2)]
    helpers = [spawned.Process(target=helper, args=(theirs, folder), daemon=True) for _, theirs in pipes]
    for process in helpers:
        process.start()

    def output() -> str:
        """A folder of runs that has the tokenizer and no stores."""
        where = folder / f"out-{next(fresh)}"
        shutil.copytree(folder / "runs", where, ignore=shutil.ignore_patterns("windows-*"))
        return str(where)

    def ours(where: str, work: Callable[[str], Any]) -> float:
        rate = size / seconds_of(lambda: work(where))
        shutil.rmtree(where)
        return rate

    def together(where: str) -> None:
        for pipe, _ in pipes:
            pipe.send(where)
        for pipe, _ in pipes:
            pipe.recv()

    def raw() -> float:
        def work() -> None:
            for begin in range(0, len(texts), 100):
                backend.encode_batch(texts[begin : begin + 100], add_special_tokens=False)

        return size / seconds_of(work)

    def mapped() -> float:
        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]}

        return size / seconds_of(lambda: dataset.map(encode, batched=True, num_proc=2, remove_columns=["text"]))

    found = turns(
        rounds,
        {
            "one": lambda: ours(output(), lambda where: prepare(pretraining(where, folder), tokenizer)),
            "raw": raw,
            "two": lambda: ours(output(), together),
            "map": mapped,
        },
    )
    for pipe, _ in pipes:
        pipe.send(None)
    print(f"tokenizing  {size / 1e6:.0f} MB of text, {len(texts)} documents")
    print(f"  prepare, one process        {median([r / 1e6 for r in found['one']])} MB/s")
    print(f"  tokenizers' encode_batch    {median([r / 1e6 for r in found['raw']])} MB/s")
    print(f"    ratio                     {median(ratios(found['one'], found['raw']))}   (bar: 0.9)")
    print(f"  prepare, two processes      {median([r / 1e6 for r in found['two']])} MB/s")
    print(f"  datasets.map, num_proc=2    {median([r / 1e6 for r in found['map']])} MB/s")
    print(f"    ratio                     {median(ratios(found['two'], found['map']))}   (bar: 1.3)")


# Chats.

FAMILIES = {  # templates of trl, with their tokens; the first two are those of begin and end
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "qwen2_5": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "gemma3": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
}
OTHERS = ("qwen3 reasoning", "qwen3 thinks", "deepseekv3 thinks", "qwen2_5 calls", "qwen3 calls")  # a family, and how


def conversations(number: int) -> list[list[dict[str, str]]]:
    """Of pieces of the standard library: a system turn, and 2 to 8 questions with answers of up to 900 characters."""
    draws = random.Random(0)  # noqa: S311
    texts = [row["text"] for row in itertools.islice(library(), 100) if len(row["text"]) > 1000]

    def turn(role: str, least: int, most: int) -> dict[str, str]:
        text, size = draws.choice(texts), draws.randrange(least, most)
        start = draws.randrange(len(text) - size)
        return {"role": role, "content": text[start : start + size].strip() or role}

    return [
        [turn("system", 20, 60)]
        + [turn(*given) for _ in range(draws.randrange(2, 9)) for given in (("user", 40, 400), ("assistant", 100, 900))]
        for _ in range(number)
    ]


def changed(messages: list[dict[str, str]], how: str) -> list[dict[str, Any]]:
    """With reasoning beside the answers, or within them; with a call of a tool before each, in OpenAI's format."""
    said: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        content = message["content"]
        if message["role"] != "assistant" or not how:
            said.append(message)
        elif how == "reasoning":
            said.append({**message, "reasoning_content": content[:150].strip()})
        elif how == "thinks":
            said.append({**message, "content": f"<think>\n{content[:150].strip()}\n</think>\n\n{content}"})
        else:
            function = {"name": "look_up", "arguments": json.dumps({"text": content[:40], "number": number})}
            call = {"id": f"call_{len(content)}_{number}", "type": "function", "function": function}
            found = {"role": "tool", "tool_call_id": call["id"], "name": "look_up", "content": content[:150].strip()}
            said += [{"role": "assistant", "content": "", "tool_calls": [call]}, found, message]
    return said


def list_of(work: Callable[[Any], Any], given: list[Any]) -> list[Any]:
    return [work(one) for one in given]


def chats(rounds: int, folder: Path) -> None:
    run = pretraining(str(folder / "runs"), folder)
    write_texts(folder)
    chosen = conversations(200)
    templates = Path(str(distribution("trl").locate_file("trl/chat_templates")))
    print(f"chats       {len(chosen)} conversations, {sum(map(len, chosen)) / len(chosen):.1f} turns on average")
    for family in (*FAMILIES, *OTHERS):
        name, _, how = family.partition(" ")
        tokens = FAMILIES[name]
        tokenizer = load_tokenizer(prepare_tokenizer(run.tokenizer.train, run.stages[0], run.stores), tokens)
        tokenizer.bos_token, tokenizer.eos_token = tokens[:2]
        tokenizer.chat_template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
        documents_of = ChatTemplate.of(tokenizer).documents
        text_of = partial(tokenizer.apply_chat_template, tokenize=False)
        said = [changed(messages, how) for messages in chosen]
        rows = [{"key": "", "where": "", "messages": messages} for messages in said]

        def rate(work: Callable[[], Any]) -> float:
            return len(chosen) / seconds_of(work)

        found = turns(
            rounds,
            {
                "ours": partial(rate, partial(list_of, documents_of, said)),
                "theirs": partial(rate, partial(list_of, text_of, said)),
                "ids": partial(rate, partial(Sft().encode, rows, tokenizer)),
            },
        )
        print(f"  {family:<17} documents       {median(found['ours'], 0)} /s")
        print(f"  {family:<17} transformers    {median(found['theirs'], 0)} /s")
        print(f"    ratio                     {median(ratios(found['ours'], found['theirs']))}   (bar: 0.8)")
        print(f"  {family:<17} with ids        {median(found['ids'], 0)} /s")


# Feeding.


def packed(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What a collator does that packs the documents of a batch into rows of LENGTH tokens."""
    ids = torch.cat([torch.as_tensor(row["input_ids"]) for row in rows])
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])
    targets = ids.roll(-1)
    targets[positions.roll(-1) == 0] = IGNORE
    kept = len(ids) // LENGTH * LENGTH
    shape = (-1, LENGTH)
    return {
        "input_ids": ids[:kept].view(shape),
        "targets": targets[:kept].view(shape),
        "position_ids": positions[:kept].view(shape),
    }


def feeding(rounds: int, folder: Path) -> None:
    from datasets import Dataset

    longer = (f"stages.pretrain.sequence_length={LENGTH}", f"model.from_config.max_position_embeddings={LENGTH}")
    run = load_config(CONFIG, [f"output={folder / 'runs'}", *longer])
    store = prepare(run, open_tokenizer(run))
    ends = np.fromfile(store.folder / "documents.bin", dtype=np.int64)
    tokens = np.fromfile(store.folder / "tokens.bin", dtype=store.manifest["dtype"]).astype(np.int64)
    rows = [tokens[a:b].tolist() for a, b in itertools.pairwise(ends)]
    Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folder / "tokens"))
    dataset = Dataset.load_from_disk(str(folder / "tokens"))
    documents_a_batch = max(1, round(ROWS * LENGTH / (len(tokens) / len(rows))))
    steps = 200
    numbers = itertools.count()
    batches = Batches(
        [store], None, seed=0, global_batch_size=ROWS, total_samples=ROWS * 10**6, data_rank=0, data_size=1
    )

    def ours() -> float:
        first = next(numbers) * steps
        begun = time.perf_counter()
        for step in range(first, first + steps):
            batches(step)
        return steps * ROWS * LENGTH / (time.perf_counter() - begun)

    def loader() -> float:
        given = 0
        begun = time.perf_counter()
        for batch in DataLoader(dataset, batch_size=documents_a_batch, shuffle=True, collate_fn=packed):
            given += batch["input_ids"].numel()
        return given / (time.perf_counter() - begun)

    found = turns(rounds, {"ours": ours, "loader": loader})
    print(f"feeding     batches of {ROWS} x {LENGTH} tokens, one core")
    print(f"  batches(step)               {median([r / 1e6 for r in found['ours']])} M tokens/s   (bar: 20)")
    print(f"  torch DataLoader            {median([r / 1e6 for r in found['loader']])} M tokens/s")
    print(f"    ratio                     {median(ratios(found['ours'], found['loader']))}   (bar: 10)")


# Checking.


class Plain:
    """An array with the look-ups of a column, without its checks."""

    def __init__(self, column: Column):
        self._array = column._array

    def __getitem__(self, span: slice) -> Any:
        return self._array[span]

    between = Column.between
    _unread = -1


def unchecked(store: Sequences) -> Sequences:
    for name in {"_tokens", "_documents", "_loss_mask", "_packed"} & vars(store).keys():
        if (column := getattr(store, name)) is not None:
            setattr(store, name, Plain(column) if name == "_documents" else column._array)
    return store


def checking(rounds: int, folder: Path) -> None:
    longer = (f"stages.pretrain.sequence_length={LENGTH}", f"model.from_config.max_position_embeddings={LENGTH}")
    run = load_config(CONFIG, [f"output={folder / 'runs'}", *longer])
    tokenizer = open_tokenizer(run)
    print("checking    a sample's cost against that on plain arrays, one core")
    for stage in run.stages:
        where = prepare_stage(stage, stage.task, tokenizer, stores=run.stores, seed=run.seed).train[0].folder
        opened = partial(open_store, where, stage.sequence_length)
        plain, again = unchecked(opened()), opened()
        order = np.random.default_rng(0).permutation(plain.samples).tolist()
        found: dict[str, list[float]] = {"plain": [], "again": [], "first": []}
        for number in range(4 * rounds + 1):
            stores = {"plain": plain, "again": again, "first": opened()}
            totals = dict.fromkeys(stores, 0.0)
            for turn, at in enumerate(range(0, len(order), 50)):  # short turns, as the machine's speed changes
                names = list(stores)
                for name in names[turn % 3 :] + names[: turn % 3]:
                    begun = time.thread_time()
                    for sample in order[at : at + 50]:
                        stores[name].sample(sample)
                    totals[name] += time.thread_time() - begun
            if number:  # the one before has compared all blocks of `again`
                for name, seconds in totals.items():
                    found[name].append(seconds / len(order))
        layout = plain.manifest["layout"]
        print(f"  {layout:<8} plain              {median([1e6 * s for s in found['plain']], 1)} us a sample")
        for name, bar in (("again", 1.02), ("first", 1.05)):
            print(f"    {name:<8} ratio            {median(ratios(found[name], found['plain']), 3)}   (bar: {bar})")


# Packing.


def packing(rounds: int, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    run = load_config(CONFIG, [f"output={folder / 'runs'}"])
    stage = run.stages[1]
    rows, length = stage.global_batch_size, stage.sequence_length
    tokenizer = open_tokenizer(run)
    store = prepare_stage(stage, Sft(), tokenizer, stores=run.stores, seed=run.seed).train[0]
    found_rows = list(itertools.islice(documents(stage.data[0], Sft.columns), 1500))
    answers = zip([row["where"] for row in found_rows], Sft().encode(found_rows, tokenizer), strict=True)
    encoded = gather(answers, Layout("packed", length, 0), np.dtype(np.int64))
    ends = encoded.lengths.cumsum()
    assert encoded.loss_mask is not None
    singles = [
        (encoded.tokens[end - n : end], encoded.loss_mask[end - n : end])
        for end, n in zip(ends, encoded.lengths, strict=True)
    ]
    shuffled = np.random.default_rng(0).permutation(len(singles))
    pad = store.manifest["pad_id"]
    torch.manual_seed(0)
    torch.set_num_threads(1)  # two that wait for each other on a busy machine measure the others' work
    shape = {**(run.model.from_config or {}), "vocab_size": len(tokenizer)}
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in shape.items() if k != "model_type"}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    packed_batches = Batches(
        [store], None, seed=0, global_batch_size=rows, total_samples=rows * 10**6, data_rank=0, data_size=1
    )
    steps = itertools.count()

    def padded(number: int) -> dict[str, torch.Tensor]:
        chosen = [singles[shuffled[i % len(shuffled)]] for i in range(number * rows, (number + 1) * rows)]
        longest = max(len(ids) for ids, *_ in chosen) - 1
        inputs = torch.full((rows, longest), pad)
        targets = torch.full((rows, longest), IGNORE)
        for row, (ids, trained) in enumerate(chosen):
            inputs[row, : len(ids) - 1] = torch.from_numpy(ids[:-1])
            learned = torch.from_numpy(np.where(trained[1:], ids[1:], IGNORE))
            targets[row, : len(ids) - 1] = learned
        return {"input_ids": inputs, "targets": targets, "position_ids": torch.arange(longest).expand(rows, -1)}

    def useful_tokens(batch: Callable[[int], dict[str, torch.Tensor]]) -> float:
        """A second, over a few steps: the padded rows need no mask, as what follows a row is never looked at."""
        useful = 0
        begun = time.perf_counter()
        for _ in range(3):
            tensors = batch(next(steps))
            logits = model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tensors["targets"].flatten(), ignore_index=IGNORE)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            useful += int((tensors["input_ids"] != pad).sum())
        return useful / (time.perf_counter() - begun)

    found = turns(
        rounds,
        {
            "packed": lambda: useful_tokens(lambda step: packed_batches(step).tensors),
            "padded": lambda: useful_tokens(padded),
        },
    )
    print(f"packing     finetuning on stdlib-functions, {rows} rows a step, samples {store.manifest['fill']:.1%} full")
    print(f"  packed                      {median(found['packed'], 0)} tokens/s")
    print(f"  padded per batch            {median(found['padded'], 0)} tokens/s")
    print(f"    ratio                     {median(ratios(found['packed'], found['padded']))}   (bar: 1.5)")


# Seeking.


def sparse_store(folder: Path) -> Path:
    """A store of 10 billion tokens in 10 million documents, almost all of them holes."""
    tokens, count = 10**10, 10**7
    folder.mkdir()
    (folder / "tokens.bin").touch()
    os.truncate(folder / "tokens.bin", 2 * tokens)
    starts = memoryview((np.arange(count + 1) * 1000).tobytes())
    (folder / "documents.bin").write_bytes(starts)
    sums = [xxhash.xxh3_64_intdigest(starts[at : at + BLOCK]) for at in range(0, len(starts), BLOCK)]
    sums += [xxhash.xxh3_64_intdigest(bytes(BLOCK))] * -(-2 * tokens // BLOCK)
    (folder / CHECKSUMS).write_bytes(data := np.array(sums, dtype="<u8").tobytes())
    sizes = {"documents.bin": len(starts), "tokens.bin": 2 * tokens}
    manifest = {
        **{"format": FORMAT, "layout": "windows", "sequence_length": None, "source": "holes", "documents_are": "all"},
        **{"pad_id": None, "dtype": "uint16", "store_columns": {}, "documents": count, "tokens": tokens},
        "checksums": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "files": {name: {"bytes": size, "sha256": ""} for name, size in sizes.items()},
    }
    (folder / "manifest.json").write_text(SEAL.text(manifest))
    return folder


def seeking(rounds: int, folder: Path) -> None:
    where = sparse_store(folder / "sparse")
    seeks, opens = [], []
    for number in range(max(rounds, 7)):
        begun = time.perf_counter()
        store = open_store(where, LENGTH)
        opens.append(time.perf_counter() - begun)
        batches = Batches(
            [store], None, seed=number, global_batch_size=ROWS, total_samples=10**8, data_rank=0, data_size=1
        )
        seeks.append(seconds_of(lambda batches=batches: batches(1_000_000)))
    print("seeking     in a store of 10 billion tokens")
    print(f"  batches(1,000,000)          {median([s * 1e3 for s in seeks])} ms   (bar: 10)")
    print(f"  opening it                  {median([s * 1e3 for s in opens])} ms   (bar: 1000)")


def main() -> None:
    parts = {
        "tokenizing": tokenizing,
        "chats": chats,
        "feeding": feeding,
        "checking": checking,
        "packing": packing,
        "seeking": seeking,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(parts))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.only.split(","):
            part = Path(folder) / name
            part.mkdir()
            parts[name](asked.rounds, part)


if __name__ == "__main__":
    main()
