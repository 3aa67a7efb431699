"""Multi-head attention from scratch, with LoRA on any of its four projections; a comparison of the choices.

    python -m finetuning_lessons.attention

LoRA (arXiv 2106.09685), sections 4.2 and 7.1. The lesson spends the same number of trainable parameters of the embedded model on
different projections, and draws attention weights. It leaves out Qwen2's rotary positions and its grouped key heads.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from finetuning_lessons.layers import LoRALayer, count_parameters, replace_linear_layers
from finetuning_lessons.lesson import (
    SKY,
    create_parser,
    held_out_loss,
    load_blocks,
    load_model,
    open_folder,
    picture,
    print_table,
    print_text,
    train,
)
from qlora_kit import cli

PROJECTIONS = ("q", "k", "v", "o")  # query, key, value, output
STEPS, SEEDS = 15, (0, 1)
HELD_OUT = 32  # blocks of 64 tokens


class LoRAAttention(nn.Module):
    """Scaled dot-product attention with several heads; the projections are frozen, and some have a LoRA update.

    Args:
        hidden_size: H, size of each token's vector; a multiple of num_heads.
        lora_rank: rank of each update.
        lora_alpha: each update is multiplied by lora_alpha/lora_rank.
        lora_dropout: share of an update's inputs that is zeroed in training.
        target_modules: the projections that get an update, any of "q", "k", "v", "o".

    Raises:
        ValueError: num_heads does not divide hidden_size, or a target is not one of the projections.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_heads: int = 12,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] = ("q", "v"),
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size}: should be a multiple of num_heads {num_heads}")
        if unknown := set(target_modules) - set(PROJECTIONS):
            raise ValueError(f"target_modules {sorted(unknown)}: should be any of {', '.join(PROJECTIONS)}")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, hidden_size // num_heads
        self.scaling = lora_alpha / lora_rank

        def projection(name: str) -> nn.Module:
            if name in target_modules:
                return LoRALayer(hidden_size, hidden_size, lora_rank, lora_alpha, lora_dropout)
            return nn.Linear(hidden_size, hidden_size, bias=False).requires_grad_(False)

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = map(projection, PROJECTIONS)

    @property
    def lora_modules(self) -> dict[str, dict[str, nn.Linear]]:
        """Return the matrices A and B of each projection that has them, by its letter."""
        layers = {name: getattr(self, f"{name}_proj") for name in PROJECTIONS}
        return {name: {"A": layer.lora_A, "B": layer.lora_B} for name, layer in layers.items() if isinstance(layer, LoRALayer)}

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Attend: (B, T, H) -> (B, T, H).

        Args:
            attention_mask: broadcast to (B, heads, T, T), queries before keys: True where a query may attend, or numbers that are
                added to the scores. None lets every query attend to every key.
        """
        q, k, v = (self.split_heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attention_weights(q, k, attention_mask) @ v  # (B, heads, T, T) @ (B, heads, T, D) -> (B, heads, T, D)
        joined = mixed.transpose(1, 2).flatten(2)  # (B, heads, T, D) -> (B, T, heads, D) -> (B, T, H)
        return self.o_proj(joined)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split each vector into heads: (B, T, H) -> (B, heads, T, D), D = H / heads."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax(q kᵀ / √D), the weight of each key for each query (arXiv 1706.03762, equation 1).

    (B, heads, T, D) twice -> (B, heads, T, T). The row of a query whose keys are all masked, such as padding, is zero.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, heads, T, T)
    if mask is None:
        return scores.softmax(dim=-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    nowhere = (scores == -math.inf).all(dim=-1, keepdim=True)  # (B, heads, T, 1); softmax would give NaN
    return scores.masked_fill(nowhere, 0.0).softmax(dim=-1).masked_fill(nowhere, 0.0)


def causal_mask(attended: Tensor) -> Tensor:
    """Return a mask that hides later tokens and padding.

    (B, T), 1 for a token and 0 for padding -> (B, 1, T, T), True where a query may attend.
    """
    length = attended.shape[1]
    past = torch.ones(length, length, dtype=torch.bool).tril()  # (T, T)
    return past & attended.bool()[:, None, None, :]


# The lesson: one budget, spent on different projections of the embedded model.

# Per layer and rank, q and o (192 x 192) take 384 parameters, k and v (192 x 64) 256: each choice trains 3,840 a layer.
BUDGET: dict[tuple[str, ...], int] = {("q",): 10, ("k",): 15, ("v",): 15, ("o",): 10, ("q", "v"): 6, PROJECTIONS: 3}  # ranks


def parameter_rows() -> list[list[str]]:
    rows = []
    for targets in (("q",), ("q", "v"), PROJECTIONS):
        trainable, total = count_parameters(LoRAAttention(target_modules=targets))
        rows.append([", ".join(targets), f"{trainable:,}", f"{total:,}", f"{trainable / total:.2%}"])
    return rows


def compare_targets(base: nn.Module, blocks: Tensor, held_out: Tensor) -> dict[str, tuple[int, list[float]]]:
    """Train each choice of BUDGET; return its trainable parameters and its held-out loss for each seed."""
    results = {}
    for targets, rank in BUDGET.items():
        losses = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            order = torch.randperm(len(blocks))  # order of the batches, the same for each choice
            model = copy.deepcopy(base)
            replace_linear_layers(model, [f"{letter}_proj" for letter in targets], rank, alpha=2 * rank)
            train(model, blocks[order], STEPS)
            losses.append(held_out_loss(model, held_out))
        results[", ".join(targets)] = count_parameters(model)[0], losses
    return results


def compute_padded_attention() -> Tensor:
    """Return the first head's attention weights for two padding tokens followed by eight tokens: (10, 10)."""
    attention = LoRAAttention(hidden_size=64, num_heads=4)
    hidden = 2 * torch.randn(1, 10, 64)
    mask = causal_mask(torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]))
    q, k = (attention.split_heads(project(hidden)) for project in (attention.q_proj, attention.k_proj))
    return attention_weights(q, k, mask)[0, 0].detach()


def draw(path: Path, base: float, results: dict[str, tuple[int, list[float]]]) -> None:
    with picture(path, columns=2, size=(12, 4.8)) as (left, right):
        image = left.imshow(compute_padded_attention().numpy(), cmap="Blues", vmin=0)
        left.figure.colorbar(image, ax=left, label="attention weight")
        names = ["pad", "pad", *map(str, range(1, 9))]
        left.set_xticks(range(10), names)
        left.set_yticks(range(10), names)
        left.set(
            title="Causal attention after padding (random weights)",
            xlabel="key: token that is looked at",
            ylabel="query: token that looks",
        )
        left.grid(visible=False)
        gains = [[base - loss for loss in losses] for _, losses in results.values()]
        bars = right.bar(list(results), [sum(gain) / len(gain) for gain in gains], 0.6, color=SKY, label="mean")
        right.bar_label(bars, fmt="%.2f", label_type="center")
        for place, gain in enumerate(gains):
            right.plot([place] * len(gain), gain, "_", color="black", markersize=18, label="" if place else "each seed")
        trained = next(iter(results.values()))[0]
        title = f"{trained:,} parameters, spent on different projections"
        right.set(title=title, xlabel="projections with LoRA", ylabel="fall of the held-out loss (nats a token)")
        right.grid(axis="x", visible=False)
        right.legend(loc="upper left")


def main(argv: list[str] | None = None) -> None:
    folder = open_folder(create_parser(__doc__, "attention").parse_args(argv).output_dir)
    torch.manual_seed(0)
    header = ["LoRA, rank 8, on", "trainable", "all parameters", "share"]
    print_table("One attention layer, hidden size 768, 12 heads", header, parameter_rows())

    blocks = load_blocks(64)
    blocks, held_out = blocks[:-HELD_OUT], blocks[-HELD_OUT:]
    model = load_model()
    base, results = held_out_loss(model, held_out), compare_targets(model, blocks, held_out)
    rows = [
        [name, str(rank), f"{trained:,}", " ".join(f"{loss:.3f}" for loss in losses)]
        for rank, (name, (trained, losses)) in zip(BUDGET.values(), results.items(), strict=True)
    ]
    header = ["LoRA on", "rank", "trainable", f"held-out loss, {len(SEEDS)} seeds"]
    print_table(f"{STEPS} steps of the embedded model; before them {base:.3f} nats a token", header, rows)
    gain = {name: base - sum(losses) / len(losses) for name, (_, losses) in results.items()}
    print_text(f"""Often advised: q and v first. Here they gain {gain["q, v"]:.2f} nats; with as many parameters v alone gains
        {gain["v"]:.2f}, o alone {gain["o"]:.2f}, q alone {gain["q"]:.2f}. In the paper q alone and k alone were worse as well,
        and q with v, or all four, did best (section 7.1, table 5). The order may differ between models and tasks: measure
        yours.""")
    draw(folder / "attention.png", base, results)


if __name__ == "__main__":
    cli.run(main)
