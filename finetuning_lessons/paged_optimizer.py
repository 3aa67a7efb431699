"""Adam's state in 32 bits, in 8 bits and paged: bytes, time and loss.

    python -m finetuning_lessons.paged_optimizer

Adam keeps two moments for each trained parameter. In 32 bits they take 8 bytes; in 8 bits (arXiv 2110.02861) 2 bytes, and one
fp32 absmax for every 256 values. bitsandbytes keeps tensors of less than 4,096 elements in 32 bits.

Paging (QLoRA, arXiv 2305.14314, section 3) does not make the state smaller. CUDA moves its pages to the host when the GPU is
full, and back when a step needs them, so that a peak, as of one long sequence, does not end the run. bitsandbytes pages tensors
of 100,000 elements or more.

The lesson measures the bytes of each state, the time of a step and the loss, for several seeds with --seeds, and computes how
much of a run's memory paging can move. It does not measure what moving pages costs: that takes a GPU that is full.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from finetuning_lessons.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    begin,
    create_parser,
    finish,
    held_out_loss,
    load_model,
    picture,
    print_table,
    print_text,
    progress,
)
from finetuning_lessons.memory import METHODS, account_bytes
from finetuning_lessons.seeds import Measured, Results, add_flag, measure_seeds, print_place, time_in_turns
from finetuning_lessons.short_run import load_split, use_one_thread
from finetuning_lessons.words import HELD_OUT_LOSS, percent, text
from qlora_kit import cli
from qlora_kit.config import GIB, MIB
from qlora_kit.planning.shape import KNOWN_CONFIGS, ModelShape, read_shape

STEPS = 16  # of 4 x 128 tokens
ROUNDS = 7  # steps of each optimizer that are timed
LEARNING_RATE = 2e-3
PAGED_FROM = 100_000  # elements of a tensor (bitsandbytes 0.50.2, optim/optimizer.py, get_state_buffer)
WIDE, NARROW, PAGED = "AdamW, 32 bits", "AdamW, 8 bits", "paged AdamW, 8 bits"
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    WIDE: torch.optim.AdamW,
    NARROW: bnb.optim.AdamW8bit,
    PAGED: bnb.optim.PagedAdamW8bit,
}
NAMES = {WIDE: (WIDE, "AdamW，32-bit"), NARROW: (NARROW, "AdamW，8-bit"), PAGED: (PAGED, "分頁 AdamW，8-bit")}
COLOURS = {WIDE: GREY, NARROW: BLUE, PAGED: GREEN}
LOSSES, TIME = "held-out loss, nats a token", "optimizer step of all weights, ms"


def load_adapted_model(seed: int) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(load_model(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def join_parameters(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Copy the parameters into one tensor, as qlora_kit/fast/flat_adapters.py does."""
    return [nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))]


@dataclass(frozen=True)
class State:
    """Size of an optimizer's state after its first step."""

    bytes: int
    parameters: int
    in_allocator: int | None  # bytes that torch's allocator holds for it; None without a GPU


def compared_optimizers() -> list[str]:
    """Return the optimizers that differ here: without a GPU the paged one is the plain one."""
    return [WIDE, NARROW, PAGED] if torch.cuda.is_available() else [WIDE, NARROW]


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of moments and their absmax values, without step counts and the 256 levels that all tensors share."""
    tensors = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step" and not key.startswith("qmap")
    ]
    return sum(tensor.nbytes for tensor in tensors)


def create_optimizer(name: str, parameters: list[nn.Parameter]) -> Any:
    """Create an optimizer of a copy of `parameters` with random gradients, on the GPU if there is one."""
    copies = [nn.Parameter(one.detach().to("cuda" if torch.cuda.is_available() else "cpu", copy=True)) for one in parameters]
    for parameter in copies:
        parameter.grad = torch.randn_like(parameter)
    return OPTIMIZERS[name](copies, lr=LEARNING_RATE, weight_decay=0.0)


def measure_state(name: str, parameters: list[nn.Parameter]) -> State:
    """Take a step, which creates the state."""
    optimizer = create_optimizer(name, parameters)
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    optimizer.step()
    in_allocator = torch.cuda.memory_allocated() - before if on_gpu else None
    return State(state_bytes(optimizer), sum(parameter.numel() for parameter in parameters), in_allocator)


def measure_states() -> dict[tuple[str, str], State]:
    """Measure each optimizer with LoRA's tensors, with LoRA in one tensor, and with all weights."""
    adapters = trainable_parameters(load_adapted_model(0))
    trained = {
        text(f"LoRA, {len(adapters)} tensors", f"LoRA，{len(adapters)} 個張量"): adapters,
        text("LoRA, in one tensor", "LoRA，合成一個張量"): join_parameters(adapters),
        text("all weights", "所有權重"): list(load_model().parameters()),
    }
    return {
        (what, name): measure_state(name, parameters) for what, parameters in trained.items() for name in compared_optimizers()
    }


def time_steps() -> dict[str, float]:
    """Return the milliseconds of each optimizer's step for all weights."""
    weights = list(load_model().parameters())
    optimizers = {name: create_optimizer(name, weights) for name in compared_optimizers()}

    def step(name: str) -> None:
        optimizers[name].step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return time_in_turns({name: partial(step, name) for name in optimizers}, ROUNDS)


def measure(seed: int) -> Measured:
    """Train with each optimizer from the same A on the same batches; measure held-out losses and the time of a step."""
    blocks, losses = load_split(seed), {}
    for name in compared_optimizers():
        progress(text(f"training with {name}", f"用 {NAMES[name][1]} 訓練"))
        model = load_adapted_model(seed)
        train_with(name, model, blocks.train, STEPS)
        losses[name] = held_out_loss(model, blocks.held_out)
    return {LOSSES: losses, TIME: time_steps()}


def state_rows(states: dict[tuple[str, str], State]) -> list[list[str]]:
    return [
        [
            what,
            text(*NAMES[name]),
            f"{state.parameters:,}",
            f"{state.bytes / MIB:.2f}",
            f"{state.bytes / state.parameters:.2f}",
            *([] if state.in_allocator is None else [f"{state.in_allocator / MIB:.2f}"]),
        ]
        for (what, name), state in states.items()
    ]


def train_with(name: str, model: Any, blocks: Tensor, steps: int) -> list[float]:
    """Train like lesson.train with another optimizer, whose 8 bits cover small tensors too; return each step's loss."""
    small_too = {"min_8bit_size": 1} if "8 bits" in name else {}
    optimizer = OPTIMIZERS[name](trainable_parameters(model), lr=LEARNING_RATE, weight_decay=0.0, **small_too)
    model.train()
    losses = []
    for step in range(steps):
        ids = blocks[torch.arange(4 * step, 4 * step + 4) % len(blocks)]  # (4, T)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def paged_share(shape: ModelShape, rank: int) -> float:
    """Return the share of LoRA's parameters in tensors large enough to be paged, if each A and B is a tensor of its own."""
    sizes = [rank * width for both in shape.projections().values() for width in both]
    return sum(size for size in sizes if size >= PAGED_FROM) / sum(sizes)


def qwen_rows(shape: ModelShape) -> list[list[str]]:
    """Return the predicted state of Qwen2.5-3B with LoRA on all projections, and with all weights trained."""
    trained = {f"LoRA, rank {rank}": shape.lora_parameters(rank, "all-linear") for rank in (8, 16, 64)}
    trained[text("all weights", "所有權重")] = shape.parameters()
    in_8_bits = 2 + 2 * 4 / 256  # bytes: two moments, and for each an absmax in 256 values
    return [
        [what, f"{count:,}", f"{4 * count / MIB:,.0f}", f"{8 * count / MIB:,.0f}", f"{in_8_bits * count / MIB:,.0f}"]
        for what, count in trained.items()
    ]


def movable_gib(shape: ModelShape) -> dict[str, tuple[float, float]]:
    """Return for each method how much of a run's memory paging can move, the state, and what stays, in GiB at 1 x 512 tokens."""
    accounts = {method: account_bytes(method, shape, 512, shape.layers) for method in METHODS}
    return {
        method: (parts["optimizer"] / GIB, (sum(parts.values()) - parts["optimizer"]) / GIB) for method, parts in accounts.items()
    }


def print_tables(states: dict[tuple[str, str], State], one: Measured, results: Results, shape: ModelShape) -> None:
    header = text("trained|optimizer|parameters|state, MiB|bytes each", "訓練的參數|優化器|參數量|狀態 MiB|每個參數 bytes").split(
        "|"
    )
    header += ["torch, MiB"] if torch.cuda.is_available() else []
    print_table(text("The embedded model", "內附的模型"), header, state_rows(states), words=2)
    title = text("Qwen2.5-3B, MiB, computed", "Qwen2.5-3B，MiB，計算值")
    header = text(
        "trained|parameters|gradients fp32|state 32 bits|state 8 bits", "訓練的參數|參數量|梯度 fp32|狀態 32-bit|狀態 8-bit"
    ).split("|")
    print_table(title, header, qwen_rows(shape))
    rows = [
        [text(*NAMES[name]), f"{one[LOSSES][name]:.4f}", f"{results.of(LOSSES, name):.4f}", results.median_range(TIME, name, 1)]
        for name in compared_optimizers()
    ]
    header = [text("optimizer", "優化器"), text(*HELD_OUT_LOSS), results.title()]
    title = text(
        f"{STEPS} steps of 4 x 128 tokens; a step of all weights", f"訓練 {STEPS} 步，每步 4 x 128 個 token；更新所有權重的一步"
    )
    print_table(title, [*header, text("step, ms (range)", "一步 ms（範圍）")], rows)


def print_findings(states: dict[tuple[str, str], State], results: Results, shape: ModelShape) -> None:
    smaller = [states[what, WIDE].bytes / states[what, NARROW].bytes for what in dict.fromkeys(what for what, _ in states)]
    slower = results.spread(lambda run: run[TIME][NARROW] / run[TIME][WIDE])
    least, most = min(slower.values), max(slower.values)
    print_text(
        text(
            f"8 bits make the state of all weights {smaller[2]:.1f} times smaller, that of LoRA's matrices in one tensor "
            f"{smaller[1]:.1f} times, and in tensors of their own {smaller[0]:.1f} times: the small ones stay in 32 bits. A step "
            f"for all weights takes {slower.median:.1f} times as long here ({least:.1f} to {most:.1f}): it unpacks, computes in "
            "32 bits and packs again.",
            f"8-bit 讓所有權重的狀態縮小為 1/{smaller[2]:.1f}；LoRA 的矩陣合成一個張量時是 1/{smaller[1]:.1f}，"
            f"各自一個張量時只有 1/{smaller[0]:.1f}，因為小張量仍用 32-bit。更新所有權重的一步在這裡要花 {slower.median:.1f} "
            f"倍的時間（{least:.1f} 到 {most:.1f}）：先解開，用 32-bit 計算，再壓回去。",
        )
    )
    gap = results.gap(LOSSES, NARROW, WIDE).compared("+.4f", " nats")
    print_text(
        text(
            f"With all moments in 8 bits, those of small tensors too, the held-out loss differs by {gap}.",
            f"所有動差都用 8-bit（包括小張量）時，驗證損失相差 {gap}。",
        )
    )
    shares = {method: 100 * state / (state + rest) for method, (state, rest) in movable_gib(shape).items()}
    print_text(
        text(
            f"What paging can move is the state alone. Of what a 3B model needs at 1 x 512 tokens that is {shares['QLoRA']:.0f} "
            f"% with QLoRA, {shares['LoRA']:.0f} % with LoRA and {shares['full']:.0f} % in full fine-tuning: decisive "
            "there, a last reserve here.",
            f"分頁能移走的只有優化器狀態。3B 模型、1 x 512 個 token 時，QLoRA 只占 {shares['QLoRA']:.0f}%，LoRA "
            f"{shares['LoRA']:.0f}%，全參數微調則占 {shares['full']:.0f}%：對後者很關鍵，對 QLoRA 只是最後的備援。",
        )
    )
    at_16, at_8 = (100 * paged_share(shape, rank) for rank in (16, 8))
    print_text(
        text(
            f"Of LoRA's parameters on Qwen2.5-3B, {at_16:.0f} % at rank 16 and {at_8:.0f} % at rank 8 are in tensors of "
            f"{PAGED_FROM:,} elements or more. The state of the others stays on the GPU, whatever the optimizer is called, "
            "unless all are kept in one tensor, as this toolkit's fast path does.",
            f"在 Qwen2.5-3B 上，LoRA 的參數在 rank 16 時有 {at_16:.0f}%、rank 8 時有 {at_8:.0f}% 位於 {PAGED_FROM:,} "
            "個元素以上的張量。其餘的狀態不論優化器叫什麼名字都留在 GPU 上，除非像本工具的快速路徑那樣，把全部放進同一個張量。",
        )
    )
    print_text(
        text(
            "Not measured here: how long a step takes while pages move. That needs a GPU that is full.",
            "這裡沒有測量：搬移分頁時，一步要花多久。這需要一張記憶體已滿的 GPU。",
        )
    )


def draw(path: Path, states: dict[tuple[str, str], State], shape: ModelShape) -> None:
    with picture(path, columns=2, size=(13, 4.8)) as (left, right):
        trained = list(dict.fromkeys(what for what, _ in states))
        names = compared_optimizers()
        for number, name in enumerate(names):
            values = [states[what, name].bytes / states[what, name].parameters for what in trained]
            places = [place + 0.27 * (number - (len(names) - 1) / 2) for place in range(len(trained))]
            bars = left.bar(places, values, 0.25, color=COLOURS[name], label=text(*NAMES[name]))
            left.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=9)
        labels = text("LoRA, many tensors|LoRA, in one tensor|all weights", "LoRA，許多張量|LoRA，合成一個張量|所有權重")
        left.set_xticks(range(len(trained)), labels.split("|"))
        left.set(title=text("State of the optimizer", "優化器的狀態"), ylim=(0, 11))
        left.set(xlabel=text("what is trained", "訓練的參數"), ylabel=text("bytes a parameter", "每個參數的 bytes"))
        left.legend(loc="upper right", ncols=3, fontsize=9)
        draw_movable(right, movable_gib(shape))


def draw_movable(axes: Any, movable: dict[str, tuple[float, float]]) -> None:
    """Draw the memory of each method as a bar of 100 %: what stays on the GPU, and the state, which paging can move."""
    for place, (state, rest) in enumerate(movable.values()):
        stays = 100 * rest / (state + rest)
        grey = axes.barh(place, stays, 0.5, color=GREY)
        orange = axes.barh(place, 100 - stays, 0.5, left=stays, color=ORANGE)
        shown = f"{percent(100 - stays)} ({state:.2g} / {state + rest:.3g} GiB)"
        if stays > 60:
            axes.text(stays - 1, place, shown, ha="right", va="center", color="white")
        else:
            axes.text((stays + 100) / 2, place, shown, ha="center", va="center")
    labels = [text("stays on the GPU", "留在 GPU"), text("optimizer state: paging can move it", "優化器狀態：分頁可以移走")]
    axes.legend([grey, orange], labels, loc="upper left", ncols=2, fontsize=9)
    axes.set_yticks(range(len(movable)), [text(*METHODS[method]) for method in movable])
    axes.set_title(
        text("What paging can move: a 3B model, 1 x 512 tokens, computed", "分頁能移走多少：3B 模型，1 x 512 個 token，計算值")
    )
    axes.set(xlim=(0, 100), ylim=(-0.5, len(movable) + 0.2), xlabel=text("% of the run's memory", "占訓練記憶體的 %"))
    axes.grid(axis="y", visible=False)


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "paged_optimizer")
    add_flag(parser)
    arguments = begin(parser, argv)
    use_one_thread()
    # print_findings says that nothing is paged on a CPU.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    assert shape is not None
    progress(text("measuring the state of each optimizer", "測量各優化器的狀態"))
    states = measure_states()
    one, results = measure_seeds(arguments, measure, {"steps": STEPS})
    print_tables(states, one, results, shape)
    print_findings(states, results, shape)
    print_place(one, results, LOSSES)
    draw(arguments.output_dir / "paged_optimizer.png", states, shape)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
