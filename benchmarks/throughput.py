"""bigtrain against a plain PyTorch loop and the Hugging Face Trainer: the same model, batches and optimizer.

    python benchmarks/throughput.py [--steps 60] [--sizes 1M,6M] [--device cpu|cuda] [--precision fp32|bf16]

One process. Each contestant is its own whole loop: a loop written by hand, `Trainer.train()`, and bigtrain's `train()`
with the readers of a run. They take turns in one run, one step each in rotating order, in one thread (a greenlet each),
so that whatever disturbs the machine disturbs all of them. The time of a step is that from a loop's resumption until
it has reported its step: its loader, logging and callbacks are in it. All losses must agree in every step.

Printed are the median time of a step and, as medians of the paired ratios with a 95 % confidence interval (bootstrap),
what bigtrain takes of the others' time: at 1.00 it adds nothing, at 0.50 it is twice as fast. Speed is also given as
model FLOP/s by the formula of `bigtrain.models.flops`, and as MFU where the GPU's peak is known.

Where bigtrain computes linear layers with oneDNN (`bigtrain.models.linear`), a second plain loop does so too: it shows
what else a step costs.

On a GPU the larger sizes do not leave room for all at once; `--contestants` says who is in memory together:

    python benchmarks/throughput.py --device cuda --precision bf16 --sizes 8B --contestants plain,bigtrain
"""

import argparse
import contextlib
import copy
import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from greenlet import getcurrent, greenlet
from torch.utils.data import DataLoader, SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bigtrain.checkpoint import NoSaver
from bigtrain.config.schema import SourceConfig, StageConfig
from bigtrain.data.batches import Batches, Prefetched
from bigtrain.data.store import open_store
from bigtrain.data.types import Document, Layout
from bigtrain.data.writing import write_store
from bigtrain.models.architecture import empty_model
from bigtrain.models.flops import arithmetic, peak_flops
from bigtrain.models.linear import make_fast, mkl_is_slow
from bigtrain.models.weights import cut
from bigtrain.observability.events import Event, Step
from bigtrain.observability.progress import Progress
from bigtrain.observability.stream import Files, Stream
from bigtrain.optim.adamw import AdamW
from bigtrain.parallel import build_engine
from bigtrain.parallel.dims import ParallelDims
from bigtrain.resilience.requests import Requests
from bigtrain.state import WEIGHT, Shape
from bigtrain.tasks.pretrain import Pretrain
from bigtrain.training.loop import train
from bigtrain.training.reports import Reports
from bigtrain.training.run import StageRun
from bigtrain.training.schedules.constant import Constant

OPTIMIZER = AdamW(lr=3e-4)
WARMUP = 5  # rounds that are not counted
# Relative, between the losses of a step: autocast and parameters cast to bf16 do not round alike.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Size:
    """The shape of a Llama, and its batch: `rows` sequences of `length` tokens."""

    rows: int
    length: int
    shape: dict[str, Any]


def small(**shape: int) -> Size:
    return Size(4, 256, {"num_attention_heads": 4, "num_key_value_heads": 2, **shape})


def llama3(**shape: Any) -> dict[str, Any]:
    return {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 5e5, **shape}


# 1B: Llama-3.2-1B. 8B: 8 of the 32 layers of Llama-3.1-8B, as weights, gradients and moments of all take 128 GB.
SIZES = {
    "1M": small(hidden_size=128, intermediate_size=352, num_hidden_layers=4, vocab_size=2048),
    "6M": small(hidden_size=256, intermediate_size=688, num_hidden_layers=6, vocab_size=4096),
    "1B": Size(
        4, 2048, llama3(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True)
    ),
    "8B": Size(2, 4096, llama3(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8)),
}


class InMemory:
    """Gives an engine the weights of a model that is there already."""

    def __init__(self, model: LlamaForCausalLM):
        self._weights = dict(model.named_parameters())

    def slots_of(self, name: str) -> Sequence[str]:
        return (WEIGHT,) if name in self._weights else ()

    def read(self, name: str, slot: str, offsets: Shape, lengths: Shape) -> torch.Tensor:
        assert slot == WEIGHT
        return cut(self._weights[name].detach(), offsets, lengths)


@dataclass(frozen=True)
class Setting:
    """What all contestants share. `model` holds the first weights; each trains a copy of them."""

    size: Size
    model: LlamaForCausalLM
    batches: Batches
    steps: int
    folder: Path
    device: torch.device
    precision: str

    @property
    def rows(self) -> list[dict[str, torch.Tensor]]:
        """The rows of all batches in order, as the Trainer wants them: it shifts the labels itself."""
        batches = [self.batches(step).tensors for step in range(self.steps)]
        return [
            {"input_ids": ids, "labels": ids, "position_ids": positions}
            for batch in batches
            for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True)
        ]

    def copy(self) -> LlamaForCausalLM:
        model = LlamaForCausalLM(self.model.config)
        model.load_state_dict(self.model.state_dict())
        return model


Report = Callable[[float], None]  # of a step's loss; ends the turn


def plain(setting: Setting, report: Report, *, onednn: bool = False) -> None:
    """A plain PyTorch loop, as one would write it by hand. With `onednn` its linear layers are bigtrain's."""
    model = setting.copy().to(setting.device).train()
    if onednn:
        make_fast(model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)
    autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16")
    for batch in DataLoader(setting.rows, batch_size=setting.size.rows):
        batch = {key: tensor.to(setting.device) for key, tensor in batch.items()}
        with autocast:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        report(loss.item())


class InOrder(Trainer):
    """The Trainer on rows in the order in which they are given; keeps the loss of the last step."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def training_step(self, *arguments, **options):
        self.last_loss = super().training_step(*arguments, **options)
        return self.last_loss


def trainer(setting: Setting, report: Report) -> None:
    """The Hugging Face Trainer with its defaults, but for what the comparison needs to be one."""
    arguments = TrainingArguments(
        output_dir=str(setting.folder / "trainer"),
        per_device_train_batch_size=setting.size.rows,
        max_steps=setting.steps,
        learning_rate=OPTIMIZER.lr,
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.betas[0],
        adam_beta2=OPTIMIZER.betas[1],
        adam_epsilon=OPTIMIZER.eps,
        max_grad_norm=OPTIMIZER.max_grad_norm,
        bf16=setting.precision == "bf16",
        save_strategy="no",
        report_to="none",
        use_cpu=setting.device.type == "cpu",
    )

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            report(loop.last_loss.item())

    loop = InOrder(setting.copy(), arguments, train_dataset=setting.rows, callbacks=[Turns()])
    loop.train()


def bigtrain(setting: Setting, report: Report, *, attention: str = "sdpa", compile: bool = False) -> None:
    """bigtrain's own loop and engine with the readers of a run."""
    size = setting.size
    config = copy.deepcopy(setting.model.config)  # transformers writes the attention into it
    build = partial(empty_model, config, attention=attention, activation_checkpointing="none")
    stage = StageConfig(
        name="bench",
        task="pretrain",
        data=[SourceConfig(source="random")],
        sequence_length=size.length,
        global_batch_size=size.rows,
        steps=setting.steps,
        optimizer=OPTIMIZER,
        schedule=Constant(),
    )
    if not dist.is_initialized():  # not before: the Trainer takes notice of a process group
        backend = "nccl" if setting.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    engine = build_engine(
        "ddp",
        build,
        Pretrain(),
        dims=ParallelDims(rank=0, replicate=1),
        precision=setting.precision,
        compile=compile,
        micro_batch_size=size.rows,
        optimizer=OPTIMIZER,
        seed=0,
        device=setting.device,
    )
    engine.load(InMemory(setting.model), {"updates": 0})

    def turns(event: Event) -> None:
        if isinstance(event, Step):
            report(event.loss)

    with (
        tempfile.TemporaryDirectory(dir=setting.folder) as folder,
        Prefetched(setting.batches, pin=setting.device.type == "cuda") as batches,
    ):
        stream = Stream([Files(Path(folder), attempt=1), Progress(), turns])
        run = StageRun.of(stage, setting.steps * size.rows, 0, Reports(stage.name, stream))
        train(run, engine, batches, evaluate=dict, saver=NoSaver(), requests=Requests())
        stream.close()
    engine.close()


LAYOUTS: dict[str, dict[str, Any]] = {
    "bigtrain": {},
    "bigtrain compiled": {"compile": True},
    "bigtrain compiled flash": {"compile": True, "attention": "flash"},
}
ONEDNN = "plain with oneDNN"
CONTESTANTS: dict[str, Callable[[Setting, Report], None]] = {
    "plain": plain,
    ONEDNN: partial(plain, onednn=True),
    "Trainer": trainer,
    **{name: partial(bigtrain, **layout) for name, layout in LAYOUTS.items()},
}


class Contestant:
    """A loop that stands still until it is given a turn, and again once its step is reported."""

    def __init__(self, loop: Callable[[Setting, Report], None], setting: Setting):
        self.times: list[float] = []  # seconds of each step
        self.peak_bytes = 0  # on a GPU, of its own tensors
        self._loop = greenlet(loop)
        self._arguments: tuple[Any, ...] = (setting, getcurrent().switch)
        self._device = setting.device
        self._held = 0

    def take_turn(self) -> float:
        """Let it do one step; returns the loss."""
        before = self._memory()
        begun = time.perf_counter()
        loss = self._loop.switch(*self._arguments)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = max(self.peak_bytes, self._held + torch.cuda.max_memory_allocated() - before)
        self.times.append(time.perf_counter() - begun)
        self._arguments = ()
        self._held += self._memory() - before
        return loss

    def finish(self) -> None:
        """After its last step: let the loop end."""
        while not self._loop.dead:
            self._loop.switch()

    def _memory(self) -> int:
        if self._device.type == "cpu":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def prepare(size: Size, steps: int, folder: Path, device: torch.device, precision: str) -> Setting:
    """Random weights, and a token store of random documents, each as long as a sequence."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=size.length, use_cache=False, **size.shape)
    config._attn_implementation = "sdpa"
    rows = steps * size.rows
    documents = (Document(row) for row in torch.randint(0, config.vocab_size, (rows, size.length)).numpy())
    store = folder / "store"
    store.mkdir()
    write_store(
        store,
        documents,
        Layout("windows"),
        vocabulary_size=config.vocab_size,
        seed=0,
        metadata={"source": "random", "documents_are": "all"},
    )
    opened = open_store(store, size.length)
    batches = Batches([opened], None, seed=0, global_batch_size=size.rows, total_samples=rows, data_rank=0, data_size=1)
    return Setting(size, LlamaForCausalLM(config), batches, steps, folder, device, precision)


def compete(setting: Setting, names: list[str]) -> dict[str, Contestant]:
    """All take their turns, in an order that rotates; checks in each round that they train the same."""
    contestants = {name: Contestant(CONTESTANTS[name], setting) for name in names}
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        for step in range(setting.steps):
            if step == WARMUP:
                gc.collect()
                gc.freeze()  # what all of them have built is nobody's garbage
            turn = step % len(names)
            losses = {name: contestants[name].take_turn() for name in names[turn:] + names[:turn]}
            spread = max(losses.values()) / min(losses.values()) - 1
            assert spread < TOLERANCE[setting.precision], (step, losses)
        for contestant in contestants.values():
            contestant.finish()
    gc.unfreeze()
    if dist.is_initialized():
        dist.destroy_process_group()
    return contestants


def interval(ratios: torch.Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % confidence interval of the median (bootstrap)."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(ratios), (draws, len(ratios)), generator=generator)
    medians = ratios[picks].median(dim=1).values
    return medians.quantile(0.025).item(), medians.quantile(0.975).item()


def show(name: str, setting: Setting, contestants: dict[str, Contestant]) -> None:
    size, model = setting.size, setting.model
    tokens = size.rows * size.length
    needed = arithmetic(model, size.length)
    assert needed is not None
    flops = needed.flops_per_token
    peak = peak_flops(torch.cuda.get_device_name()) if setting.device.type == "cuda" else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rounds = setting.steps - WARMUP
    print(
        f"\n{name}: {parameters:,} parameters, {size.rows} x {size.length} tokens a step, {rounds} rounds\n  {needed}"
    )
    times = {who: torch.tensor(c.times[WARMUP:], dtype=torch.float64) for who, c in contestants.items()}
    for who, seconds in times.items():
        speed = tokens / seconds.median().item()
        line = f"  {who:<24} {seconds.median().item() * 1e3:9.1f} ms {speed:10,.0f} tok/s"
        line += f" {speed * flops / 1e12:8.3f} TFLOP/s"
        if setting.device.type == "cuda":
            line += f"  MFU {speed * flops / peak:.1%}" if peak else "  MFU ?"
            line += f"  {contestants[who].peak_bytes / 2**30:.1f} GiB"
        print(line)
    for who in LAYOUTS:
        for other in ("plain", ONEDNN, "Trainer"):
            if who in times and other in times:
                ratios = times[who] / times[other]
                low, high = interval(ratios)
                print(f"  {who} / {other} = {ratios.median().item():.4f}   ({low:.4f} to {high:.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="counted rounds for each size")
    parser.add_argument("--sizes", default="1M,6M", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=list(TOLERANCE))
    parser.add_argument("--contestants", help=f"of {', '.join(CONTESTANTS)}; default: all that can compute there")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    used = device.type == "cpu" and arguments.precision == "fp32" and mkl_is_slow()
    able = [name for name in CONTESTANTS if used or name != ONEDNN]
    able = [name for name in able if device.type == "cuda" or "flash" not in name]
    names = arguments.contestants.split(",") if arguments.contestants else able
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores"
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {where}, "
        f"{torch.get_num_threads()} threads, {arguments.precision}"
    )
    for name in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            setting = prepare(SIZES[name], WARMUP + arguments.steps, Path(folder), device, arguments.precision)
            show(name, setting, compete(setting, names))


if __name__ == "__main__":
    main()
