"""GPU memory of a run, item by item.

Covers Llama-like decoders (Llama, Mistral, Qwen2, Qwen3): grouped attention, a gated MLP, RMS norms. Other architectures can be
trained too, without an estimate. Imports no torch, loads no weights. 1 GiB = 2**30 bytes. The items add up to what torch's
allocator needs; CUDA's own context comes on top.
"""

from qlora_kit.config import GIB, SAMPLE_TOKENS, Config, QuantizationSettings
from qlora_kit.planning.shape import BYTES_4BIT, BYTES_4BIT_DOUBLE, HEAD_ROWS, ModelShape, vocabulary_piece

# Memory of the allocator that no other item covers: cuBLAS workspaces, rounding. Fitted to the peaks in benchmarks/README.md.
LIBRARIES_BYTES = 0.15 * GIB
# CUDA's own memory outside torch's allocator, for kernels and graphs: a round figure that differs from driver to driver.
CONTEXT_BYTES = 0.6 * GIB
# Projections whose weights are unpacked while a layer computes its backward pass.
UNPACKED_TOGETHER = ("o_proj", "gate_proj", "up_proj", "down_proj")


def estimate_memory(shape: ModelShape, config: Config, micro_batch: int, recomputed: int, processes: int = 1) -> dict[str, float]:
    """Return the bytes of each item at the peak of a training run on a GPU; their sum is what torch's allocator needs.

    CUDA manages the state of a paged optimizer outside the allocator, so it is not counted.

    Args:
        micro_batch: sequences per forward pass.
        recomputed: layers that keep only their input and recompute the rest in the backward pass.
        processes: how many processes share the frozen weights under performance.fsdp.
    """
    fsdp, offloaded, rank = config.performance.fsdp, config.performance.offload_embedding, config.lora.rank
    compiled, samples = config.performance.compile is not False, config.training.sample_prompts
    element = 4 if config.quantization.compute_dtype == "float32" else 2  # bytes
    tokens = micro_batch * config.data.max_length
    adapters = shape.lora_parameters(rank, config.lora.target_modules)
    weights = _weight_bytes(config.quantization, element) * shape.projection_parameters()
    share = 0.0 if fsdp == "offload" else 1 / processes if fsdp else 1.0  # of the frozen weights, on this GPU
    kept = recomputed * (shape.hidden + rank) + (shape.layers - recomputed) * _kept_elements(shape, rank)
    unpacked = _unpacked_elements(shape, rank, UNPACKED_TOGETHER)
    workspace = element * (tokens * _working_elements(shape, compiled, recomputed == shape.layers) + unpacked)
    rows = min(HEAD_ROWS, shape.vocabulary) if offloaded or fsdp else vocabulary_piece(tokens, shape.vocabulary)
    head_piece = element * rows * shape.hidden
    loss = _loss_bytes(shape, tokens, element, compiled, rows) + offloaded * head_piece
    # Two buffers take turns: one for the layer or the piece of the head that computes, one for the next.
    gathered = 2 * max(weights / shape.layers, 0 if offloaded else head_piece)
    return {
        "projection weights": share * weights,
        "embedding and norms": element
        * ((0 if offloaded else share) * shape.embedding_parameters() + float(shape.other_parameters())),
        "adapters (fp32)": 4.0 * adapters,
        "gradients (fp32)": 4.0 * adapters,
        "optimizer state": 0.0 if "paged" in config.training.optim else config.training.optimizer_bytes * adapters,
        "kept activations": float(element * tokens * kept),
        **({"gathered weights": gathered} if fsdp else {}),
        "largest layer's workspace": float(workspace),
        # The logits are freed before the backward pass begins: only what exceeds a layer's workspace counts.
        "logits above that": max(0.0, loss - workspace),
        **({"answers to sample_prompts": _sampling_bytes(shape, config.data.max_length, element)} if samples else {}),
        "libraries": LIBRARIES_BYTES,
    }


def _weight_bytes(quantization: QuantizationSettings, element: int) -> float:
    if not quantization.load_in_4bit:
        return element
    return BYTES_4BIT_DOUBLE if quantization.use_double_quant else BYTES_4BIT


def _kept_elements(shape: ModelShape, rank: int) -> int:
    """Return the elements per token that a layer keeps without recomputation.

    They are its input, q, k, v, the attention's output, the residual, gate and up, and each projection's product of A and input.
    """
    query, key_value = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return 2 * shape.hidden + 2 * query + 2 * key_value + 2 * shape.mlp + len(shape.projections()) * rank


def _working_elements(shape: ModelShape, compiled: bool, recomputed: bool) -> int:
    """Return the elements per token of the layer whose backward pass runs."""
    query, key_value = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    # As wide as the MLP: the gradients of gate, up and their product, and two more for gaps between the allocator's blocks.
    # Without fusion also intermediate results and fp32 copies. With recomputation also gate and up, which otherwise count as
    # kept.
    wide = (5 if compiled else 13) + (2 if recomputed else 0)
    return wide * shape.mlp + 3 * shape.hidden + 2 * query + 2 * key_value


def _unpacked_elements(shape: ModelShape, rank: int, names: tuple[str, ...]) -> int:
    """Return the elements of a layer's unpacked weights, each with the LoRA columns of its group appended."""
    sizes = shape.projections()
    group_size = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "gate_proj": 2, "up_proj": 2}
    return sum((sizes[name][0] + group_size.get(name, 1) * rank) * sizes[name][1] for name in names)


def _sampling_bytes(shape: ModelShape, length: int, element: int) -> float:
    """Return the bytes of the longest prompt's keys and values, its MLP states, one unpacked projection and a token's logits.

    The memory of the micro-steps stays reserved meanwhile, since a CUDA graph holds it.
    """
    keys_and_values = 2 * shape.layers * shape.kv_heads * shape.head_size * (length + SAMPLE_TOKENS)
    return float(element * (keys_and_values + 4 * length * shape.mlp + shape.hidden * shape.mlp) + 8 * shape.vocabulary)


def _loss_bytes(shape: ModelShape, tokens: int, element: int, compiled: bool, rows: int) -> float:
    """Return the bytes of one piece of logits, their exponentials, and the hidden states' gradient in fp32 before and after."""
    per_logit = 2 * element if compiled else 12  # without fusion both in fp32 as well
    return 1.0 * per_logit * tokens * rows + 12.0 * tokens * shape.hidden
