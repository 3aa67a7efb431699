"""GPU memory of full fine-tuning, LoRA and QLoRA for models of 1B to 70B parameters, and the smallest GPU for each.

    python -m finetuning_lessons.memory

A rule of thumb counts bytes per parameter: 12 for full fine-tuning (weights 2, gradients 2, Adam's two moments 8), 2 for LoRA,
0.5 for QLoRA. The account of qlora_kit.planning.memory adds what the rule leaves out: absmax values of the 4-bit blocks, the
16-bit embedding, the adapters with their gradients and moments, activations, logits, and the CUDA context.

Neither counts the fp32 copy of the weights that mixed precision keeps in full fine-tuning, 4 more bytes per parameter.
No model is loaded. 1 GiB = 2**30 bytes.
"""

from dataclasses import dataclass
from typing import Any

from finetuning_lessons.lesson import BLUE, GREEN, GREY, RED, create_parser, open_folder, picture, print_table, print_text
from qlora_kit import cli
from qlora_kit.config import GIB, Config, TrainingSettings
from qlora_kit.config_file import override
from qlora_kit.planning.memory import CONTEXT_BYTES, estimate_memory
from qlora_kit.planning.shape import KNOWN_CONFIGS, ModelShape, read_shape

CARDS_GIB = (8, 12, 16, 24, 40, 80)
RULE_BYTES = {"full": 12.0, "LoRA": 2.0, "QLoRA": 0.5}  # per parameter
COLOURS = {"full": RED, "LoRA": BLUE, "QLoRA": GREEN}
BFLOAT16_BYTES = 2
# Rows of the account that are not weights, gradients or optimizer state.
ACTIVATIONS = ("kept activations", "largest layer's workspace", "logits above that", "libraries")


def llama(layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, tied: bool = False) -> ModelShape:
    return ModelShape("llama", layers, hidden, heads, kv_heads, hidden // heads, mlp, vocabulary, tied)


def model_shapes() -> dict[str, ModelShape]:
    """Return the shapes of published models, from their config.json files."""
    qwen = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    assert qwen is not None
    return {
        "1B": llama(16, 2048, 32, 8, 8192, 128256, tied=True),  # Llama 3.2
        "3B": qwen,
        "7B": llama(32, 4096, 32, 32, 11008, 32000),  # Llama 2
        "13B": llama(40, 5120, 40, 40, 13824, 32000),  # Llama 2
        "30B": llama(60, 6656, 52, 52, 17920, 32000),  # LLaMA
        "70B": llama(80, 8192, 64, 8, 28672, 32000),  # Llama 2
    }


@dataclass(frozen=True)
class Measured:
    """A peak measured in benchmarks/README.md, of Qwen2.5-3B's shape in 4 bits on an NVIDIA H200, 2026-11-22."""

    run: str
    micro_batch: int
    recomputed: int  # layers of 36
    changes: dict[str, Any]
    peak_gib: float  # reserved by torch's allocator


SAME_AS_CHART = "3B, rank 16, 1 x 512"
MEASURED = (
    Measured(SAME_AS_CHART, 1, 36, {}, 2.59),
    Measured("micro-batch 16", 16, 36, {}, 4.87),
    Measured("rank 64, 1,024 tokens, micro-batch 4", 4, 36, {"lora.rank": 64, "data.max_length": 1024}, 4.35),
    Measured("the planner's choice, 8 GiB", 4, 0, {}, 6.90),
    Measured("configs/lean.yaml", 1, 36, {"performance.offload_embedding": True}, 2.00),
)


def rule_bytes(method: str, shape: ModelShape) -> float:
    return RULE_BYTES[method] * shape.parameters()


def account_bytes(method: str, shape: ModelShape, length: int, recomputed: int) -> dict[str, float]:
    """Return the bytes of each part of memory for one sequence of `length` tokens at a time, rank 16 on all projections.

    The toolkit does not train all weights of a model. The account of "full" is that of 16-bit LoRA without adapters, plus
    bfloat16 gradients and two fp32 moments for every parameter.

    Args:
        recomputed: number of layers whose activations are recomputed in the backward pass.
    """
    changes = {
        "quantization.load_in_4bit": method == "QLoRA",
        "data.max_length": length,
        "training.optim": "adamw_8bit" if method == "QLoRA" else "adamw_torch",
    }
    parts = estimate_memory(shape, override(Config(), changes), 1, recomputed)
    sums = {
        "weights": parts["projection weights"] + parts["embedding and norms"] + parts["adapters (fp32)"],
        "gradients": parts["gradients (fp32)"],
        "optimizer": parts["optimizer state"],
        "activations": sum(parts[name] for name in ACTIVATIONS),
        "context": CONTEXT_BYTES,
    }
    if method == "full":
        everything = shape.parameters()
        sums["weights"] -= parts["adapters (fp32)"]
        sums["gradients"] = float(BFLOAT16_BYTES * everything)
        sums["optimizer"] = TrainingSettings(optim="adamw_torch").optimizer_bytes * everything
    return sums


def smallest_card(needed: float) -> str:
    """Return the smallest of CARDS_GIB that holds `needed` bytes."""
    return next((f"{card} GiB" for card in CARDS_GIB if needed <= card * GIB), f"more than {CARDS_GIB[-1]}")


def gib(number: float) -> str:
    return f"{number / GIB:,.2f}"


def account_rows(length: int) -> list[list[str]]:
    rows = []
    for name, shape in model_shapes().items():
        for method in RULE_BYTES:
            parts = account_bytes(method, shape, length, shape.layers)
            needed = sum(parts.values())
            figures = [gib(rule_bytes(method, shape)), *map(gib, parts.values()), gib(needed), smallest_card(needed)]
            rows.append([f"{name} ({shape.parameters() / 1e9:.2f} billion)", method, *figures])
    return rows


def predicted_gib(point: Measured) -> float:
    config = override(Config(), point.changes)
    return sum(estimate_memory(model_shapes()["3B"], config, point.micro_batch, point.recomputed).values()) / GIB


def measured_rows() -> list[list[str]]:
    def row(point: Measured) -> list[str]:
        predicted = predicted_gib(point)
        return [point.run, f"{predicted:.2f}", f"{point.peak_gib:.2f}", f"{100 * (predicted / point.peak_gib - 1):+.1f} %"]

    return [row(point) for point in MEASURED]


def print_findings(length: int) -> None:
    shapes = model_shapes()
    seven, three = shapes["7B"], shapes["3B"]
    sums = {method: sum(account_bytes(method, seven, length, seven.layers).values()) for method in RULE_BYTES}
    print_text(
        f"7B: the rule says {gib(rule_bytes('full', seven))}, {gib(rule_bytes('LoRA', seven))} and "
        f"{gib(rule_bytes('QLoRA', seven))} GiB; the account {gib(sums['full'])}, {gib(sums['LoRA'])} and {gib(sums['QLoRA'])}. "
        f"For full fine-tuning the rule is nearly everything; of QLoRA it misses "
        f"{100 * (1 - rule_bytes('QLoRA', seven) / sums['QLoRA']):.0f} %. QLoRA of a 7B model is often said to fit 16 GB: "
        f"at 1 x {length} tokens the smallest card that holds it is one of {smallest_card(sums['QLoRA'])}."
    )
    kept, saved = (sum(account_bytes("QLoRA", three, length, layers).values()) for layers in (0, three.layers))
    print_text(
        f"3B in 4 bits: computing all activations again takes {gib(saved)} instead of {gib(kept)} GiB with "
        f"CUDA's context, {100 * (1 - saved / kept):.0f} % less; 5.5 and 3.5 GB, 36 % less, are often quoted."
    )


def draw(path: Any, length: int) -> None:
    with picture(path, size=(12, 6.5)) as axes:
        shapes = model_shapes()
        for offset, (method, colour) in enumerate(COLOURS.items(), -1):
            sums = [sum(account_bytes(method, shape, length, shape.layers).values()) / GIB for shape in shapes.values()]
            places = [place + 0.27 * offset for place in range(len(shapes))]
            axes.bar(places, sums, 0.25, color=colour, label=f"{method}: the account")
            for place, value in zip(places, sums, strict=True):  # at the foot of the bar, below all lines
                axes.text(place, 0.34, f"{value:.3g}", ha="center", fontsize=9, color="white")
            rules = [rule_bytes(method, shape) / GIB for shape in shapes.values()]
            axes.hlines(rules, [p - 0.125 for p in places], [p + 0.125 for p in places], color="black", linewidth=2)
        axes.plot([], [], color="black", linewidth=2, label="rule: 12, 2, 0.5 bytes a parameter")
        measured = next(point.peak_gib for point in MEASURED if point.run == SAME_AS_CHART) + CONTEXT_BYTES / GIB
        at = list(shapes).index("3B") + 0.27
        axes.plot(at, measured, "D", color="gold", markeredgecolor="black", label="measured (3B, H200), with CUDA's context")
        for card in CARDS_GIB:
            axes.axhline(card, color=GREY, linestyle="--", linewidth=1)
            axes.text(1.005, card, f"{card} GiB", transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=GREY)
        axes.set_yscale("log")
        axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set_ylim(0.3, 2000)
        axes.grid(False)
        axes.set(title=f"Memory to train at 1 x {length} tokens, all activations computed again; dashed: GPUs")
        axes.set(xlabel="parameters of the model", ylabel="GPU memory (GiB, logarithmic)")
        axes.legend(loc="upper left")


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "memory")
    parser.add_argument("--length", type=int, default=512, metavar="TOKENS", help="of the one sequence (%(default)s)")
    arguments = parser.parse_args(argv)
    folder = open_folder(arguments.output_dir)
    header = [
        "model",
        "method",
        "rule",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "context",
        "account",
        "smallest card",
    ]
    print_table(f"GiB to train, 1 x {arguments.length} tokens", header, account_rows(arguments.length), words=2)
    header = ["run of the 3B model", "predicted GiB", "measured GiB", "error"]
    print_table("The account beside peaks measured on an H200 (torch's allocator alone)", header, measured_rows())
    print_findings(arguments.length)
    draw(folder / "memory.png", arguments.length)


if __name__ == "__main__":
    cli.run(main)
