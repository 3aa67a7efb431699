"""Memory and time of gradient checkpointing: bytes kept for the backward pass, peak, and time of a step.

    python -m finetuning_lessons.gradient_checkpointing

The backward pass needs the activations of the forward pass. With checkpointing (arXiv 1604.06174) each layer keeps only its
input, and its backward pass recomputes the rest. Often quoted: it saves 30 to 50 % of memory and costs 10 to 20 % of time.

On a CPU the lesson counts the bytes of each tensor that is created and freed (torch.utils._python_dispatch); on a GPU it reads
torch's allocator. It times a forward and backward pass of the embedded model with LoRA, without the optimizer step, which
checkpointing does not change: rounds in which both models run in turn, their median and range. Peaks and speeds of a 3B model,
measured on a GPU (benchmarks/README.md), stand beside it.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetuning_lessons.layers import count_parameters
from finetuning_lessons.lesson import (
    BLUE,
    GREY,
    ORANGE,
    begin,
    create_parser,
    finish,
    load_blocks,
    load_model,
    picture,
    print_table,
    print_text,
    progress,
)
from finetuning_lessons.short_run import use_one_thread
from finetuning_lessons.words import percent, text
from qlora_kit import cli
from qlora_kit.config import GIB, MIB, Config
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

BATCH = 2  # sequences
LENGTHS = (64, 128, 256, 512)  # tokens
ROUNDS = 5  # passes of each model that are timed, for each length
QUOTED_SAVING, QUOTED_COST = (30, 50), (10, 20)  # percent
# Of benchmarks/README.md: Qwen2.5-3B's shape in 4 bits on an NVIDIA H200, 2026-11-22. tokens -> GiB reserved without and with it:
# this toolkit at 1 x 512 (all layers and none recomputed), Unsloth at 16 x 512; and Unsloth's tokens/s.
ON_GPU_GIB = {"1 x 512": (3.49, 2.59), "16 x 512": (24.03, 4.81)}
ON_GPU_SPEED = (28_438, 19_125)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors created inside this context, until they are freed; shared memory is counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outside = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in outside:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._counted:
            return
        self._counted.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Step:
    """One forward and backward pass; bytes do not include weights and gradients."""

    kept: int  # bytes after the forward pass
    peak: int  # bytes
    times: tuple[float, ...]  # milliseconds of each round

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.times)


def load_adapted_model(checkpointing: bool, device: str) -> Any:
    model: Any = load_model()
    model.to(device)
    model.requires_grad_(False)
    if checkpointing:
        # Non-reentrant: gradients reach the adapters although the embedding's output needs none.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    return adapted.train()


def run_backward(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def count_bytes(model: Any, ids: torch.Tensor) -> tuple[int, int]:
    """Return the bytes kept after the forward pass, and the peak of both passes."""
    run_backward(model, ids)  # allocates the gradients, which are not counted
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = live.now
        loss.backward()
    return kept, live.peak


def time_backward(models: dict[bool, Any], ids: torch.Tensor) -> dict[bool, tuple[float, ...]]:
    """Return the milliseconds of each model's passes; in each round both run in turn."""
    clock = time.perf_counter if ids.is_cuda else time.process_time  # process_time leaves out other programs
    times: dict[bool, list[float]] = {key: [] for key in models}
    for _ in range(ROUNDS):
        for key, model in models.items():
            started = clock()
            run_backward(model, ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            times[key].append(1000 * (clock() - started))
    return {key: tuple(values) for key, values in times.items()}


def measure(device: str) -> dict[int, dict[bool, Step]]:
    """Measure a step of each length without (False) and with (True) checkpointing."""
    models = {checkpointing: load_adapted_model(checkpointing, device) for checkpointing in (False, True)}
    steps = {}
    for length in LENGTHS:
        progress(
            text(f"a step of {BATCH} x {length} tokens, {ROUNDS} rounds", f"{BATCH} x {length} 個 token 的一步，{ROUNDS} 輪")
        )
        ids = load_blocks(length)[:BATCH].to(device)
        counted = {key: count_bytes(model, ids) for key, model in models.items()}
        times = time_backward(models, ids)
        steps[length] = {key: Step(*counted[key], times[key]) for key in models}
    return steps


def change(new: float, old: float) -> float:
    """Return by how many percent `new` exceeds `old`."""
    return 100 * (new / old - 1)


def extra_times(step: dict[bool, Step]) -> list[float]:
    """Return by how many percent checkpointing lengthened the pass in each round, ascending."""
    return sorted(change(with_, without) for with_, without in zip(step[True].times, step[False].times, strict=True))


def byte_rows(steps: dict[int, dict[bool, Step]]) -> list[list[str]]:
    rows = []
    for length, step in steps.items():
        row = [f"{BATCH} x {length}"]
        for before, after in ((step[False].kept, step[True].kept), (step[False].peak, step[True].peak)):
            row += [f"{before / MIB:.1f}", f"{after / MIB:.1f}", f"{change(after, before):+.0f}{text(' %', '%')}"]
        rows.append(row)
    return rows


def time_rows(steps: dict[int, dict[bool, Step]]) -> list[list[str]]:
    rows = []
    for length, step in steps.items():
        extra = extra_times(step)
        middle = [f"{step[key].milliseconds:.0f}" for key in (False, True)]
        rows.append([f"{BATCH} x {length}", *middle, percent(statistics.median(extra)), percent_range(extra)])
    return rows


def percent_range(values: list[float]) -> str:
    return text(f"{min(values):.0f} to {max(values):.0f} %", f"{min(values):.0f} 到 {max(values):.0f}%")


def fixed_bytes(model: Any) -> int:
    """Return the bytes of weights, gradients and Adam's two moments, all in fp32."""
    trainable, total = count_parameters(model)
    return 4 * total + 12 * trainable


def print_tables(steps: dict[int, dict[bool, Step]], device: str) -> None:
    header = text("tokens|kept|with it|change|peak|with it|change", "token 數|保留|使用後|變化|峰值|使用後|變化").split("|")
    title = text(
        f"Activations and logits in MiB, without checkpointing and with it ({device})",
        f"激活值與 logits（MiB），不用與使用 checkpointing（{device}）",
    )
    print_table(title, header, byte_rows(steps))
    header = text("tokens|without, ms|with it, ms|more time|range", "token 數|不用（ms）|使用（ms）|多花時間|範圍").split("|")
    title = text(
        f"A forward and backward pass, median of {ROUNDS} rounds in turns",
        f"一次前向與反向傳播，輪流執行 {ROUNDS} 輪取中位數",
    )
    print_table(title, header, time_rows(steps))


def print_findings(steps: dict[int, dict[bool, Step]], fixed: int) -> None:
    without, with_ = steps[LENGTHS[-1]][False], steps[LENGTHS[-1]][True]
    extra = extra_times(steps[LENGTHS[-1]])
    saved, cost = -change(with_.peak, without.peak), statistics.median(extra)
    whole = -change(fixed + with_.peak, fixed + without.peak)
    print_text(
        text(
            f"At {LENGTHS[-1]} tokens it saves {saved:.0f} % of this peak and costs {cost:.0f} % of the time "
            f"({percent_range(extra)} in {ROUNDS} rounds); often quoted are {QUOTED_SAVING[0]} to {QUOTED_SAVING[1]} % and "
            f"{QUOTED_COST[0]} to {QUOTED_COST[1]} %. What is left of the peak is mostly logits, which belong to no layer. "
            f"Weights, gradients and Adam's moments stay as they are: of the whole memory it saves {whole:.0f} %.",
            f"長度 {LENGTHS[-1]} 時，峰值省下 {saved:.0f}%，時間多花 {cost:.0f}%（{ROUNDS} 輪之間 {percent_range(extra)}）；"
            f"常見的說法是省 {QUOTED_SAVING[0]} 到 {QUOTED_SAVING[1]}%，慢 {QUOTED_COST[0]} 到 {QUOTED_COST[1]}%。"
            f"剩下的峰值多半是 logits，不屬於任何一層。權重、梯度與 Adam 的動差都不變：以全部記憶體來算，省了 {whole:.0f}%。",
        )
    )
    more, longer = LENGTHS[-1] // LENGTHS[0], without.milliseconds / steps[LENGTHS[0]][False].milliseconds
    if longer < 2:
        print_text(
            text(
                f"{more} times the tokens take {longer:.1f} times as long: a GPU waits for the kernels of so small a model to be "
                "launched, and what is computed again is launched again.",
                f"token 多 {more} 倍，時間只多 {longer:.1f} 倍：模型太小，GPU 都在等 kernel 啟動，"
                "而重新計算的部分也要再啟動一次。",
            )
        )
    print_large_model()


def print_large_model() -> None:
    """Say what checkpointing does to a 3B model: predicted, and measured on a GPU."""
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    assert shape is not None
    kept, again = (sum(estimate_memory(shape, Config(), 1, layers).values()) / GIB for layers in (0, shape.layers))
    less = -change(again, kept)
    extra = change(shape.training_flops_per_token(recompute=True), shape.training_flops_per_token(recompute=False))
    (alone, alone_with), (many, many_with) = ON_GPU_GIB.values()
    slower = change(ON_GPU_SPEED[0], ON_GPU_SPEED[1])
    print_text(
        text(
            f"For Qwen2.5-3B in 4 bits at 1 x 512 tokens qlora_kit.planning.memory predicts {again:.2f} GiB instead of "
            f"{kept:.2f} in torch's allocator, {less:.0f} % less, for {extra:.0f} % more work in products. Measured on an H200: "
            f"{alone_with} instead of {alone} GiB; and at 16 x 512 tokens, with Unsloth, {many_with} instead of {many} GiB for "
            f"{slower:.0f} % more time. The more tokens at once, the more it saves.",
            f"Qwen2.5-3B 用 4-bit、1 x 512 個 token，qlora_kit.planning.memory 估算 torch 的配置器需要 {again:.2f} GiB，而不是 "
            f"{kept:.2f} GiB，少了 {less:.0f}%，矩陣乘法多 {extra:.0f}%。在 H200 上實測：{alone_with} GiB，而不是 {alone} GiB；"
            f"16 x 512 個 token（用 Unsloth）時是 {many_with} GiB，而不是 {many} GiB，時間多 {slower:.0f}%。"
            "一次處理的 token 越多，省得越多。",
        )
    )
    print_text(
        text(
            "Full fine-tuning pays a smaller share: its backward pass takes two products for each of the forward pass, that of "
            "frozen weights only one, and checkpointing adds a forward pass to either.",
            "全參數微調付出的比例較小：它的反向傳播要做前向的兩倍乘法，凍結的權重只要一倍，而 checkpointing "
            "對兩者都是多做一次前向。",
        )
    )


def draw(path: Path, steps: dict[int, dict[bool, Step]], device: str) -> None:
    with picture(path, columns=3, size=(15, 4.8)) as (memory, cost, gpu):
        draw_pairs(
            memory,
            {f"{BATCH} x {length}": (steps[length][False].peak / MIB, steps[length][True].peak / MIB) for length in LENGTHS},
            "MiB",
            text(f"Peak of activations and logits, tiny model ({device})", f"激活值與 logits 的峰值，小模型（{device}）"),
        )
        draw_pairs(
            gpu, ON_GPU_GIB, "GiB", text("All memory of a 3B model, measured on an H200", "3B 模型的全部記憶體，H200 實測")
        )
        extras = [extra_times(steps[length]) for length in LENGTHS]
        middles = [statistics.median(extra) for extra in extras]
        ranges = [[middle - extra[0] for middle, extra in zip(middles, extras, strict=True)]]
        ranges.append([extra[-1] - middle for middle, extra in zip(middles, extras, strict=True)])
        low, high = QUOTED_COST
        quoted = text(f"often quoted: {low} to {high} %", f"常見的說法：{low} 到 {high}%")
        cost.axhspan(low, high, color=ORANGE, alpha=0.25, label=quoted)
        label = text(f"tiny model ({device}): median, range", f"小模型（{device}）：中位數與範圍")
        cost.errorbar(range(len(LENGTHS)), middles, yerr=ranges, fmt="o", color=BLUE, capsize=5, label=label)
        slower = change(ON_GPU_SPEED[0], ON_GPU_SPEED[1])
        cost.plot(len(LENGTHS), slower, "D", color=GREY, label=text("3B model, H200", "3B 模型，H200"))
        cost.set_xticks(range(len(LENGTHS) + 1), [*(f"{BATCH} x {length}" for length in LENGTHS), "16 x 512"])
        cost.set_ylim(min(0, *(extra[0] for extra in extras)), 1.5 * max(slower, *(extra[-1] for extra in extras)))
        cost.set(title=text("More time for forward and backward", "前向與反向多花的時間"), ylabel="%")
        cost.legend(loc="upper left", fontsize=9)
        for axes in (memory, cost, gpu):
            axes.set_xlabel(text("tokens of a step", "一步的 token 數"))


def draw_pairs(axes: Any, pairs: dict[str, tuple[float, float]], unit: str, title: str) -> None:
    """Draw two bars for each number of tokens, without and with checkpointing, and what the second saves."""
    labels = (text("without checkpointing", "不用 checkpointing"), text("with checkpointing", "使用 checkpointing"))
    for key, (offset, colour) in enumerate(((-0.2, GREY), (0.2, BLUE))):
        values = [pair[key] for pair in pairs.values()]
        shown = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        if key:
            shown = [
                f"{name}\n({change(pair[1], pair[0]):+.0f}{text(' %', '%')})"
                for name, pair in zip(shown, pairs.values(), strict=True)
            ]
        bars = axes.bar([place + offset for place in range(len(pairs))], values, 0.38, color=colour, label=labels[key])
        axes.bar_label(bars, shown, padding=2, fontsize=9)
    axes.set_xticks(range(len(pairs)), list(pairs))
    axes.set(title=title, ylabel=unit, ylim=(0, 1.15 * max(pair[0] for pair in pairs.values())))
    axes.legend(loc="upper left", fontsize=9)


def main(argv: list[str] | None = None) -> None:
    arguments = begin(create_parser(__doc__, "gradient_checkpointing"), argv)
    use_one_thread()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = measure(device)
    print_tables(steps, device)
    print_findings(steps, fixed_bytes(load_adapted_model(False, device)))
    draw(arguments.output_dir / "gradient_checkpointing.png", steps, device)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
