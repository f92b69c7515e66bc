"""The faults that `python -m tests.mutants` plants: each is one that somebody could make.

A fault is found by its old text, which is in the package once, so that it may move from file to file.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """tests: arguments of pytest for the tests that should fail. known: why it survives, where that is accepted."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    known: str = ""


STEPS = "tests/parity/test_steps.py"
LOOP = "tests/parity/test_loop.py"
STATE = "tests/parity/test_state.py"
PRECISION = "tests/parity/test_precision.py"
PLAIN = (f"{STEPS} -k fp32_equals",)
BF16 = (f"{STEPS} {PRECISION} -k 'bf16'",)
RESUMED = (f"{STATE} -k 'exact or engine_to_engine'",)

ENGINES = [
    Fault(
        "targets-of-this-rank-alone",
        "    if dist.get_world_size() > 1:\n        dist.all_reduce(counts)\n",
        "",
        PLAIN,
    ),
    Fault(
        "mean-of-means-of-micro-batches",
        '(sums["loss"] * weight).backward()',
        '(sums["loss"] / sums["targets"].clamp(min=1) / len(micros) / self._dims.data_size).backward()',
        PLAIN,
    ),
    Fault(
        "zero3-takes-a-mean-for-a-sum",
        "weight = (self._dims.data_size if self._stage == 3 else 1) /",
        "weight = 1 /",
        PLAIN,
    ),
    Fault(
        "loss-of-this-rank-alone",
        'loss = sum_over_ranks({"loss": loss})["loss"]\n',
        "\n",
        PLAIN,
    ),
    Fault(
        "reduced-after-the-first-micro-batch",
        "self._module.set_requires_all_reduce(i == len(micros) - 1)",
        "self._module.set_requires_all_reduce(i == 0)",
        PLAIN,
    ),
    Fault("gradients-reduced-in-bf16", "reduce_dtype=torch.float32", "reduce_dtype=cast", BF16),
    Fault(
        "one-process-keeps-the-last-micro-batch-alone",
        "master.grad += copy.grad",
        "master.grad = copy.grad.float()",
        (f"{PRECISION} -k accumulate", f"{STEPS} -k bf16"),
    ),
    Fault(
        "copies-are-not-refreshed-by-a-step",
        "self._updates += 1\n            if self._copies is not None:\n                self._copies.refresh()",
        "self._updates += 1",
        (f"{STEPS} -k bf16",),
    ),
    Fault(
        "copies-are-not-refreshed-by-loading",
        "trim_memory()\n        if self._copies is not None:\n            self._copies.refresh()",
        "trim_memory()",
        (f"{STEPS} -k bf16",),
    ),
    Fault(
        "gradients-accumulate-in-bf16",
        '"data_types": {"grad_accum_dtype": "fp32"},',
        '"data_types": {"grad_accum_dtype": "bf16"} if precision == "bf16" else {},',
        BF16,
    ),
    Fault(
        "bf16-parameters-are-not-cast",
        "cast = None if dtype == torch.float32 else dtype",
        "cast = None",
        BF16,
    ),
    Fault(
        "gradients-are-scaled-up-to-the-limit",
        "clip = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)",
        "clip = self._max_grad_norm / (norm + 1e-6)",
        PLAIN,
    ),
    Fault(
        "the-norm-of-a-share",
        "torch.nn.utils.get_total_norm(gradients)",
        "torch.nn.utils.get_total_norm([_local(gradient) for gradient in gradients])",
        PLAIN,
    ),
    Fault(
        "clipping-is-left-out",
        '"gradient_clipping": max_grad_norm or 0.0',
        '"gradient_clipping": 0.0',
        PLAIN,
    ),
    Fault(
        "the-head-is-not-tied-again",
        "model.tie_weights()  # making parameters real one by one has untied them\n",
        "\n",
        PLAIN,
    ),
    Fault(
        "the-loss-scale-stays-in-the-norm",
        "norm = norm / scale\n",
        "\n",
        (f"{PRECISION} -k fp16", "tests/unit/test_loss_scale.py"),
    ),
    Fault(
        "dropout-is-the-same-on-all-ranks",
        "* 65_537 + rank) % 2**63",
        "* 65_537) % 2**63",
        ("tests/unit/test_contract.py", f"{LOOP} -k dropout"),
    ),
    Fault(
        "dropout-is-the-same-in-all-steps",
        "(seed * 1_000_003 + step) * 65_537",
        "(seed * 1_000_003) * 65_537",
        ("tests/unit/test_contract.py", f"{LOOP} -k dropout"),
    ),
    Fault(
        "dropout-in-evaluations",
        "was_training = module.training\n    module.eval()\n",
        "was_training = module.training\n",
        (f"{LOOP} -k dropout",),
    ),
    Fault(
        "an-evaluation-keeps-its-last-batch-alone",
        "totals[key] = totals[key] + value if key in totals else value",
        "totals[key] = value",
        (f"{STEPS} -k evaluation",),
    ),
    Fault(
        "micro-batches-without-the-last-rows",
        "fullest = -(-batch.rows // data_size)",
        "fullest = max(1, batch.rows // data_size)",
        ("tests/unit/test_contract.py", f"{STEPS} -k fp32_equals"),
    ),
    Fault(
        "missing-rows-are-learned",
        "tensor.new_full((missing, *shape), DUMMY.get(key, 0))",
        "tensor.new_full((missing, *shape), 0)",
        PLAIN,
    ),
    Fault(
        "the-heads-gradient-is-summed-in-bf16",
        "self._sum = gradient.float()",
        "self._sum = gradient.clone()",
        ("tests/unit/test_loss.py", f"{PRECISION} -k chunks"),
    ),
    Fault(
        "a-chunk-is-left-out",
        "for key, value in sums.items()} if totals else sums\n        return totals",
        "for key, value in sums.items()} if i > 1 else sums\n        return totals",
        ("tests/unit/test_loss.py", f"{STEPS} -k chunks"),
    ),
    Fault(
        "what-is-not-finite-is-known-to-its-rank-alone",
        "dist.all_gather_object(everyone, bad)\n",
        "everyone = [bad]\n",
        (f"{STATE} -k not_finite",),
    ),
    Fault(
        "rows-by-rank-of-the-world",
        "return self.rank // self.tensor",
        "return self.rank",
        ("tests/unit/test_dims.py",),
    ),
    Fault("documents-see-each-other", '"use_cache": False', '"use_cache": True', ("tests/unit/test_isolation.py",)),
]

OPTIMIZERS = [
    Fault(
        "the-rate-of-the-step-before",
        "return self._learning_rate(self.done, self.steps)",
        "return self._learning_rate(max(0, self.done - 1), self.steps)",
        (f"{LOOP} -k rate",),
    ),
    Fault(
        "the-rate-is-set-after-the-step",
        '            for group in self._optimizer.param_groups:\n                group["lr"] = lr\n'
        "            self._optimizer.step()\n",
        "            self._optimizer.step()\n"
        '            for group in self._optimizer.param_groups:\n                group["lr"] = lr\n',
        (f"{LOOP} -k rate",),
    ),
    Fault(
        "the-rate-of-one-group-alone",
        'for group in self._optimizer.param_groups:\n            group["lr"] = lr\n        # DeepSpeed',
        'for group in self._optimizer.param_groups[:1]:\n            group["lr"] = lr\n        # DeepSpeed',
        (f"{LOOP} -k rate",),
    ),
    Fault(
        "cosine-that-ends-late",
        "x = min(1.0, (step + 1) / max(1, steps))\n        return self.between((1 + math",
        "x = min(1.0, step / max(1, steps))\n        return self.between((1 + math",
        ("tests/unit/test_schedules.py",),
    ),
    Fault(
        "cosine-that-ends-early",
        "x = min(1.0, (step + 1) / max(1, steps))\n        return self.between((1 + math",
        "x = min(1.0, (step + 2) / max(1, steps))\n        return self.between((1 + math",
        ("tests/unit/test_schedules.py", f"{LOOP} -k rate"),
    ),
    Fault(
        "warm-up-from-zero",
        "return peak * (step + 1) / warmup",
        "return peak * step / warmup",
        ("tests/unit/test_schedules.py",),
    ),
    Fault(
        "the-floor-is-forgotten",
        "return self.min_ratio + (1 - self.min_ratio) * part",
        "return part",
        ("tests/unit/test_schedules.py",),
    ),
    Fault(
        "norms-decay",
        "(spared if bias or dimensions < 2 or id(parameter) in exempt else decays)",
        "(spared if bias else decays)",
        ("tests/unit/test_optim.py",),
    ),
    Fault(
        "biases-decay",
        "(spared if bias or dimensions < 2",
        "(spared if dimensions < 2",
        ("tests/unit/test_optim.py",),
    ),
    Fault(
        "nothing-decays-in-zero3",
        'len(getattr(parameter, "ds_shape", parameter.shape))',
        "len(parameter.shape)",
        ("tests/unit/test_optim.py", *PLAIN),
    ),
    Fault(
        "betas-changed-over",
        "betas=(self.betas[0], self.betas[1])",
        "betas=(self.betas[1], self.betas[0])",
        PLAIN,
    ),
    Fault("epsilon-is-the-librarys", "eps=self.eps, fused=True", "fused=True", PLAIN),
    Fault(
        "the-average-follows-too-fast",
        "torch._foreach_lerp_(averages, weights, 1 - decay)",
        "torch._foreach_lerp_(averages, weights, decay)",
        ("tests/unit/test_optim.py",),
    ),
    Fault(
        "the-average-is-the-weight-itself",
        "state[slot] = parameter.detach().clone()",
        "state[slot] = parameter.detach()",
        ("tests/unit/test_optim.py",),
    ),
]

DATA = [
    Fault(
        "each-epoch-in-the-same-order",
        "make_key(self._seed, source, int(epoch))",
        "make_key(self._seed, source, 0)",
        ("tests/unit/test_order.py",),
    ),
    Fault(
        "the-seed-orders-nothing",
        "make_key(self._seed, source, int(epoch))",
        "make_key(0, source, int(epoch))",
        ("tests/unit/test_order.py",),
    ),
    Fault(
        "rows-of-the-next-rank",
        "numbers[self.data_rank * rows // self.data_size : (self.data_rank + 1) * rows // self.data_size]",
        "numbers[(self.data_rank + 1) * rows // self.data_size : (self.data_rank + 2) * rows // self.data_size]",
        ("tests/unit/test_batches.py",),
    ),
    Fault(
        "rows-that-do-not-divide-are-lost",
        "numbers[self.data_rank * rows // self.data_size : (self.data_rank + 1) * rows // self.data_size]",
        "numbers[self.data_rank * (rows // self.data_size) : (self.data_rank + 1) * (rows // self.data_size)]",
        ("tests/unit/test_batches.py",),
    ),
    Fault(
        "the-last-step-goes-on",
        "np.arange(first, min(first + self.global_batch_size, self.total_samples))",
        "np.arange(first, first + self.global_batch_size)",
        ("tests/unit/test_batches.py",),
    ),
    Fault(
        "a-document-follows-from-the-one-before",
        "targets[starts - 1] = IGNORE  # the first token",
        "pass  # the first token",
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "the-loss-mask-of-windows-is-shifted",
        "self._loss_mask[first + 1 : first + length + 1]",
        "self._loss_mask[first : first + length]",
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "the-loss-mask-of-packed-documents-is-not-read",
        "targets[~self._loss_mask[first:last]] = IGNORE",
        "pass",
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "targets-are-not-shifted",
        "is_target[offsets[:-1] - first] = False",
        "is_target[offsets[1:] - first - 1] = False",
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "positions-run-one-behind",
        "return offsets - offsets[0] - np.arange(len(offsets))",
        "return offsets - offsets[0]",
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "padding-is-learned",
        "padded_targets = np.full(length, IGNORE, dtype=np.int64)",
        'padded_targets = np.full(length, self.manifest["pad_id"], dtype=np.int64)',
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "a-bin-too-full",
        "pairs = int(lengths[document]) - 1\n",
        "pairs = max(0, int(lengths[document]) - 2)\n",
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "a-stores-checksum-is-not-compared",
        "if xxhash.xxh3_64_intdigest(data) != self._sums[block]:",
        "if False:",
        ("tests/unit/test_store.py",),
    ),
    Fault(
        "texts-without-their-end",
        "[*before, *ids, *after]",
        "[*before, *ids]",
        ("tests/unit/test_tokenizer.py", "tests/unit/test_accounting.py", "tests/unit/test_prepare.py"),
    ),
    Fault(
        "held-out-documents-are-trained-on",
        'if is_held_out(row["key"], self.fraction) == self.held_out:',
        'if not self.held_out or is_held_out(row["key"], self.fraction):',
        ("tests/unit/test_store.py", "tests/unit/test_accounting.py"),
    ),
    Fault(
        "the-batch-of-another-step",
        "if self._ahead is not None and self._ahead[0] == step:",
        "if self._ahead is not None:",
        ("tests/unit/test_batches.py",),
    ),
    Fault(
        "a-source-that-changes-is-taken",
        "if not metadata.items() <= self._done[number].items():",
        "if False:",
        ("tests/unit/test_prepare.py -k 'changes_its_mind'",),
    ),
    Fault(
        "shuffled-over-the-border-of-shards",
        "start = ends[shard_ends[shard - 1] - 1] if shard and shard_ends[shard - 1] else 0",
        "start = ends[shard_ends[shard - 1]] if shard and shard_ends[shard - 1] else 0",
        ("tests/unit/test_store.py",),
    ),
]

CHATS = [
    Fault(
        "the-end-token-is-not-learned",
        "return found + len(self.end)",
        "return found",
        ("tests/unit/test_chat.py",),
    ),
    Fault(
        "a-completions-end-is-not-learned",
        "loss_mask = [False] * len(read) + [True] * len(learned)",
        "loss_mask = [False] * len(read) + [True] * (len(learned) - 1) + [False] * min(1, len(learned))",
        ("tests/unit/test_tokenizer.py", "tests/unit/test_chat.py", "tests/unit/test_accounting.py"),
    ),
    Fault(
        "turns-that-are-not-to-be-learned",
        'if message.get("train", True) and _says(message, template)',
        "if _says(message, template)",
        ("tests/unit/test_chat.py",),
    ),
    Fault(
        "forged-tokens-are-obeyed",
        "has_tokens = plain, self._of_template.search(joined) is not None",
        "has_tokens = plain, False",
        ("tests/unit/test_chat.py",),
    ),
    Fault(
        "answers-are-chained-whatever-was-rewritten",
        "if other.stop > self.start:\n            return False\n",
        "return True\n",
        ("tests/unit/test_chat.py",),
    ),
    Fault(
        "answers-are-learned-twice-in-a-split",
        'turns = [turn | {"train": False} for turn in self._turns[start:begin]]',
        "turns = [turn for turn in self._turns[start:begin]]",
        ("tests/unit/test_chat.py",),
    ),
    Fault(
        "the-mask-of-an-answer-is-shifted",
        "loss_mask[at] = begin >= start and end > start",
        "loss_mask[at] = begin > start and end > start",
        ("tests/unit/test_chat.py",),
    ),
    Fault(
        "the-prompt-is-learned",
        "pieces: list[tuple[str, bool | list[Span]]] = [(document.text[: boundaries[1]], False)]",
        "pieces: list[tuple[str, bool | list[Span]]] = [(document.text[: boundaries[1]], True)]",
        ("tests/unit/test_chat.py",),
    ),
]

CHECKPOINTS = [
    Fault(
        "a-moment-is-not-saved",
        'if slot != "step" and isinstance(t, Tensor)',
        'if slot not in ("step", "exp_avg_sq") and isinstance(t, Tensor)',
        RESUMED,
    ),
    Fault(
        "the-optimizer-begins-to-count-anew",
        'state["step"] = torch.tensor(float(progress["updates"]), device=self._device)',
        'state["step"] = torch.tensor(0.0, device=self._device)',
        RESUMED,
    ),
    Fault(
        "zero-begins-to-count-anew",
        'state["step"] = torch.tensor(float(self._updates), device=self._device)',
        'state["step"] = torch.tensor(0.0, device=self._device)',
        RESUMED,
    ),
    Fault(
        "updates-are-counted-from-the-resume",
        'self._updates = int(progress.get("updates", 0))',
        "self._updates = 0",
        RESUMED,
    ),
    Fault(
        "what-is-computed-with-is-not-what-was-loaded",
        "_copy_masters_to_model(self._zero, self._stage)\n",
        "\n",
        RESUMED,
    ),
    Fault(
        "small-parameters-stay-as-they-were",
        "zero._partition_all_parameters()",
        "pass",
        RESUMED,
        known="an engine is loaded before its first forward pass, when nothing is gathered yet",
    ),
    Fault(
        "a-checkpoint-is-read-whole",
        "        for name, parameter in self._parameters.items():\n"
        "            for slot, tensor in self._slots(parameter).items():\n"
        "                _fill(tensor, reader, name, slot)\n"
        "        for name, buffer in",
        "        whole: list[Any] = []\n"
        "        for name, parameter in self._parameters.items():\n"
        "            for slot, tensor in self._slots(parameter).items():\n"
        "                shape = tuple(_local(tensor).shape)\n"
        "                whole.append((_local(tensor), reader.read(name, slot, _place(tensor), shape)))\n"
        "        for local, read in whole:\n"
        "            local.copy_(read)\n"
        "        for name, buffer in",
        ("tests/parity/test_lean.py -k resuming",),
    ),
    Fault(
        "buffers-are-drawn-and-not-read",
        "_fill(buffer, reader, name, BUFFER)",
        "pass",
        (f"{STATE} -k buffers",),
    ),
    Fault(
        "retention-removes-the-newest",
        "if _step(folder) < step]",
        "if _step(folder) <= step]",
        ("tests/recovery/test_saves.py",),
    ),
    Fault(
        "one-is-kept-too-few",
        "oldest, left = step, self.keep - 1",
        "oldest, left = step, self.keep - 2",
        ("tests/recovery/test_saves.py",),
    ),
    Fault(
        "damaged-ones-count-as-kept",
        "if left and is_usable(folder):",
        "if left:",
        ("tests/recovery/test_saves.py",),
    ),
    Fault(
        "a-checkpoints-checksum-is-not-compared",
        "if checksum(block) != expected:",
        "if False:",
        ("tests/unit/test_manifests.py", "tests/recovery/test_damaged_files.py"),
    ),
    Fault(
        "a-header-is-not-compared",
        'if checksum(header) != self._headers[name]["checksum"]:',
        "if False:",
        ("tests/recovery/test_damaged_files.py",),
    ),
    Fault(
        "progress-is-not-compared",
        'if checksum(text) != manifest["files"][PROGRESS]["checksum"]:',
        "if False:",
        ("tests/recovery/test_damaged_files.py",),
    ),
    Fault(
        "a-resume-does-a-step-again",
        "resumed.step if resumed else 0,",
        "resumed.step - 1 if resumed else 0,",
        ("tests/unit/test_finite.py", "tests/recovery/test_requests.py", "tests/recovery/test_kill.py -k 'fsdp'"),
    ),
    Fault(
        "published-before-all-have-written",
        "Heard(stop > 0, save > 0, busy == 0)",
        "Heard(stop > 0, save > 0, True)",
        ("tests/unit/test_late_reports.py", "tests/recovery/test_saves.py"),
    ),
    Fault(
        "stopped-only-if-all-are-asked",
        "Heard(stop > 0, save > 0, busy == 0)",
        "Heard(stop > 1, save > 1, busy == 0)",
        ("tests/unit/test_late_reports.py", "tests/parity/test_loop.py -k rate", "tests/recovery/test_requests.py"),
    ),
    Fault(
        "the-end-is-not-saved",
        "save=last or heard.stop",
        "save=heard.stop",
        ("tests/unit/test_finite.py", "tests/unit/test_export.py"),
    ),
    Fault(
        "a-piece-of-a-range-is-left-out",
        "if last * stride < stop:",
        "if (last + 1) * stride < stop:",
        ("tests/unit/test_state.py",),
    ),
    Fault(
        "written-where-the-old-one-is",
        'partial = path.with_name(f"{path.name}.partial")\n',
        "partial = path\n",
        ("tests/recovery/test_saves.py", "tests/recovery/test_killed_saves.py"),
    ),
    Fault(
        "imported-updates-that-were-left-out",
        "self.step - left_out, tensors)",
        "self.step, tensors)",
        ("tests/e2e/test_import.py",),
    ),
]

MODELS = [
    Fault(
        "all-modules-draw-the-same",
        "torch.manual_seed(_hash(self._seed, module_name, ancestor))",
        "torch.manual_seed(self._seed)",
        ("tests/unit/test_weights.py",),
    ),
    Fault(
        "exported-without-a-tied-head",
        "model.tie_weights()\n    for name, buffer in persistent_buffers(model):",
        "for name, buffer in persistent_buffers(model):",
        ("tests/unit/test_export.py",),
    ),
    Fault(
        "exported-in-fp32",
        "nn.Parameter(tensor.to(device, dtype), requires_grad=False)",
        "nn.Parameter(tensor.to(device), requires_grad=False)",
        ("tests/unit/test_export.py",),
    ),
    Fault(
        "weights-for-their-average",
        "_fill(model, reader, EMA if ema else WEIGHT, dtype, device)",
        "_fill(model, reader, WEIGHT, dtype, device)",
        ("tests/unit/test_export.py",),
    ),
    Fault(
        "generation-that-does-not-end-with-a-turn",
        "ends = [tokenizer.eos_token_id, *ends, *_ends_of_turns(run, stage, tokenizer)]",
        "ends = [tokenizer.eos_token_id, *ends]",
        ("tests/unit/test_pretrained.py", "tests/unit/test_same_export.py", "tests/e2e/test_use.py"),
    ),
    Fault(
        "exported-buffers-are-the-architectures",
        "buffer.copy_(reader.read(name, BUFFER, _zeros(buffer), tuple(buffer.shape)))",
        "pass",
        ("tests/unit/test_export.py",),
    ),
    Fault(
        "what-was-written-is-not-looked-at",
        "wrong = [name for name, tensor in wanted.items() if shapes.get(name) != tuple(tensor.shape)]",
        "wrong = []",
        ("tests/unit/test_export.py",),
    ),
    Fault(
        "generated-from-the-likeliest-fifty",
        "config.top_k = 0 if temperature > 0 else None",
        "config.top_k = 50 if temperature > 0 else None",
        ("tests/e2e/test_use.py",),
    ),
    Fault(
        "the-oldest-checkpoint-for-the-newest",
        "return next((folder for folder in reversed(complete(root))",
        "return next((folder for folder in complete(root)",
        ("tests/unit/test_finite.py", "tests/unit/test_export.py", "tests/recovery/test_saves.py"),
    ),
]

FAULTS = [*ENGINES, *OPTIMIZERS, *DATA, *CHATS, *CHECKPOINTS, *MODELS]
