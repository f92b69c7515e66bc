"""What is kept of a parameter belongs to it: another optimizer's slots, and nothing of what does not train."""

from functools import cache, partial
from math import prod

import pytest
import torch
import torch.distributed as dist

from bigtrain.checkpoint import Checkpoint, Retention, complete, save, save_frozen
from bigtrain.models.weights import RandomWeights
from bigtrain.optim.sgd import SGD
from tests.parity import cases, plain
from tests.parity.test_steps import LAYOUTS, STEPS, first_model, relative

OPTIMIZER = SGD(lr=1e-2, momentum=0.8, nesterov=True, weight_decay=0.1, max_grad_norm=0.88, ema=0.9)
FREEZE = ("model.embed_tokens", "model.layers.0.*", "*.1.mlp.down_proj.weight")  # the head is tied to the embedding
TOUR = [("zero3", 3), ("fsdp", 2), ("zero1", 2), ("ddp", 1), ("zero2", 3)]


@cache
def reference(freeze=(), build=None, dtype=None, steps=STEPS):
    """Losses, norms and weights of the plain loop."""
    model = first_model()
    frozen = cases.model_builder(freeze=freeze)(meta=True)
    for (_, parameter), (_, same) in zip(model.named_parameters(), frozen.named_parameters(), strict=True):
        parameter.requires_grad_(same.requires_grad)
    batches = [tuple(cases.global_batch(step).values()) for step in range(steps)]
    lrs = [cases.learning_rate(step) for step in range(steps)]
    losses, norms = plain.train(model, batches, lrs, build=build, dtype=dtype)
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("layout", "size"), [("ddp", 1), *((layout, 2) for layout in LAYOUTS), ("zero2", 3)])
def test_sgd_equals_the_plain_loop(pools, layout, size):
    build = partial(torch.optim.SGD, momentum=OPTIMIZER.momentum, nesterov=True)
    losses, norms, weights = reference(build=build)
    for got_losses, got_norms, state in pools(size)(cases.trained, layout, STEPS, optimizer=OPTIMIZER):
        assert relative(got_losses, losses) < 1e-6
        assert relative(got_norms, norms) < 1e-6
        assert {slot for _, slot in state} == {"weight", "momentum_buffer", "ema"}
        for name, weight in weights.items():
            assert (state[name, "weight"] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sgd_resumed_is_exact(pools, tmp_path, layout):
    run = partial(pools(2), optimizer=OPTIMIZER)
    losses, norms, state = run(cases.trained, layout, 4, micro=1)[0]
    _, first, first_norms, _ = run(cases.segment, layout, tmp_path, 0, 2)[0]
    _, second, second_norms, resumed = run(cases.segment, layout, tmp_path, 2, 2)[0]
    assert (first + second, first_norms + second_norms) == (losses, norms)
    assert state.keys() == resumed.keys()
    for key, tensor in state.items():
        assert torch.equal(resumed[key], tensor), key


@pytest.mark.parametrize("optimizer", [OPTIMIZER, SGD(lr=1e-2, momentum=0.0)], ids=["momentum", "none"])
def test_sgd_goes_from_engine_to_engine(pools, tmp_path, optimizer):
    uninterrupted, _, _ = pools(1)(cases.trained, "ddp", 2 * len(TOUR), micro=1, optimizer=optimizer)[0]
    losses, before = [], None
    for i, (layout, size) in enumerate(TOUR):
        loaded, here, _, after = pools(size)(cases.segment, layout, tmp_path, 2 * i, 2, optimizer=optimizer)[0]
        for key, tensor in (before or {}).items():
            assert torch.equal(loaded[key], tensor), key
        losses, before = losses + here, after
    assert losses == pytest.approx(uninterrupted, rel=1e-6)


def whole_frozen(engine):
    """The frozen weights of all ranks as whole tensors in fp32, and the dtypes in which they are kept."""
    everyone = [None] * dist.get_world_size()
    mine = [(b.name, b.shape, b.offsets, b.tensor.clone()) for b in engine._frozen_boxes()]
    dist.all_gather_object(everyone, mine)
    whole, dtypes = {}, set()
    for name, shape, offsets, tensor in (box for boxes in everyone for box in boxes):
        full = whole.setdefault(name, torch.full(shape, torch.nan))
        full[tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))] = tensor.float()
        dtypes.add(tensor.dtype)
    return whole, dtypes


def kept_by_the_optimizer(engine):
    """Elements of the fp32 weights that the optimizer updates on this rank, and of all its slots."""
    groups = engine._optimizer.param_groups
    flats = getattr(engine._zero, "fp32_partitioned_groups_flat", None) if hasattr(engine, "_zero") else None
    tensors = flats or [parameter for group in groups for parameter in group["params"]]
    weights = sum(getattr(t, "_local_tensor", t).numel() for t in tensors)
    states = [v for state in engine._optimizer.state.values() for v in state.values() if v.dim()]
    return weights, sum(getattr(t, "_local_tensor", t).numel() for t in states)


def frozen_segment(layout, folder, first, count, precision, freeze=FREEZE):
    """Continue from the newest checkpoint in `folder`, whose frozen weights are saved first of all, and save.

    Returns (losses, norms, state, frozen weights, their dtypes, what the optimizer of each rank keeps).
    """
    found = complete(folder)
    checkpoint = Checkpoint(found[-1]) if found else None
    build_model = cases.model_builder(freeze=freeze)
    if checkpoint is None:
        empty = build_model(meta=True)
        shapes = {n: tuple(p.shape) for n, p in empty.named_parameters() if not p.requires_grad}
        save_frozen(folder, shapes, RandomWeights(empty, seed=0))
    engine = cases.make(
        layout, micro=1, precision=precision, build_model=build_model, reader=checkpoint,
        progress=checkpoint and checkpoint.progress,
    )  # fmt: skip
    outcomes = [engine.step(cases.share(s), cases.learning_rate(s)) for s in range(first, first + count)]
    save(folder, first + count, engine.boxes(), engine.progress(), Retention(keep=1), frozen=True)
    state, (frozen, dtypes), kept = cases.collect(engine), whole_frozen(engine), kept_by_the_optimizer(engine)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, kept)
    engine.close()
    return [o.loss.item() for o in outcomes], [o.grad_norm.item() for o in outcomes], state, frozen, dtypes, everyone


@pytest.mark.parametrize(("layout", "size"), [("ddp", 1), *((layout, 2) for layout in LAYOUTS), ("zero3", 3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_stays_and_costs_nothing(pools, tmp_path, layout, size, precision):
    """Losses, norms and weights are those of a plain loop; frozen weights keep their bits, have no fp32 weight and no
    slot in the optimizer, and a resume goes on as if nothing had happened."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    losses, norms, weights = reference(FREEZE, dtype=None if precision == "fp32" else dtype)
    folders = [tmp_path / name / "checkpoints" for name in ("whole", "parts")]
    got_losses, got_norms, state, frozen, dtypes, kept = pools(size)(
        frozen_segment, layout, folders[0], 0, STEPS, precision
    )[0]
    assert relative(got_losses, losses) < (1e-6 if precision == "fp32" else 2e-3)
    assert relative(got_norms, norms) < (1e-6 if precision == "fp32" else 1e-2)
    first = dict(first_model().named_parameters())
    still = {name for name in weights if torch.equal(weights[name], first[name])}
    assert len(still) == 11
    assert frozen.keys() == still
    assert dtypes == {dtype}
    assert all(torch.equal(frozen[name], first[name].to(dtype).float()) for name in still)
    trained = weights.keys() - still
    assert state.keys() == {(name, slot) for name in trained for slot in ("weight", "exp_avg", "exp_avg_sq", "ema")}
    if precision == "fp32":
        for name in trained:
            assert (state[name, "weight"] - weights[name]).norm() <= 1e-5 * weights[name].norm(), name
    elements = sum(prod(weights[name].shape) for name in trained)
    copies = size if layout == "ddp" else 1
    padding = 2 * size * len(trained)  # of ZeRO
    total = [sum(part) for part in zip(*kept, strict=True)]
    assert copies * elements <= total[0] <= copies * (elements + padding)
    assert 3 * copies * elements <= total[1] <= 3 * copies * (elements + padding)
    parts = [pools(size)(frozen_segment, layout, folders[1], a, n, precision)[0] for a, n in ((0, 4), (4, STEPS - 4))]
    assert [one + other for one, other in zip(parts[0][:2], parts[1][:2], strict=True)] == [got_losses, got_norms]
    assert all(torch.equal(parts[1][2][key], tensor) for key, tensor in state.items())


def test_frozen_weights_go_from_engine_to_engine_and_keep_their_bits(pools, tmp_path):
    """In bf16 no engine has them in fp32; checkpoints do."""
    losses, _, weights = reference(FREEZE, dtype=torch.bfloat16, steps=2 * len(TOUR))
    folder, got = tmp_path / "checkpoints", []
    for i, (layout, size) in enumerate(TOUR):
        got += pools(size)(frozen_segment, layout, folder, 2 * i, 2, "bf16")[0][0]
    assert relative(got, losses) < 2e-3
    checkpoint, empty = Checkpoint(complete(folder)[-1]), cases.model_builder()(meta=True)
    checkpoint.check_fit(empty)
    first = dict(first_model().named_parameters())
    for name, parameter in first.items():
        whole = checkpoint.read(name, "weight", (0,) * parameter.dim(), tuple(parameter.shape))
        frozen = checkpoint.slots_of(name) == ["weight"]
        assert torch.equal(whole, parameter) == frozen, name
        assert frozen == torch.equal(weights[name], parameter)


def test_a_tied_weight_is_frozen_by_any_of_its_names(pools, tmp_path):
    frozen = pools(2)(frozen_segment, "fsdp", tmp_path / "checkpoints", 0, 1, "fp32", ("lm_head",))[0][3]
    assert frozen.keys() == {"model.embed_tokens.weight"}
