"""Runs and models that take a second in this very process: a Llama of 30k parameters, one process, fp32."""

import json

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bigtrain.launching.start import run
from tests.support import MODEL

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


def config(folder, **changes):
    """A run's file in `folder` of one stage `p`, two steps on 60 short documents; `changes`: of the stage."""
    rows = [{"text": f"the quick brown fox jumps over the lazy dog {i} what is it " * 3} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "name": "p",
        "task": "pretrain",
        "data": [{"source": str(folder / "data.jsonl")}],
        "sequence_length": 32,
        "global_batch_size": 4,
        "steps": 2,
        "optimizer": {"lr": 1e-3},
        "export": False,
    }
    values = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "model": {"from_config": MODEL},
        "tokenizer": {"train": {"vocab_size": 320}},
        "precision": "fp32",
        "parallel": {"processes": 1, "device": "cpu", "micro_batch_size": 4},
        "stages": [stage | changes],
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def train(path, *overrides, restart=None):
    """`bigtrain run` to its end, in this process; returns the run's folder."""
    return run(path, overrides, restart).folder


def tokenizer(**options):
    """A byte-level BPE with ChatML's template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog what is it"] * 3, trainer)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(named | options))


def pretrained(folder, changes=None, **options):
    """A pretrained model with a tokenizer; `changes`: of its configuration, `options`: of its tokenizer."""
    itself = tokenizer(**options)
    values = {key: value for key, value in MODEL.items() if key not in ("model_type", "tie_word_embeddings")}
    values |= {"vocab_size": len(itself), "eos_token_id": itself.eos_token_id, "pad_token_id": itself.pad_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**values | {"bos_token_id": None} | (changes or {}))).save_pretrained(folder)
    itself.save_pretrained(folder)
    return folder
