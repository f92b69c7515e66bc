"""The reference: a plain PyTorch training loop on one process, free of bigtrain."""

import torch
import torch.nn.functional as F
from torch.optim import AdamW


def decays(name, parameter):
    return parameter.dim() > 1 and not name.endswith("bias")


def backward(model, batch, dtype=None, scale=1.0):
    """Leave the gradients of `scale` times a batch's mean loss on the parameters; returns the loss.

    batch: (input_ids, targets, position_ids), each (rows, length). With a `dtype`, forward and backward run on a copy
    of the weights cast to it, one row at a time, and gradients accumulate in fp32.
    """
    input_ids, targets, position_ids = batch
    named = dict(model.named_parameters())
    count = (targets != -100).sum()
    total = 0.0
    rows = [slice(None)] if dtype is None else [slice(i, i + 1) for i in range(len(input_ids))]
    for row in rows:
        weights = named if dtype is None else {n: p.to(dtype) for n, p in named.items()}
        logits = torch.func.functional_call(
            model,
            weights,
            kwargs={"input_ids": input_ids[row], "position_ids": position_ids[row], "use_cache": False},
        ).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets[row].flatten(), reduction="sum")
        (loss / count * scale).backward()
        total += loss.item()
    return total / count.item()


def train(
    model, batches, lrs, *, eps=1e-4, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=0.88, dtype=None, build=None
):
    """A step on each of `batches`, which are as `backward` takes them, with a `dtype` too.

    build: of another optimizer than AdamW. Returns the losses and the gradient norms before clipping; updates `model`.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for n, p in named.items() if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=lrs[0], betas=betas, eps=eps) if build is None else build(groups, lr=lrs[0])
    losses, norms = [], []
    for batch, lr in zip(batches, lrs, strict=True):
        losses.append(backward(model, batch, dtype))
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), max_grad_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms
