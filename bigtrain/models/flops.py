"""The arithmetic that a training step needs, and what a GPU could do at most: the two sides of MFU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense bf16 FLOP/s by a part of the GPU's name, from NVIDIA's data sheets; the first that fits counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}


class Arithmetic(NamedTuple):
    """What decides the floating-point operations of a token, forward and backward.

    parameters: those that a token is multiplied with: all but the input embedding, unless that is the output head too.
    layers: their number. width: heads x their size. length: tokens of a sequence.
    """

    parameters: int
    layers: int
    width: int
    length: int

    @property
    def flops_per_token(self) -> float:
        """6 N + 12 L H T: Chowdhery et al., PaLM (2022), appendix B.

        Every token is taken to attend to the whole sequence: neither causality, nor windows, nor the borders of packed
        documents are subtracted. What activation checkpointing computes again is not added.
        """
        return 6.0 * self.parameters + 12.0 * self.layers * self.width * self.length

    def __str__(self) -> str:
        return (
            f"6 N + 12 L H T = {self.flops_per_token:.4g} FLOP per token (PaLM, arXiv 2204.02311, appendix B), with "
            f"N = {self.parameters:,} parameters, L = {self.layers} layers, H = {self.width} (heads x their size), "
            f"T = {self.length} tokens"
        )


def arithmetic(model: PreTrainedModel, sequence_length: int) -> Arithmetic | None:
    """Of a causal language model; None for a mixture of experts, where a token does not meet all parameters."""
    config: Any = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if head is None or head.weight is not embedding.weight:
        parameters -= embedding.weight.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Arithmetic(parameters, config.num_hidden_layers, width, sequence_length)


def peak_flops(gpu: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, as `torch.cuda.get_device_name` gives it; None if it is not known."""
    return next((peak for part, peak in PEAKS.items() if part.lower() in gpu.lower()), None)
