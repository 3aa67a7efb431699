"""What a run will take, from the shapes alone: parameters, bytes of GPU memory, and floating-point work per token.

Covers decoders built like Llama (Llama, Mistral, Qwen2, Qwen3 and their kin): grouped attention, a gated MLP, RMS norms.
Other architectures train as well; only the estimate is missing for them. Imports no torch, loads no weights.
1 GiB = 2**30 bytes. Sums are of torch's allocator; CUDA's own context comes on top.
"""

import math
from dataclasses import dataclass
from typing import Any

from qlora_kit.settings import Config

GIB = 2**30
# NF4 and FP4 keep one absmax per 64 weights: fp32, or (double quantization) 8 bits plus an fp32 per 256 of them.
# QLoRA (arXiv 2305.14314), section 3: 4.5 and 4.127 bits per parameter.
BYTES_4BIT = 0.5 + 4 / 64
BYTES_4BIT_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
NEEDED = ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")

# The shapes of the models that configs name, as their config.json state them, so that the estimate needs no download.
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


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder; all in elements."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    tied_embedding: bool

    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder layer: name -> (in_features, out_features)."""
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
        """Weights that 4-bit loading packs."""
        return self.layers * sum(fan_in * fan_out for fan_in, fan_out in self.projections().values())

    def embedding_parameters(self) -> int:
        """Token embedding, and the output head where it is not the same tensor."""
        return self.vocabulary * self.hidden * (1 if self.tied_embedding else 2)

    def other_parameters(self) -> int:
        """Norms, and the biases of Qwen2's q, k and v projections."""
        norms = (2 * self.layers + 1) * self.hidden
        if self.model_type == "qwen3":  # a norm over each head of q and k
            norms += self.layers * 2 * self.head_size
        biases = self.layers * (self.heads + 2 * self.kv_heads) * self.head_size if self.model_type == "qwen2" else 0
        return norms + biases

    def parameters(self) -> int:
        return self.projection_parameters() + self.embedding_parameters() + self.other_parameters()

    def lora_parameters(self, rank: int, target_modules: list[str] | str) -> int:
        """A (rank, in) and B (out, rank) for each targeted projection. LoRA (arXiv 2106.09685), section 4.1."""
        chosen = [size for name, size in self.projections().items() if target_modules == "all-linear" or name in target_modules]
        return self.layers * rank * sum(fan_in + fan_out for fan_in, fan_out in chosen)

    def training_flops_per_token(self, recompute: bool) -> int:
        """Products with frozen weights: forward, gradient of the input, and the forward again when recomputed."""
        passes = 3 if recompute else 2
        return 2 * passes * self.projection_parameters() + 2 * 2 * self.vocabulary * self.hidden


def why_not_written_out(model_config: dict[str, Any], length: int) -> str | None:
    """The reason in a config.json why fast/layer.py is not this model's layer for blocks of `length` tokens, or None."""
    if model_config.get("model_type") not in LLAMA_LIKE:
        return f"{model_config.get('model_type')} is not built like Llama"
    window = model_config.get("sliding_window") if model_config.get("use_sliding_window", True) else None
    if window and window < length:
        return f"its attention reaches {window} tokens back, less than a block of {length}"
    if model_config.get("hidden_act", "silu") != "silu":
        return f"its activation is {model_config['hidden_act']}"
    return "it drops out in the attention" if model_config.get("attention_dropout") else None


def read_shape(model_config: dict[str, Any]) -> ModelShape | None:
    """The shape that a config.json states, or None for an architecture that is not built like Llama, or sizes left out."""
    if model_config.get("model_type") not in LLAMA_LIKE or not set(NEEDED) <= model_config.keys():
        return None
    heads, hidden = model_config["num_attention_heads"], model_config["hidden_size"]
    return ModelShape(
        model_type=model_config["model_type"],
        layers=model_config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=model_config.get("num_key_value_heads") or heads,
        head_size=model_config.get("head_dim") or hidden // heads,
        mlp=model_config["intermediate_size"],
        vocabulary=model_config["vocab_size"],
        tied_embedding=model_config.get("tie_word_embeddings", False),
    )


# Logits that exist at a time (fast/loss.py): 128 MiB in bf16.
PIECE_LOGITS = 2**26
HEAD_ROWS = 8192  # on the GPU at a time, of a head that is not there as a whole: 32 MiB at 2,048 columns in bf16


def vocabulary_piece(tokens: int, vocabulary: int) -> int:
    """Rows of the output head whose logits for `tokens` positions are taken at once, in pieces of nearly one size."""
    pieces = math.ceil(tokens * vocabulary / PIECE_LOGITS)
    return 64 * math.ceil(vocabulary / pieces / 64)


# What the allocator holds beside the parts below: cuBLAS workspaces, rounding. Fitted to the peaks in benchmarks/README.md.
LIBRARIES_BYTES = 0.15 * GIB
# CUDA's own memory outside torch's allocator, kernels and graphs: a round figure, different from driver to driver.
CONTEXT_BYTES = 0.6 * GIB


def estimate_memory(
    shape: ModelShape, config: Config, micro_batch: int, recomputed: int, keep_weights: bool = False, processes: int = 1
) -> dict[str, float]:
    """Bytes that each part of a training run on a GPU holds at its peak; the sum is what torch's allocator needs.

    A paged optimizer's state is managed by CUDA outside the allocator and not part of it.

    Args:
        micro_batch: sequences per forward pass.
        recomputed: layers that keep their input only and are computed again in the backward pass.
        keep_weights: whether the weights unpacked for the forward pass stay for the backward pass.
        processes: over which performance.fsdp divides what is frozen.
    """
    quantization, fsdp = config.quantization, config.performance.fsdp
    element = 4 if quantization.compute_dtype == "float32" else 2
    weight_bytes = BYTES_4BIT_DOUBLE if quantization.use_double_quant else BYTES_4BIT
    adapters = shape.lora_parameters(config.lora.rank, config.lora.target_modules)
    tokens = micro_batch * config.data.max_length
    rank = config.lora.rank
    kept = recomputed * (shape.hidden + rank) + (shape.layers - recomputed) * _kept_elements(shape, rank)
    unpacked = 0 if keep_weights else _unpacked_elements(shape, rank, ("o_proj", "gate_proj", "up_proj", "down_proj"))
    all_unpacked = shape.layers * _unpacked_elements(shape, rank, tuple(shape.projections())) if keep_weights else 0
    offloaded, compiled = config.performance.offload_embedding, config.performance.compile is not False
    layer = element * (tokens * _working_elements(shape, compiled, recomputed == shape.layers) + unpacked)
    weights = (weight_bytes if quantization.load_in_4bit else element) * shape.projection_parameters()
    part = 0.0 if fsdp == "offload" else 1 / processes if fsdp else 1.0  # of what is frozen, in this process
    rows = min(HEAD_ROWS, shape.vocabulary) if offloaded or fsdp else vocabulary_piece(tokens, shape.vocabulary)
    head_piece = element * rows * shape.hidden
    loss = _loss_bytes(shape, tokens, element, compiled, rows) + offloaded * head_piece
    # Two places in turn, for a layer or a piece of the head at work and for the next one.
    gathered = 2 * max(weights / shape.layers, 0 if offloaded else head_piece) if fsdp else 0.0
    return {
        "projection weights": part * weights,
        "embedding and norms": element
        * ((0 if offloaded else part) * shape.embedding_parameters() + float(shape.other_parameters())),
        "adapters (fp32)": 4.0 * adapters,
        "gradients (fp32)": 4.0 * adapters,
        "optimizer state": 0.0 if "paged" in config.training.optim else optimizer_bytes(config.training.optim) * adapters,
        "kept activations": float(element * tokens * kept),
        "unpacked weights": float(element * all_unpacked),
        **({"gathered weights": gathered} if fsdp else {}),
        "a layer at work": float(layer),
        # The loss is done with its logits before the backward pass begins: only what exceeds a layer at work counts.
        "logits beyond that": max(0.0, loss - layer),
        "libraries": LIBRARIES_BYTES,
    }


def optimizer_bytes(optim: str) -> float:
    """Per parameter: two moments of 8 or of 32 bits."""
    return 2.0 if "8bit" in optim else 8.0


def _kept_elements(shape: ModelShape, rank: int) -> int:
    """Per token, of a layer that is not computed again.

    Its input, q, k, v, the attention's output, the residual, gate and up; and what the A of each projection made of its input.
    """
    query, key_value = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return 2 * shape.hidden + 2 * query + 2 * key_value + 2 * shape.mlp + len(shape.projections()) * rank


def _working_elements(shape: ModelShape, compiled: bool, recomputed: bool) -> int:
    """Per token, of the layer whose backward pass runs: what is as wide as gate or up, and what it was given."""
    query, key_value = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    # The gradients of gate, up and their product, and two more between the allocator's blocks; without fusion also steps in
    # between, and fp32 copies. Gate and up themselves, unless they count among what was kept.
    wide = (5 if compiled else 13) + (2 if recomputed else 0)
    return wide * shape.mlp + 3 * shape.hidden + 2 * query + 2 * key_value


def _unpacked_elements(shape: ModelShape, rank: int, names: tuple[str, ...]) -> int:
    """Of unpacked weights of one layer, each with LoRA's columns of its group beside."""
    sizes = shape.projections()
    together = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "gate_proj": 2, "up_proj": 2}
    return sum((sizes[name][0] + together.get(name, 1) * rank) * sizes[name][1] for name in names)


def _loss_bytes(shape: ModelShape, tokens: int, element: int, compiled: bool, rows: int) -> float:
    """Logits of one piece, their exponentials, the hidden states' gradient in fp32 before and after."""
    per_logit = 2 * element if compiled else 12  # without fusion both in fp32 as well
    return 1.0 * per_logit * tokens * rows + 12.0 * tokens * shape.hidden
