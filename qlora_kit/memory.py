"""What a run will take, from the shapes alone: parameters, bytes of GPU memory, and floating-point work per token.

Covers decoders built like Llama (Llama, Mistral, Qwen2, Qwen3 and their kin): grouped attention, a gated MLP, RMS norms.
Other architectures train as well; only the estimate is missing for them. Imports no torch, loads no weights.
1 GiB = 2**30 bytes. CUDA's own context, outside torch's allocator, is not part of any figure here.
"""

from dataclasses import dataclass
from typing import Any

from qlora_kit.settings import Config

GIB = 2**30
# NF4 and FP4 keep one absmax per 64 weights: fp32, or (double quantization) 8 bits plus an fp32 per 256 of them.
# QLoRA (arXiv 2305.14314), section 3: 4.5 and 4.127 bits per parameter.
BYTES_4BIT = 0.5 + 4 / 64
BYTES_4BIT_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
GRAPH_READY = ("qwen2", "qwen3")  # of these, the ones whose forward pass never waits for the GPU (fast/loss.py)

# The default model's shape as its config.json states it, so that the estimate needs no download.
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
    }
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


def read_shape(model_config: dict[str, Any]) -> ModelShape | None:
    """The shape that a config.json states, or None for an architecture that is not built like Llama."""
    if model_config.get("model_type") not in LLAMA_LIKE:
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


def estimate_memory(shape: ModelShape, config: Config) -> dict[str, float]:
    """Bytes that each part of a training run on a GPU holds at its peak; the sum is what torch's allocator needs."""
    quantization = config.quantization
    weight_bytes = BYTES_4BIT_DOUBLE if quantization.use_double_quant else BYTES_4BIT
    if not quantization.load_in_4bit:
        weight_bytes = 2.0
    adapters = shape.lora_parameters(config.lora.rank, config.lora.target_modules)
    optimizer_bytes = 2 if "8bit" in config.training.optim else 8  # two moments per parameter
    tokens = config.micro_batch * config.data.max_length
    layer = tokens * _layer_bytes(shape)
    loss = min(tokens, CHUNK_ROWS) * shape.vocabulary * LOSS_BYTES
    layer_inputs = tokens * 2.0 * shape.layers * shape.hidden
    recompute = config.training.gradient_checkpointing is not False
    return {
        "projection weights": weight_bytes * shape.projection_parameters(),
        "embedding and norms": 2.0 * (shape.embedding_parameters() + shape.other_parameters()),
        "adapters (fp32)": 4.0 * adapters,
        "gradients (fp32)": 4.0 * adapters,
        "optimizer state": float(optimizer_bytes * adapters),
        # The loss is done with its logits before the backward pass recomputes the first layer: the larger of the two counts.
        "activations": layer_inputs if recompute else layer * shape.layers,
        "loss or a layer": max(loss, layer) if recompute else loss,
        "evaluation beside the graph": loss + layer + GRAPH_BYTES if _graphed(shape, config) else 0.0,
        "libraries": LIBRARIES_BYTES,
    }


# Tokens whose logits exist at a time (fast/loss.py): 74 MiB in fp32 at a vocabulary of 151,936.
CHUNK_ROWS = 128
# Per token of a chunk and vocabulary entry: fp32, and bf16 before (logits) or after (softmax).
LOSS_BYTES = 4 + 2
# cuBLAS workspaces and the allocator's rounding: what the parts leave of the measured peak (benchmarks/README.md).
LIBRARIES_BYTES = 0.1 * GIB


# A captured graph keeps its pool, so that evaluation needs memory of its own; this much is workspaces and rounding, measured.
GRAPH_BYTES = 0.3 * GIB


def _graphed(shape: ModelShape, config: Config) -> bool:
    """Whether fast/graph.py will capture this model's micro-steps on a GPU."""
    fast = config.performance.cuda_graphs and config.performance.fused_lora and config.quantization.load_in_4bit
    return fast and shape.model_type in GRAPH_READY and config.quantization.compute_dtype == "bfloat16"


def _layer_bytes(shape: ModelShape) -> float:
    """Bytes per token that one decoder layer keeps for its backward pass."""
    query, key_value = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    # bf16: norm inputs and outputs, q k v and their rotated forms, attention output; gate, its activation, up, their product,
    # and that product after LoRA's dropout
    return 2.0 * (6 * shape.hidden + 4 * query + 4 * key_value + 5 * shape.mlp)
