"""What a run will take, from the shapes alone: parameters, bytes of GPU memory, and floating-point work per token.

Covers decoders built like Llama (Llama, Mistral, Qwen2, Qwen3 and their kin): grouped attention, a gated MLP, RMS norms.
Other architectures train as well; only the estimate is missing for them. Imports no torch, loads no weights.
1 GiB = 2**30 bytes. Sums are of torch's allocator; CUDA's own context comes on top.
"""

from qlora_kit.config import GIB, Config
from qlora_kit.planning.shape import BYTES_4BIT, BYTES_4BIT_DOUBLE, HEAD_ROWS, ModelShape, vocabulary_piece

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
        "optimizer state": 0.0 if "paged" in config.training.optim else config.training.optimizer_bytes * adapters,
        "kept activations": float(element * tokens * kept),
        "unpacked weights": float(element * all_unpacked),
        **({"gathered weights": gathered} if fsdp else {}),
        "largest layer's workspace": float(layer),
        # The loss is done with its logits before the backward pass begins: only what exceeds a layer at work counts.
        "logits above that": max(0.0, loss - layer),
        "libraries": LIBRARIES_BYTES,
    }


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
