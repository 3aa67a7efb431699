"""Sizes of a Llama-like model from its config.json."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from qlora_kit.planning.model_config import LLAMA_LIKE, complete_config, refuse

# Bytes per weight. NF4 and FP4 store one absmax per 64 weights: in fp32, or (double quantization) in 8 bits plus one fp32 number
# per 256 of them. QLoRA (arXiv 2305.14314), section 3: 4.5 and 4.127 bits per parameter.
BYTES_4BIT = 0.5 + 4 / 64
BYTES_4BIT_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
# The config.json of the models that the shipped configs name, so that an estimate needs no download.
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-3B-Instruct": {
        "model_type": "qwen2",
        "num_hidden_layers": 36,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-32B-Instruct": {
        "model_type": "qwen2",
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
PIECE_LOGITS = 2**26  # logits that model/loss.py computes at a time: 128 MiB in bf16
HEAD_ROWS = 8192  # rows of an offloaded or sharded output head on the GPU at a time: 32 MiB at 2,048 columns in bf16


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like decoder, in elements."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    tied_embedding: bool
    attention_bias: bool = False  # of all four projections; qwen2 has biases of q, k and v without it
    mlp_bias: bool = False

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one decoder layer: name -> (in_features, out_features)."""
        query, key_value = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key_value),
            "v_proj": (self.hidden, key_value),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.mlp),
            "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }

    def projection_parameters(self) -> int:
        """Return the number of weights that 4-bit loading packs."""
        return self.layers * sum(fan_in * fan_out for fan_in, fan_out in self.projections().values())

    def embedding_parameters(self) -> int:
        """Return the parameters of the token embedding, and of the output head where it is a tensor of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied_embedding else 2)

    def other_parameters(self) -> int:
        """Return the parameters of the norms, and of the projections' biases."""
        norms = (2 * self.layers + 1) * self.hidden
        if self.model_type == "qwen3":  # a norm over each head of q and k
            norms += self.layers * 2 * self.head_size
        biased = ["q_proj", "k_proj", "v_proj"] if self.model_type == "qwen2" or self.attention_bias else []
        biased += ["o_proj"] * self.attention_bias + ["gate_proj", "up_proj", "down_proj"] * self.mlp_bias
        return norms + self.layers * sum(self.projections()[name][1] for name in biased)

    def parameters(self) -> int:
        """Return the number of all parameters."""
        return self.projection_parameters() + self.embedding_parameters() + self.other_parameters()

    def lora_parameters(self, rank: int, target_modules: list[str] | str) -> int:
        """Return the parameters of A (rank, in) and B (out, rank) of each target. LoRA (arXiv 2106.09685), section 4.1.

        Args:
            target_modules: names of modules or the ends of their names, as peft takes them, or all-linear.
        """
        targets = tuple(self.projections()) if target_modules == "all-linear" else tuple(target_modules)
        return rank * _sum_sides(self, targets)

    def training_flops_per_token(self, recompute: bool) -> int:
        """Return the work of the products with frozen weights: forward pass, input gradients, and recomputation if any."""
        passes = 3 if recompute else 2
        return 2 * passes * self.projection_parameters() + 2 * 2 * self.vocabulary * self.hidden


@cache  # a plan asks for each number of recomputed layers
def _sum_sides(shape: ModelShape, targets: tuple[str, ...]) -> int:
    """Return the sum of in_features + out_features of all modules that one of the targets names."""
    total = 0
    for name, (fan_in, fan_out) in shape.projections().items():
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        modules = (f".model.layers.{layer}.{block}.{name}" for layer in range(shape.layers))
        total += (fan_in + fan_out) * sum(module.endswith(tuple(f".{target}" for target in targets)) for module in modules)
    return total


def read_shape(model_config: dict[str, Any]) -> ModelShape | None:
    """Return the shape that a config.json states, with transformers' defaults; None if the model is not Llama-like.

    Raises:
        UserError: as complete_config, or sizes do not fit together.
    """
    kind = model_config.get("model_type")
    if kind not in LLAMA_LIKE:
        return None
    values = complete_config(model_config)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    kv_heads, head_size = values["num_key_value_heads"] or heads, values["head_dim"] or hidden // heads
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"a divisor of the {heads} attention heads")
    if head_size == 0 or (kind == "llama" and hidden % heads):
        raise refuse("hidden_size", hidden, f"a multiple of the {heads} attention heads")
    return ModelShape(
        model_type=kind,
        layers=values["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        mlp=values["intermediate_size"],
        vocabulary=values["vocab_size"],
        tied_embedding=values["tie_word_embeddings"],
        attention_bias=values.get("attention_bias", False),
        mlp_bias=values.get("mlp_bias", False),
    )


def vocabulary_piece(tokens: int, vocabulary: int) -> int:
    """Return the rows of one piece of the output head: pieces of nearly equal size, each of about PIECE_LOGITS logits at most.

    Args:
        tokens: positions that have logits.
    """
    pieces = math.ceil(tokens * vocabulary / PIECE_LOGITS)
    return 64 * math.ceil(vocabulary / pieces / 64)
