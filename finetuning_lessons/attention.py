"""Multi-head attention from scratch, with LoRA on any of its four projections; a comparison of the choices.

    python -m finetuning_lessons.attention

LoRA (arXiv 2106.09685), sections 4.2 and 7.1. The lesson spends the same number of trainable parameters of the embedded model on
different projections, for several seeds, and draws what a head of that model looks at. LoRAAttention leaves out Qwen2's rotary
positions and its grouped key heads.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetuning_lessons.layers import LoRALayer, count_parameters, replace_linear_layers
from finetuning_lessons.lesson import (
    ORANGE,
    SKY,
    TINY_MODEL,
    begin,
    create_parser,
    finish,
    held_out_loss,
    load_blocks,
    load_model,
    load_tokenizer,
    picture,
    print_table,
    print_text,
    progress,
    train,
)
from finetuning_lessons.seeds import Measured, Results, add_flag, measure_seeds, print_place
from finetuning_lessons.words import text
from qlora_kit import cli

PROJECTIONS = ("q", "k", "v", "o")  # query, key, value, output
STEPS = 15
HELD_OUT = 32  # blocks of 64 tokens
LOSS, BASE = "held-out loss, nats a token", "base model"


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
TRAINED = 6 * 3_840  # parameters of the six layers


def parameter_rows() -> list[list[str]]:
    rows = []
    for targets in (("q",), ("q", "v"), PROJECTIONS):
        trainable, total = count_parameters(LoRAAttention(target_modules=targets))
        rows.append([", ".join(targets), f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.2f} %"])
    return rows


def measure(seed: int) -> Measured:
    """Train each choice of BUDGET and return its held-out loss; the seed decides the order of the text and where A starts."""
    blocks, base = load_blocks(64), load_model()
    blocks, held_out = blocks[:-HELD_OUT], blocks[-HELD_OUT:]
    losses = {BASE: held_out_loss(base, held_out)}
    for targets, rank in BUDGET.items():
        name = ", ".join(targets)
        progress(text(f"training LoRA on {name}", f"訓練 LoRA：{name}"))
        torch.manual_seed(seed)
        order = torch.randperm(len(blocks))  # the same for each choice
        model = copy.deepcopy(base)
        replace_linear_layers(model, [f"{letter}_proj" for letter in targets], rank, alpha=2 * rank)
        train(model, blocks[order], STEPS)
        losses[name] = held_out_loss(model, held_out)
    return {LOSS: losses}


def print_choices(one: Measured, results: Results) -> None:
    rows = [
        [name, str(rank), f"{TRAINED:,}", f"{one[LOSS][name]:.3f}", f"{results.of(LOSS, name):.3f}"]
        for name, rank in zip(map(", ".join, BUDGET), BUDGET.values(), strict=True)
    ]
    header = [text("LoRA on", "LoRA 用在"), "rank", text("trained", "訓練參數"), text("this run", "這一次"), results.title()]
    title = text(
        f"Held-out loss after {STEPS} steps, nats a token; base model {one[LOSS][BASE]:.3f}",
        f"訓練 {STEPS} 步後的驗證損失（nats / token）；基礎模型 {one[LOSS][BASE]:.3f}",
    )
    print_table(title, header, rows)
    gain = {name: results.gap(LOSS, BASE, name) for name in one[LOSS]}
    order = results.order(LOSS, {name: name if len(name) == 1 else f"({name})" for name in one[LOSS] if name != BASE})
    print_text(
        text(
            f"Often advised: q and v first. Here they gain {gain['q, v']:.3f} nats; with as many parameters, v alone gains "
            f"{gain['v']:.3f}, o alone {gain['o']:.3f}, q alone {gain['q']:.3f}. From the lowest loss: {order}.",
            f"常見建議：先訓練 q 和 v。這裡它們讓損失降低 {gain['q, v']:.3f}；同樣的參數量，只用 v 降 {gain['v']:.3f}，"
            f"只用 o 降 {gain['o']:.3f}，只用 q 降 {gain['q']:.3f}。損失由低到高：{order}。",
        )
    )
    print_text(
        text(
            "In the paper q alone and k alone were worse as well, and q with v, or all four, did best (section 7.1, table 5). "
            "The order may differ between models and tasks: measure yours.",
            "論文裡也是單獨用 q 或 k 較差，q 加 v 或四個全用最好（7.1 節表 5）。不同的模型與任務，順序可能不同：請測你自己的。",
        )
    )


SENTENCE = "The function returns a list, and the list holds the names."
LAYER, HEAD, PADDING = 4, 0, 2  # a head that looks at the token before; tokens of padding in front


@torch.no_grad()
def head_weights() -> tuple[list[str], Tensor, Tensor]:
    """Return tokens of padding and a sentence, a trained head's attention weights, and the mask: (T, T) each, queries first."""
    tokenizer = load_tokenizer()
    ids = torch.tensor(tokenizer(SENTENCE).input_ids)
    names = ["pad"] * PADDING + [str(tokenizer.decode(one)).strip() for one in ids]
    ids = torch.cat([torch.full((PADDING,), tokenizer.pad_token_id), ids])[None]  # (1, T)
    attended = (torch.arange(ids.shape[1]) >= PADDING)[None].long()
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    layers = model(input_ids=ids, attention_mask=attended, output_attentions=True).attentions  # a (1, heads, T, T) each
    mask = causal_mask(attended)[0, 0]
    return names, layers[min(LAYER, len(layers) - 1)][0, HEAD].masked_fill(~mask, 0.0), mask


def draw_head(axes: Any) -> None:
    names, weights, mask = head_weights()
    image = axes.imshow(weights.masked_fill(~mask, math.nan).numpy(), cmap="Blues", vmin=0)
    axes.set_facecolor("#D9D9D9")  # where the mask hides a key
    axes.figure.colorbar(image, ax=axes, label=text("attention weight", "注意力權重"))
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(text("A trained head: most look one token back", "訓練好的一個 head：多半看前一個 token"))
    axes.set_xlabel(text("key: token that is looked at (grey: hidden)", "key：被看的 token（灰色：遮住）"))
    axes.set_ylabel(text("query: token that looks", "query：在看的 token"))
    axes.grid(visible=False)


def draw_choices(axes: Any, one: Measured, results: Results) -> None:
    names = [name for name in one[LOSS] if name != BASE]
    gains = [results.gap(LOSS, BASE, name) for name in names]
    axes.bar(
        names,
        [gain.mean for gain in gains],
        0.6,
        yerr=[gain.error for gain in gains],
        color=SKY,
        capsize=4,
        label=results.label(),
    )
    mine = [one[LOSS][BASE] - one[LOSS][name] for name in names]
    axes.plot(names, mine, "x", color=ORANGE, markersize=8, label=text("this run", "這一次"))
    axes.set_title(text(f"{TRAINED:,} parameters, spent on different projections", f"同樣 {TRAINED:,} 個參數，用在不同的投影層"))
    axes.set_xlabel(text("projections with LoRA", "使用 LoRA 的投影層"))
    axes.set_ylabel(text("reduction in held-out loss (nats a token)", "驗證損失的降幅（nats / token）"))
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.3)  # room for the legend
    axes.legend(loc="upper left")


def draw(path: Path, one: Measured, results: Results) -> None:
    with picture(path, columns=2, size=(13, 5.4)) as (left, right):
        draw_head(left)
        draw_choices(right, one, results)


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "attention")
    add_flag(parser)
    arguments = begin(parser, argv)
    torch.manual_seed(0)
    title = text("One attention layer, hidden size 768, 12 heads", "一層注意力，hidden size 768，12 個 head")
    header = [text("LoRA, rank 8, on", "LoRA（rank 8）用在"), text("trained", "訓練參數"), text("all parameters", "全部參數")]
    print_table(title, [*header, text("share", "比例")], parameter_rows())
    one, results = measure_seeds(arguments, measure, {"steps": STEPS})
    print_choices(one, results)
    print_place(one, results, LOSS)
    draw(arguments.output_dir / "attention.png", one, results)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
