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
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import (
    BLUE,
    ORANGE,
    create_parser,
    held_out_loss,
    load_model,
    open_folder,
    picture,
    print_table,
    print_text,
    train,
)
from finetuning_lessons.short_run import load_split, use_one_thread
from qlora_kit import cli
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

STEPS = 16  # of 4 x 128 tokens
LORA_RANK = 16
BOTTLENECK = 24  # hidden units of an adapter
VIRTUAL_TOKENS = 16
TIMED = 25  # forward passes per method; the fastest counts
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


@dataclass
class Result:
    trainable: int
    share: float  # of the base model's parameters, in percent
    loss: float  # held out, nats a token
    merges: str  # "yes", or why not
    milliseconds: float = 0.0  # of a forward pass
    merged_milliseconds: float | None = None


@torch.no_grad()
def try_to_merge(model: Any, ids: torch.Tensor) -> tuple[str, Any]:
    """Try to merge what was trained into the base weights.

    Returns:
        "yes", or the reason against it; and the merged model, or None.
    """
    if not isinstance(model, PeftModel):
        added = any(isinstance(module, Adapter) for module in model.modules())
        return ("no: the relu is in the way" if added else "is the model"), None
    try:
        merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    except AttributeError:  # peft gives prefix and prompt tuning no such method
        return "no: its tokens are input", None
    model.eval()
    before, after = model(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
    error = float((after - before).abs().max() / before.abs().max())
    return ("yes", merged) if error < 1e-4 else (f"no: off by {error:.0e}", None)


@torch.no_grad()
def time_forward(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return each model's CPU milliseconds in the fastest of `rounds` forward passes; other programs' time is not counted."""
    fastest = dict.fromkeys(models, float("inf"))
    for model in models.values():
        model.eval()
    for _ in range(rounds):
        for name, model in models.items():
            started = time.process_time()
            model(input_ids=ids, use_cache=False)
            fastest[name] = min(fastest[name], 1000 * (time.process_time() - started))
    return fastest


def compare(steps: int) -> dict[str, Result]:
    """Train each method on the same tokens, then time all of them."""
    text, models, merged, results = load_split(), {}, {}, {}
    all_parameters = count_parameters(load_model())[1]
    for name, method in METHODS.items():
        torch.manual_seed(0)
        models[name] = method.apply(load_model())
        trainable, _ = count_parameters(models[name])
        train(models[name], text.train, steps, method.learning_rate)
        loss = held_out_loss(models[name], text.held_out)
        merges, without = try_to_merge(models[name], text.held_out[:1])
        if without is not None:
            merged[f"{name} merged"] = without
        results[name] = Result(trainable, 100 * trainable / all_parameters, loss, merges)
    times = time_forward(models | merged, text.held_out[:1], TIMED)
    for name, result in results.items():
        result.milliseconds, result.merged_milliseconds = times[name], times.get(f"{name} merged")
    return results


def result_rows(results: dict[str, Result]) -> list[list[str]]:
    base = results["full"].milliseconds  # full fine-tuning does not change the architecture
    return [
        [
            name,
            result.merges,
            f"{result.trainable:,}",
            f"{result.share:.2f} %",
            CLAIMED_SHARE.get(name, "-"),
            f"{METHODS[name].learning_rate:g}",
            f"{result.loss:.3f}",
            f"{result.milliseconds:.1f}",
            f"{100 * (result.milliseconds / base - 1):+.0f} %",
            "-" if result.merged_milliseconds is None else f"{result.merged_milliseconds:.1f}",
        ]
        for name, result in results.items()
    ]


def print_findings(results: dict[str, Result], base_loss: float) -> None:
    best = min(results, key=lambda name: results[name].loss)
    gained = {name: 100 * (base_loss - result.loss) / (base_loss - results["full"].loss) for name, result in results.items()}
    print_text(
        f"The base model's loss is {base_loss:.3f}. Of what full fine-tuning takes off it, LoRA takes {gained['LoRA']:.0f} %, "
        f"the adapter {gained['adapter']:.0f} %, prefix {gained['prefix']:.0f} %, prompt {gained['prompt']:.0f} %, "
        f"IA3 {gained['IA3']:.0f} %. Lowest: {best}."
        + ("" if best == "full" else " That full fine-tuning is always best does not hold for runs this short.")
    )
    qwen = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    assert qwen is not None
    print_text(
        "Shares are not a property of the method: they depend on the model's width, and on rank, bottleneck and number of "
        f"virtual tokens. LoRA's {results['LoRA'].share:.1f} % here is "
        f"{100 * qwen.lora_parameters(LORA_RANK, 'all-linear') / qwen.parameters():.2f} % of Qwen2.5-3B at the same rank."
    )
    print_text(
        "Merged, LoRA and IA3 take what the base model takes; a few percent more or less are noise. "
        f"Prefix and prompt also take {VIRTUAL_TOKENS} positions of the context and of the key-value cache."
    )


def draw(path: Path, results: dict[str, Result], base_loss: float) -> None:
    names = list(results)
    with picture(path, columns=2, size=(12, 4.8)) as (left, right):
        for name, result in results.items():
            left.plot(result.share, result.loss, "o", color=BLUE, markersize=9)
            left.annotate(name, (result.share, result.loss), (8, -4), textcoords="offset points")
        left.axhline(base_loss, color=ORANGE, linestyle="--", label="base model")
        left.set_xscale("log")
        left.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        left.margins(0.12, 0.18)
        left.set(title="Loss after the same tokens", xlabel="trainable parameters (% of the model, logarithmic)")
        left.set(ylabel="held-out loss (nats a token)")
        left.legend()
        bars = right.bar(names, [result.milliseconds for result in results.values()], color=BLUE)
        right.bar_label(bars, [f"{result.milliseconds:.1f}" for result in results.values()], padding=2)
        right.margins(y=0.1)
        right.set(title="Forward pass of 128 tokens, not merged", xlabel="method", ylabel="milliseconds (fastest of several)")


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "methods")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="optimizer steps of each method (%(default)s)")
    arguments = parser.parse_args(argv)
    folder = open_folder(arguments.output_dir)
    use_one_thread()
    base_loss = held_out_loss(load_model(), load_split().held_out)
    results = compare(arguments.steps)
    header = ["method", "mergeable", "trainable", "share", "quoted", "rate", "loss", "forward ms", "over base", "merged ms"]
    print_table(f"{arguments.steps} steps of 4 x 128 tokens", header, result_rows(results), words=2)
    print_findings(results, base_loss)
    draw(folder / "methods.png", results, base_loss)


if __name__ == "__main__":
    cli.run(main)
