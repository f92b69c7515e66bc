"""What the ranks of the parity tests run: importable functions, small models, uneven and partly masked batches."""

from functools import partial

import torch
import torch.distributed as dist
from transformers import AutoConfig

from bigtrain.checkpoint import Checkpoint, Retention, complete, save
from bigtrain.data.batches import Batch
from bigtrain.data.types import IGNORE
from bigtrain.models.architecture import empty_model
from bigtrain.models.weights import RandomWeights
from bigtrain.optim.adamw import AdamW
from bigtrain.parallel import build_engine, task_module
from bigtrain.parallel.dims import ParallelDims
from bigtrain.tasks.pretrain import Pretrain

LENGTH = 24
VOCABULARY = 97
OPTIMIZER = AdamW(
    lr=1e-2, eps=1e-4, betas=[0.9, 0.95], weight_decay=0.1, max_grad_norm=0.88, ema=0.9
)  # clips some steps
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def model_builder(tied=True, activation_checkpointing="none", freeze=(), **changes):
    values = {**LLAMA, "tie_word_embeddings": tied, **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return partial(
        empty_model, config, attention="sdpa", activation_checkpointing=activation_checkpointing, freeze=freeze
    )


def global_batch(step, rows=7):
    """`rows` sequences of two packed documents of random lengths, partly masked; the second row trains on nothing."""
    generator = torch.Generator().manual_seed(1000 + step)
    input_ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    targets = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    targets[torch.rand(rows, LENGTH, generator=generator) < 0.3] = IGNORE
    if rows > 1:
        targets[1] = IGNORE
    border = torch.randint(1, LENGTH, (rows, 1), generator=generator)
    position_ids = torch.arange(LENGTH).expand(rows, LENGTH)
    return {
        "input_ids": input_ids,
        "targets": targets,
        "position_ids": torch.where(position_ids < border, position_ids, position_ids - border),
    }


LABELS = ["ham", "spam", "neither"]
BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": len(LABELS),
}


def classifier_builder(activation_checkpointing="none"):
    config = AutoConfig.for_model("bert", **BERT)
    options = {"attention": "sdpa", "activation_checkpointing": activation_checkpointing}
    return partial(empty_model, config, kind="sequence_classification", **options)


def labelled_batch(step, rows=7):
    """`rows` texts of random lengths, each with a label."""
    generator = torch.Generator().manual_seed(1000 + step)
    lengths = torch.randint(1, LENGTH, (rows, 1), generator=generator)
    mask = (torch.arange(LENGTH).expand(rows, LENGTH) < lengths).long()
    input_ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator) * mask
    targets = torch.randint(0, len(LABELS), (rows,), generator=generator)
    return {"input_ids": input_ids, "attention_mask": mask, "targets": targets}


def share(step, rows=7, whole=global_batch):
    """This rank's part of a global batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * rows // size, (rank + 1) * rows // size)
    return Batch({key: tensor[mine] for key, tensor in whole(step, rows).items()}, rows, step)


def learning_rate(step):
    return 1e-2 * (step + 1) / 10


def make(
    layout,
    *,
    micro=2,
    precision="fp32",
    tied=True,
    checkpointing="none",
    task=None,
    replicate=1,
    compile=False,
    reader=None,
    progress=None,
    optimizer=OPTIMIZER,
    build_model=None,
    freeze=(),
    seed=0,
):
    """An engine of the named layout with random weights, or those of `reader`."""
    build_model = build_model or model_builder(tied, checkpointing, freeze)
    engine = build_engine(
        layout,
        build_model,
        task or Pretrain(),
        dims=ParallelDims.of(layout, dist.get_rank(), dist.get_world_size(), replicate),
        precision=precision,
        compile=compile,
        micro_batch_size=micro,
        optimizer=optimizer,
        seed=seed,
        device=torch.device("cpu"),
    )
    engine.load(reader or RandomWeights(build_model(meta=True), seed=0), progress or {"updates": 0})
    return engine


def collect(engine):
    """The boxes of all ranks as whole tensors {(name, slot): tensor}; each element must come exactly once."""
    mine = [(b.name, b.slot, b.shape, b.offsets, b.tensor.clone()) for b in engine.boxes()]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole, seen = {}, {}
    for name, slot, shape, offsets, tensor in (box for boxes in everyone for box in boxes):
        full = whole.setdefault((name, slot), torch.full(shape, torch.nan))
        times = seen.setdefault((name, slot), torch.zeros(shape))
        place = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
        full[place] = tensor
        times[place] += 1
    assert all((times == 1).all() for times in seen.values())
    return whole


def trained(layout, steps=6, rows=7, whole=global_batch, **kwargs):
    """(losses, gradient norms, whole state) after some steps from random weights."""
    engine = make(layout, **kwargs)
    outcomes = [engine.step(share(step, rows, whole), learning_rate(step)) for step in range(steps)]
    state = collect(engine)
    engine.close()
    return [o.loss.item() for o in outcomes], [o.grad_norm.item() for o in outcomes], state


def evaluated(layout, whole=global_batch, **kwargs):
    """The sums of an evaluation of three batches, with random weights."""
    engine = make(layout, **kwargs)
    sums = engine.evaluate(share(step, rows, whole) for step, rows in ((0, 7), (1, 2), (2, 5)))
    engine.close()
    return sums


def by_chunks(function, layout, **kwargs):
    """`function` with so few logits at once that each micro-batch takes several chunks; (its result, how many)."""
    chunks = []

    class Counted(Pretrain):
        def sums(self, logits, batch, training):
            chunks.append(logits.shape)
            return super().sums(logits, batch, training)

    kept = task_module.LOGITS_AT_ONCE
    task_module.LOGITS_AT_ONCE = 10 * VOCABULARY
    try:
        result = function(layout, task=Counted(), **kwargs)
    finally:
        task_module.LOGITS_AT_ONCE = kept
    assert all(shape.numel() <= 10 * VOCABULARY for shape in chunks)
    return result, len(chunks)


def compiled(layout, steps=5):
    """(losses, gradient norms, the compiler's graphs after two steps, at the end, graph breaks).

    The last step has fewer rows than the others.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = make(layout, micro=2, compile=True)
    counters = torch._dynamo.utils.counters
    outcomes, graphs = [], []
    for step in range(steps):
        outcomes.append(engine.step(share(step, 7 if step + 1 < steps else 3), learning_rate(step)))
        graphs.append(counters["stats"]["unique_graphs"])
    engine.close()
    losses, norms = [o.loss.item() for o in outcomes], [o.grad_norm.item() for o in outcomes]
    return losses, norms, graphs, dict(counters["graph_break"])


def segment(layout, folder, first, count, precision="fp32", **kwargs):
    """Continue from the newest checkpoint in `folder` for some steps and save.

    Returns (state as loaded, losses, gradient norms, state at the end).
    """
    found = complete(folder)
    checkpoint = Checkpoint(found[-1]) if found else None
    assert (checkpoint.step if checkpoint else 0) == first
    options = {"reader": checkpoint, "progress": checkpoint and checkpoint.progress, **kwargs}
    engine = make(layout, micro=1, precision=precision, **options)
    loaded = collect(engine)
    outcomes = [engine.step(share(s), learning_rate(s)) for s in range(first, first + count)]
    save(folder, first + count, engine.boxes(), engine.progress(), Retention(keep=1))
    state = collect(engine)
    engine.close()
    return loaded, [o.loss.item() for o in outcomes], [o.grad_norm.item() for o in outcomes], state


def not_finite(layout):
    """What of the state is not finite, as this rank hears it: after a step, with one of the last rank's numbers
    infinite, and after an update that leaves nothing finite."""
    engine = make(layout)
    engine.step(share(0), learning_rate(0))
    found = [engine.not_finite()]
    boxes = [box for box in engine.boxes() if box.slot == "exp_avg_sq"]
    if boxes and dist.get_rank() == dist.get_world_size() - 1:
        tensor = boxes[-1].tensor
        tensor[(-1,) * tensor.dim()] = torch.inf
    found.append(engine.not_finite())
    engine.step(share(1), 1e39)
    found.append(engine.not_finite())
    engine.close()
    return found
