"""Six methods of fine-tuning compared with peft on the embedded model: parameters, loss, time, merging.

    python -m finetuning_lessons.methods

    full      trains every weight, without peft
    LoRA      W + alpha/rank · B A for every projection (arXiv 2106.09685, section 4.1)
    adapter   a small network after attention and MLP: h + up(relu(down(h))) (arXiv 1902.00751, section 2.1); peft does not have
              this method, so it is implemented here
    prefix    keys and values of virtual tokens before the real ones, in every layer (arXiv 2101.00190, section 4)
    prompt    embeddings of virtual tokens before the text (arXiv 2104.08691, section 2)
    IA3       vectors that scale k, v and the MLP's inner activations (arXiv 2205.05638, section 3.3)

For each method the lesson counts parameters, trains on the same tokens, times a forward pass, and tries to merge it. Each trains
with its own learning rate: the best of 1, 2 and 5 times a power of ten, found at 20 steps. The losses of a model this small,
trained for seconds, do not rank the methods for larger models. The places of their parameters and the extra work of a forward
pass are the same there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    begin,
    create_parser,
    finish,
    held_out_loss,
    load_model,
    picture,
    print_table,
    print_text,
    progress,
    train,
)
from finetuning_lessons.seeds import Measured, Results, Spread, add_flag, measure_seeds, print_place, time_in_turns
from finetuning_lessons.short_run import load_split, use_one_thread
from finetuning_lessons.words import text
from qlora_kit import cli
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

STEPS = 16  # of 4 x 128 tokens
LORA_RANK = 16
BOTTLENECK = 24  # hidden units of an adapter
VIRTUAL_TOKENS = 16
TIMED = 25  # forward passes per method
LOSS, TIME = "held-out loss, nats a token", "forward pass of 128 tokens, ms"
BASE = "base model"
CLAIMED_SHARE = {"full": "100 %", "LoRA": "0.1-1 %", "adapter": "1-5 %", "prefix": "< 0.1 %"}  # as often quoted


class Adapter(nn.Module):
    """A linear layer followed by a bottleneck: y + up(relu(down(y))), y = linear(x)."""

    def __init__(self, linear: nn.Linear, bottleneck: int):
        super().__init__()
        width = linear.out_features
        self.linear, self.down, self.up = linear, nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)  # so that training starts from the base model exactly
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer and its adapter: (B, T, in) -> (B, T, out)."""
        y = self.linear(x)  # (B, T, in) -> (B, T, out)
        return y + self.up(torch.relu(self.down(y)))  # (B, T, out) -> (B, T, bottleneck) -> (B, T, out)


def add_adapters(model: Any, bottleneck: int) -> Any:
    """Freeze the model and add an adapter after the last layer of each attention and each MLP, as in the paper."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Adapter(layer.self_attn.o_proj, bottleneck)
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj, bottleneck)
    return model


def add_lora(model: Any) -> PeftModel:
    return get_peft_model(
        model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def add_prefix(model: Any) -> PeftModel:
    return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM"))


def add_prompt(model: Any) -> PeftModel:
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM"))


def add_ia3(model: Any) -> PeftModel:
    targets, inner = ["k_proj", "v_proj", "down_proj"], ["down_proj"]  # feedforward_modules: peft scales their input
    return get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=inner, task_type="CAUSAL_LM"))


@dataclass(frozen=True)
class Method:
    apply: Callable[[Any], Any]  # base model -> model to train
    learning_rate: float


METHODS = {
    "full": Method(lambda model: model, 5e-4),
    "LoRA": Method(add_lora, 2e-3),
    "adapter": Method(lambda model: add_adapters(model, BOTTLENECK), 1e-2),
    "prefix": Method(add_prefix, 0.2),
    "prompt": Method(add_prompt, 1.0),
    "IA3": Method(add_ia3, 0.1),
}


@torch.no_grad()
def try_to_merge(model: Any, ids: torch.Tensor) -> tuple[str, Any]:
    """Try to merge what was trained into the base weights.

    Returns:
        "yes", or the reason against it; and the merged model, or None.
    """
    if not isinstance(model, PeftModel):
        added = any(isinstance(module, Adapter) for module in model.modules())
        return (text("no: relu", "否：有 relu") if added else text("is the model", "就是模型")), None
    try:
        merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    except AttributeError:  # peft gives prefix and prompt tuning no such method
        return text("no: input", "否：是輸入"), None
    model.eval()
    before, after = model(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
    error = float((after - before).abs().max() / before.abs().max())
    return (text("yes", "可以"), merged) if error < 1e-4 else (text(f"no: off by {error:.0e}", f"否：差 {error:.0e}"), None)


@torch.no_grad()
def time_forward(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return each model's median CPU milliseconds of a forward pass."""
    for model in models.values():
        model.eval()
    return time_in_turns({name: partial(model, input_ids=ids, use_cache=False) for name, model in models.items()}, rounds)


@dataclass(frozen=True)
class Facts:
    """The facts that no seed changes: trainable parameters, and whether the method merges."""

    trainable: int
    merges: str


def measure(seed: int, steps: int, facts: dict[str, Facts]) -> Measured:
    """Train each method on the same tokens, then time all of them; fills in `facts`."""
    split, models, merged = load_split(seed), {}, {}
    losses = {BASE: held_out_loss(load_model(), split.held_out)}
    for name, method in METHODS.items():
        progress(text(f"training: {name}", f"訓練：{name}"))
        torch.manual_seed(seed)
        models[name] = method.apply(load_model())
        trainable, _ = count_parameters(models[name])
        train(models[name], split.train, steps, method.learning_rate)
        losses[name] = held_out_loss(models[name], split.held_out)
        merges, without = try_to_merge(models[name], split.held_out[:1])
        if without is not None:
            merged[f"{name} merged"] = without
        facts[name] = Facts(trainable, merges)
    progress(text("timing all of them in turns", "輪流測量時間"))
    return {LOSS: losses, TIME: time_forward(models | merged, split.held_out[:1], TIMED)}


def print_losses(one: Measured, results: Results, facts: dict[str, Facts], steps: int) -> None:
    total = facts["full"].trainable
    rows = []
    for name, fact in facts.items():
        share = f"{100 * fact.trainable / total:.2f} %"
        row = [name, f"{fact.trainable:,}", share, CLAIMED_SHARE.get(name, "-"), f"{METHODS[name].learning_rate:g}"]
        rows.append([*row, f"{one[LOSS][name]:.3f}", f"{results.of(LOSS, name):.3f}"])
    title = text(f"Held-out loss after {steps} steps of 4 x 128 tokens", f"{steps} 步（每步 4 x 128 個 token）後的驗證損失")
    header = [text("method", "方法"), text("trained", "訓練參數"), text("share", "比例"), text("quoted", "常見說法")]
    header += [text("rate", "學習率"), text("this run", "這一次"), results.title()]
    print_table(title, header, rows)


def over_base(results: Results, name: str) -> Spread:
    """Return by how many percent a model takes longer than the base model, whose architecture is that of full fine-tuning."""
    return results.spread(lambda one: 100 * (one[TIME][name] / one[TIME]["full"] - 1))


def print_times(one: Measured, results: Results, facts: dict[str, Facts]) -> None:
    rows = []
    for name in one[TIME]:
        over = "-" if name == "full" else over_base(results, name).compared("+.0f", " %")
        merges = facts[name].merges if name in facts else "-"
        rows.append([name, merges, f"{one[TIME][name]:.1f}", results.median_range(TIME, name, 1), over])
    title = text("Milliseconds of a forward pass of 128 tokens, median (range)", "128 個 token 前向傳播的毫秒數，中位數（範圍）")
    header = [text("method", "方法"), text("mergeable", "可合併"), text("this run", "這一次"), results.title()]
    print_table(title, [*header, text("over base", "比基礎模型多")], rows, words=2)


def print_findings(results: Results, facts: dict[str, Facts]) -> None:
    def share(name: str) -> Spread:
        return results.spread(lambda one: 100 * (one[LOSS][BASE] - one[LOSS][name]) / (one[LOSS][BASE] - one[LOSS]["full"]))

    gained = {name: share(name) for name in METHODS if name != "full"}
    base, order = results.of(LOSS, BASE).mean, results.order(LOSS, {name: name for name in METHODS})
    print_text(
        text(
            f"The base model's loss is {base:.3f}. Of what full fine-tuning takes off it, "
            f"{', '.join(f'{name} takes {part:.0f} %' for name, part in gained.items())}. From the lowest loss: {order}.",
            f"基礎模型的損失是 {base:.3f}。全參數微調的降幅算 100% 的話，"
            f"{'、'.join(f'{name} 有 {part:.0f}%' for name, part in gained.items())}。損失由低到高：{order}。",
        )
    )
    qwen = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    assert qwen is not None
    here = 100 * facts["LoRA"].trainable / facts["full"].trainable
    there = 100 * qwen.lora_parameters(LORA_RANK, "all-linear") / qwen.parameters()
    print_text(
        text(
            "Shares are not a property of the method: they depend on the model's width, and on rank, bottleneck and number of "
            f"virtual tokens. LoRA's {here:.1f} % here is {there:.2f} % of Qwen2.5-3B at the same rank.",
            "比例不是方法本身的性質：它取決於模型的寬度，以及 rank、瓶頸寬度和虛擬 token 的數量。"
            f"LoRA 在這裡是 {here:.1f}%，同樣的 rank 在 Qwen2.5-3B 是 {there:.2f}%。",
        )
    )
    merged = [over_base(results, f"{name} merged").compared("+.0f", text(" %", "%")) for name in ("LoRA", "IA3")]
    print_text(
        text(
            f"Merged, LoRA takes {merged[0]} more than the base model and IA3 {merged[1]}: the products are the same. "
            f"Prefix and prompt also take {VIRTUAL_TOKENS} positions of the context and of the key-value cache.",
            f"合併之後，和基礎模型的時間相差：LoRA {merged[0]}，IA3 {merged[1]}；做的就是同樣的矩陣乘法。"
            f"prefix 和 prompt 還會占用 {VIRTUAL_TOKENS} 個上下文位置與 KV cache。",
        )
    )


def draw_losses(axes: Any, one: Measured, results: Results, facts: dict[str, Facts]) -> None:
    for name, fact in facts.items():
        share, loss = 100 * fact.trainable / facts["full"].trainable, results.of(LOSS, name)
        first = name == "full"
        axes.errorbar(share, loss.mean, yerr=loss.error, fmt="o", color=BLUE, capsize=4, label=results.label() if first else None)
        axes.plot(share, one[LOSS][name], "x", color=ORANGE, markersize=8, label=text("this run", "這一次") if first else None)
        axes.annotate(name, (share, loss.mean), (10, -4), textcoords="offset points")
    axes.axhline(one[LOSS][BASE], color=GREY, linestyle="--", label=text("base model", "基礎模型"))
    axes.set_xscale("log")
    axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.margins(0.14, 0.2)
    axes.set_title(text("Loss after the same tokens", "訓練同樣 token 後的損失"))
    axes.set_xlabel(text("trainable parameters (% of the model, logarithmic)", "可訓練參數（占模型的 %，對數刻度）"))
    axes.set_ylabel(text("held-out loss (nats a token)", "驗證損失（nats / token）"))
    axes.legend(loc="lower left", fontsize=9)


def draw_times(axes: Any, results: Results) -> None:
    """Draw what each method takes more than the base model; merged models have a lighter colour."""
    extra = {name: over_base(results, name) for name in results.measured[0][TIME] if name != "full"}
    names = sorted(extra, key=lambda name: extra[name].mean)
    labels = [text(name, name.replace("merged", "合併後")) for name in names]
    means, errors = [extra[name].mean for name in names], [extra[name].error for name in names]
    colours = [SKY if name.endswith("merged") else BLUE for name in names]
    axes.barh(labels, means, xerr=errors, color=colours, capsize=4)
    axes.axvline(0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title(text("Forward pass of 128 tokens", "128 個 token 的前向傳播"))
    axes.set_xlabel(text("more time than the base model (%), mean ± standard error", "比基礎模型多花的時間（%），平均 ± 標準誤"))


def draw(path: Path, one: Measured, results: Results, facts: dict[str, Facts]) -> None:
    with picture(path, columns=2, size=(12, 4.8)) as (left, right):
        draw_losses(left, one, results, facts)
        draw_times(right, results)


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "methods")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="optimizer steps of each method (%(default)s)")
    add_flag(parser)
    arguments = begin(parser, argv)
    use_one_thread()
    facts: dict[str, Facts] = {}
    steps = arguments.steps
    one, results = measure_seeds(arguments, lambda seed: measure(seed, steps, facts), {"steps": steps})
    print_losses(one, results, facts, steps)
    print_times(one, results, facts)
    print_findings(results, facts)
    print_place(one, results, LOSS)
    draw(arguments.output_dir / "methods.png", one, results, facts)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
