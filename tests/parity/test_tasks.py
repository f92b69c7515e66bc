"""A task over rows on any engine and any number of ranks is what plain transformers trains on one process."""

from functools import cache

import pytest
import torch
from sklearn.metrics import f1_score

from bigtrain.models.weights import RandomWeights
from bigtrain.tasks.classify import Classify
from tests.parity import cases, plain
from tests.parity.test_steps import LAYOUTS, STEPS, relative

TASK = {"whole": cases.labelled_batch, "build_model": cases.classifier_builder(), "task": Classify(labels=cases.LABELS)}


def first_model():
    build = cases.classifier_builder()
    model, reader = build(), RandomWeights(build(meta=True), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name, "weight", (0,) * parameter.dim(), tuple(parameter.shape)))
    return model


@cache
def reference():
    """Losses, norms and weights of a plain loop with transformers' own loss."""
    model = first_model()
    groups = [
        {"params": [p for n, p in model.named_parameters() if plain.decays(n, p)], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if not plain.decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    losses, norms = [], []
    for step in range(STEPS):
        batch = cases.labelled_batch(step)
        loss = model(batch["input_ids"], batch["attention_mask"], labels=batch["targets"]).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = cases.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, dict(model.named_parameters())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_classification_equals_the_plain_loop(pools, layout, size):
    losses, norms, weights = reference()
    for got_losses, got_norms, state in pools(size)(cases.trained, layout, STEPS, micro=2, **TASK):
        assert relative(got_losses, losses) < 1e-6
        assert relative(got_norms, norms) < 1e-6
        assert {name for name, slot in state if slot == "weight"} == set(weights)
        for name, weight in weights.items():
            # the gradient of a bias of keys is zero but for rounding
            assert (state[name, "weight"] - weight).norm() <= 1e-5 * weight.norm() + 1e-8, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_without_rows_take_part(pools, layout):
    one, _, _ = pools(1)(cases.trained, "ddp", 3, rows=2, **TASK)[0]
    for losses, _, _ in pools(3)(cases.trained, layout, 3, rows=2, **TASK):
        assert relative(losses, one) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_those_of_scikit_learn(pools, layout):
    batches = [cases.labelled_batch(step, rows) for step, rows in ((0, 7), (1, 2), (2, 5))]
    model = first_model().eval()
    with torch.no_grad():
        logits = torch.cat([model(batch["input_ids"], batch["attention_mask"]).logits for batch in batches])
    targets, predicted = torch.cat([batch["targets"] for batch in batches]), logits.argmax(-1)
    for sums in pools(3)(cases.evaluated, layout, **TASK):
        metrics = Classify(labels=cases.LABELS).metrics(sums)
        assert metrics["targets"] == 14
        assert metrics["accuracy"] == pytest.approx((predicted == targets).double().mean().item())
        assert metrics["macro_f1"] == pytest.approx(
            f1_score(targets, predicted, labels=range(3), average="macro", zero_division=0)
        )
        assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
