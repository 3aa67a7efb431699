"""GPU memory of full fine-tuning, LoRA and QLoRA for models of 1B to 70B parameters, and the smallest GPU for each.

    python -m finetuning_lessons.memory

A rule of thumb counts bytes per parameter: 12 for full fine-tuning (weights 2, gradients 2, Adam's two moments 8), 2 for LoRA,
0.5 for QLoRA. The account of qlora_kit.planning.memory adds what the rule leaves out: absmax values of the 4-bit blocks, the
16-bit embedding, the adapters with their gradients and moments, activations, logits, and the CUDA context.

Neither counts the fp32 copy of the weights that mixed precision keeps in full fine-tuning, 4 more bytes per parameter.
No model is loaded. 1 GiB = 2**30 bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuning_lessons.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    begin,
    create_parser,
    finish,
    picture,
    print_table,
    print_text,
    progress,
)
from finetuning_lessons.words import text
from qlora_kit import cli
from qlora_kit.config import GIB, Config, TrainingSettings
from qlora_kit.config_file import override
from qlora_kit.planning.memory import CONTEXT_BYTES, estimate_memory
from qlora_kit.planning.shape import KNOWN_CONFIGS, ModelShape, read_shape

# GiB -> cards that have so many.
CARDS = {8: "RTX 4060, 3070", 12: "RTX 3060", 16: "RTX 5080, T4", 24: "RTX 3090, 4090", 40: "A100 40GB", 80: "A100 80GB"}
RULE_BYTES = {"full": 12.0, "LoRA": 2.0, "QLoRA": 0.5}  # per parameter
METHODS = {"full": ("full fine-tuning", "全參數微調"), "LoRA": ("LoRA", "LoRA"), "QLoRA": ("QLoRA", "QLoRA")}
COLOURS = {"full": RED, "LoRA": BLUE, "QLoRA": GREEN}
PARTS = {
    "weights": (("weights", "權重"), BLUE),
    "gradients": (("gradients", "梯度"), ORANGE),
    "optimizer": (("Adam's moments", "Adam 的動差"), GREEN),
    "rest": (("activations, logits, CUDA", "激活值、logits、CUDA"), GREY),
}
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line behind a text
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
    chinese: str
    micro_batch: int
    recomputed: int  # layers of 36
    changes: dict[str, Any]
    peak_gib: float  # reserved by torch's allocator


SAME_AS_CHART = "3B, rank 16, 1 x 512"
MEASURED = (
    Measured(SAME_AS_CHART, SAME_AS_CHART, 1, 36, {}, 2.59),
    Measured("micro-batch 16", "micro-batch 16", 16, 36, {}, 4.87),
    Measured(
        "rank 64, 1,024 tokens, micro-batch 4",
        "rank 64、1,024 個 token、micro-batch 4",
        4,
        36,
        {"lora.rank": 64, "data.max_length": 1024},
        4.35,
    ),
    Measured("the planner's choice, 8 GiB", "規劃器為 8 GiB 選的設定", 4, 0, {}, 6.90),
    Measured("configs/lean.yaml", "configs/lean.yaml", 1, 36, {"performance.offload_embedding": True}, 2.00),
)


def rule_bytes(method: str, shape: ModelShape) -> float:
    return RULE_BYTES[method] * shape.parameters()


def account_bytes(method: str, shape: ModelShape, length: int, recomputed: int) -> dict[str, float]:
    """Return the bytes of each of PARTS for one sequence of `length` tokens at a time, rank 16 on all projections.

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
        "rest": sum(parts[name] for name in ACTIVATIONS) + CONTEXT_BYTES,
    }
    if method == "full":
        everything = shape.parameters()
        sums["weights"] -= parts["adapters (fp32)"]
        sums["gradients"] = float(BFLOAT16_BYTES * everything)
        sums["optimizer"] = TrainingSettings(optim="adamw_torch").optimizer_bytes * everything
    return sums


def needed_bytes(method: str, shape: ModelShape, length: int) -> float:
    """Return the account's sum, with all activations computed again."""
    return sum(account_bytes(method, shape, length, shape.layers).values())


def smallest_card(needed: float) -> str:
    """Return the smallest of CARDS that holds `needed` bytes, by name."""
    fitting = [name for size, name in CARDS.items() if needed <= size * GIB]
    return fitting[0] if fitting else text("none of them", "都放不下")


def fits_on_card(size: str, card: int, length: int) -> str:
    """Return in one sentence which methods train a model of model_shapes() on a card of `card` GiB, by the account."""
    verdicts = []
    for method in reversed(METHODS):
        needed = needed_bytes(method, model_shapes()[size], length)
        share, (english, chinese) = needed / (card * GIB), METHODS[method]
        if share > 1:
            fits = text("does not fit", "放不下")
        else:
            fits = text("fits", "放得下") if share < 0.9 else text("barely fits", "勉強放得下")
        verdicts.append(text(f"{english} {fits} ({gib(needed)} GiB)", f"{fits}：{chinese}（{gib(needed)} GiB）"))
    return text(
        f"A {size} model on a card of {card} GB ({CARDS[card]}), at 1 x {length} tokens: {'; '.join(verdicts)}.",
        f"{size} 模型能在 {card} GB 的顯示卡（{CARDS[card]}）上訓練嗎？以 1 x {length} 個 token 計算：{'；'.join(verdicts)}。",
    )


def gib(number: float) -> str:
    """Return bytes as GiB with about three digits."""
    value = number / GIB
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def account_rows(length: int) -> list[list[str]]:
    rows = []
    for name, shape in model_shapes().items():
        for method in RULE_BYTES:
            parts = account_bytes(method, shape, length, shape.layers)
            needed = sum(parts.values())
            figures = map(gib, (rule_bytes(method, shape), *parts.values(), needed))
            rows.append([name, text(method, METHODS[method][1]), *figures, smallest_card(needed)])
    return rows


def predicted_gib(point: Measured) -> float:
    config = override(Config(), point.changes)
    return sum(estimate_memory(model_shapes()["3B"], config, point.micro_batch, point.recomputed).values()) / GIB


def measured_rows() -> list[list[str]]:
    def row(point: Measured) -> list[str]:
        predicted = predicted_gib(point)
        error = 100 * (predicted / point.peak_gib - 1)
        return [text(point.run, point.chinese), f"{predicted:.2f}", f"{point.peak_gib:.2f}", f"{error:+.1f} %"]

    return [row(point) for point in MEASURED]


def print_tables(length: int) -> None:
    header = text("model method rule weights gradients Adam rest sum", "模型 方法 經驗法則 權重 梯度 Adam 其他 合計").split()
    title = text(
        f"GiB to train at 1 x {length} tokens; rest: activations, logits, CUDA's context",
        f"訓練所需的 GiB，1 x {length} 個 token；其他：激活值、logits、CUDA context",
    )
    print_table(title, [*header, text("smallest card", "最小的顯示卡")], account_rows(length), words=2)
    title = text(
        "The account beside peaks measured on an H200 (torch's allocator alone)",
        "估算值與 H200 上實測的峰值（只計 torch 的配置器）",
    )
    header = text("run of the 3B model|predicted GiB|measured GiB|error", "3B 模型的執行|估算 GiB|實測 GiB|誤差").split("|")
    print_table(title, header, measured_rows())


def print_findings(length: int) -> None:
    print_text(fits_on_card("7B", 16, length))
    shapes = model_shapes()
    seven, three = shapes["7B"], shapes["3B"]
    rules = [gib(rule_bytes(method, seven)) for method in RULE_BYTES]
    sums = {method: needed_bytes(method, seven, length) for method in RULE_BYTES}
    account = [gib(needed) for needed in sums.values()]
    missed = 100 * (1 - rule_bytes("QLoRA", seven) / sums["QLoRA"])
    card = smallest_card(sums["QLoRA"])
    print_text(
        text(
            f"The rule of thumb for 7B (full, LoRA, QLoRA) says {rules[0]}, {rules[1]} and {rules[2]} GiB; the account says "
            f"{account[0]}, {account[1]} and {account[2]}. Of full fine-tuning the rule is nearly all; of QLoRA it misses "
            f"{missed:.0f} %. The smallest card for QLoRA of 7B is: {card}.",
            f"7B 模型（全參數、LoRA、QLoRA）的經驗法則是 {rules[0]}、{rules[1]}、{rules[2]} GiB；仔細估算則是 "
            f"{account[0]}、{account[1]}、{account[2]} GiB。對全參數微調，經驗法則幾乎全算到了；對 QLoRA 則少算了 {missed:.0f}%。"
            f"7B 的 QLoRA 可用的最小顯示卡：{card}。",
        )
    )
    kept, saved = (sum(account_bytes("QLoRA", three, length, layers).values()) for layers in (0, three.layers))
    less = 100 * (1 - saved / kept)
    print_text(
        text(
            f"3B in 4 bits: computing all activations again takes {gib(saved)} instead of {gib(kept)} GiB with "
            f"CUDA's context, {less:.0f} % less; 5.5 and 3.5 GB, 36 % less, are often quoted.",
            f"4-bit 的 3B 模型：重新計算所有激活值，只要 {gib(saved)} GiB，而不是 {gib(kept)} GiB（含 CUDA context），"
            f"少了 {less:.0f}%；常見的說法是 5.5 降到 3.5 GB，少 36%。",
        )
    )


def draw_parts(axes: Any, size: str, length: int) -> None:
    """Draw what each method needs for a model, split into PARTS, with a line for each card."""
    bottom = [0.0] * len(METHODS)
    for part, (label, colour) in PARTS.items():
        shape = model_shapes()[size]
        values = [account_bytes(method, shape, length, shape.layers)[part] / GIB for method in METHODS]
        axes.bar(range(len(METHODS)), values, 0.5, bottom=bottom, color=colour, label=text(*label))
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    for place, total in enumerate(bottom):
        axes.text(place, total + 0.8, f"{total:.1f} GiB", ha="center", bbox=WHITE)
    for card, name in CARDS.items():
        axes.axhline(card, color=RED, linestyle="--", linewidth=1, alpha=0.5)
        axes.text(2.95, card, f"{name}: {card}", va="bottom", ha="right", fontsize=9, color=RED)
    axes.set_xticks(range(len(METHODS)), [text(*label) for label in METHODS.values()])
    axes.set(xlim=(-0.5, 2.95), ylim=(0, 92), ylabel=text("GPU memory (GiB)", "GPU 記憶體（GiB）"))
    axes.set_title(text(f"A {size} model, split by what it is", f"{size} 模型：記憶體用在哪裡"))
    axes.grid(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.55, 0.83))


def draw_sizes(axes: Any, length: int) -> None:
    """Draw the sums of all models and methods as points, beside the rule of thumb and a measured run."""
    shapes = model_shapes()
    for method, colour in COLOURS.items():
        sums = [needed_bytes(method, shape, length) / GIB for shape in shapes.values()]
        axes.plot(range(len(shapes)), sums, "o-", color=colour, label=text(*METHODS[method]))
        rules = [rule_bytes(method, shape) / GIB for shape in shapes.values()]
        axes.plot(range(len(shapes)), rules, "_", color="black", markersize=14, mew=1.5)
    axes.plot([], [], "_", color="black", label=text("rule: 12, 2, 0.5 bytes a parameter", "經驗法則：每個參數 12、2、0.5 bytes"))
    measured = next(point.peak_gib for point in MEASURED if point.run == SAME_AS_CHART) + CONTEXT_BYTES / GIB
    label = text("measured: QLoRA of 3B, H200", "實測：3B 的 QLoRA，H200")
    axes.plot(list(shapes).index("3B"), measured, "D", color=SKY, markeredgecolor="black", zorder=3, label=label)
    for card, name in CARDS.items():
        axes.axhline(card, color=RED, linestyle="--", linewidth=1, alpha=0.5)
        axes.text(5.25, card, f"{name}: {card}", va="center", fontsize=9, color=RED, bbox=WHITE)
    axes.set_yscale("log")
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.set_xticks(range(len(shapes)), [f"{name}\n{shape.parameters() / 1e9:.2f}" for name, shape in shapes.items()])
    axes.set(xlim=(-0.3, 6.8), ylim=(0.4, 1500), title=text("Models of 1B to 70B", "1B 到 70B 的模型"))
    axes.set_xlabel(text("model, and its parameters (billions)", "模型與參數量（十億）"))
    axes.set_ylabel(text("GPU memory (GiB, logarithmic)", "GPU 記憶體（GiB，對數刻度）"))
    axes.grid(False)
    axes.legend(loc="upper left", fontsize=9)


def draw(path: Path, length: int) -> None:
    with picture(path, columns=2, size=(13, 5.8)) as (left, right):
        draw_parts(left, "7B", length)
        draw_sizes(right, length)
        left.figure.suptitle(
            text(
                f"Memory to train at 1 x {length} tokens, all activations computed again",
                f"訓練所需的記憶體：1 x {length} 個 token，激活值全部重新計算",
            )
        )


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "memory")
    parser.add_argument("--length", type=int, default=512, metavar="TOKENS", help="of the one sequence (%(default)s)")
    arguments = begin(parser, argv)
    progress(text("adding up the memory of 6 models x 3 methods", "計算 6 個模型 x 3 種方法的記憶體"))
    print_tables(arguments.length)
    print_findings(arguments.length)
    draw(arguments.output_dir / "memory.png", arguments.length)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
