"""Predict how long a run takes: arithmetic from its shape, its plan and two rates of the GPU. Imports no torch.

A micro-step multiplies matrices, unpacks the 4-bit weights, passes over activations between the products, and starts kernels. The
shares below were fitted on an H100 (2026-11-27) and an H200 (2026-11-22) to eight measured micro-steps of Qwen2.5-3B, from 512 to
8,192 tokens, with all layers recomputed and with none; the fit is within 6 % of each.
"""

from qlora_kit.config import Config
from qlora_kit.planning.cards import Card
from qlora_kit.planning.plan import Plan
from qlora_kit.planning.shape import ModelShape

MATRIX_SHARE, MEMORY_SHARE = 0.65, 0.70  # of the card's stated rates, which real kernels reach
ACTIVATION_PASSES = 21.0  # times that hidden state and MLP state of a layer are read or written in 16 bits
LAYER_SECONDS, RECOMPUTED = 155e-6, 1.4  # between the kernels of a layer in a micro-step; more where it is recomputed
PACKED_BYTES = 2.5  # to unpack a weight: about half a byte read, two written
EVALUATION = 1 / 3  # of the products of training without recomputation: no backward pass


def predict_step_seconds(shape: ModelShape, config: Config, plan: Plan, card: Card, processes: int = 1) -> float:
    """Return the seconds of an optimizer step."""
    micro_steps = config.effective_batch // processes // plan.micro_batch
    return micro_steps * _micro_step_seconds(shape, config, plan, card)


def _micro_step_seconds(shape: ModelShape, config: Config, plan: Plan, card: Card) -> float:
    length = config.data.max_length
    tokens, recomputed = plan.micro_batch * length, plan.recomputed / shape.layers
    passes = 2 + recomputed  # over the frozen weights
    products = tokens * (2 * passes * shape.projection_parameters() + 4 * shape.vocabulary * shape.hidden)
    # Queries times keys and scores times values, half of each: 2 products forward, 5 backward.
    attention = tokens * length * shape.layers * shape.heads * shape.head_size * (7 + 2 * recomputed)
    unpacking = passes * PACKED_BYTES * shape.projection_parameters() if config.quantization.load_in_4bit else 0
    activations = ACTIVATION_PASSES * 2 * tokens * shape.layers * (shape.hidden + shape.mlp)
    kernels = LAYER_SECONDS * shape.layers * (1 + (RECOMPUTED - 1) * recomputed)
    return (
        (products + attention) / (MATRIX_SHARE * card.flops)
        + (unpacking + activations) / (MEMORY_SHARE * card.bandwidth)
        + kernels
    )


def predict_evaluation_seconds(shape: ModelShape, config: Config, sequences: int, card: Card) -> float:
    """Return the seconds of one evaluation of some sequences."""
    whole = Plan(1, 0, {})
    return EVALUATION * sequences * _micro_step_seconds(shape, config, whole, card)


def predict_run_seconds(
    shape: ModelShape, config: Config, plan: Plan, card: Card, blocks: int, evaluated: int, processes: int = 1
) -> float:
    """Return the seconds of a whole run, without loading and compiling.

    Args:
        blocks: sequences of the training data.
        evaluated: sequences of the evaluation data; 0 without any.
    """
    steps = config.total_steps(blocks)
    evaluations = 2 + steps // config.training.eval_steps  # one of the base model, and one at the end
    training = steps * predict_step_seconds(shape, config, plan, card, processes)
    return training + evaluations * predict_evaluation_seconds(shape, config, evaluated, card) / processes
