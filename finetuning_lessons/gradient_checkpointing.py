"""Memory and time of gradient checkpointing: bytes kept for the backward pass, peak, and time of a step.

    python -m finetuning_lessons.gradient_checkpointing

The backward pass needs the activations of the forward pass. With checkpointing (arXiv 1604.06174) each layer keeps only its
input, and its backward pass recomputes the rest. Often quoted: it saves 30 to 50 % of memory and costs 10 to 20 % of time.

On a CPU the lesson counts the bytes of each tensor that is created and freed (torch.utils._python_dispatch); on a GPU it reads
torch's allocator. It times a forward and backward pass of the embedded model with LoRA, without the optimizer step, which
checkpointing does not change.
"""

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
    create_parser,
    load_blocks,
    load_model,
    open_folder,
    picture,
    print_table,
    print_text,
)
from finetuning_lessons.short_run import use_one_thread
from qlora_kit import cli
from qlora_kit.config import GIB, Config
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

BATCH = 2  # sequences
LENGTHS = (64, 128, 256, 512)  # tokens
TIMED_TOKENS = 512  # tokens timed per length; the fastest step counts
MIB = 2**20
QUOTED_SAVING, QUOTED_COST = (30, 50), (10, 20)  # percent


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
    milliseconds: float


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


def time_backward(models: dict[bool, Any], ids: torch.Tensor) -> dict[bool, float]:
    """Return the milliseconds of each model's fastest step."""
    clock = time.perf_counter if ids.is_cuda else time.process_time  # process_time leaves out other programs
    fastest = dict.fromkeys(models, float("inf"))
    for _ in range(max(3, TIMED_TOKENS // ids.shape[1])):
        for key, model in models.items():
            started = clock()
            run_backward(model, ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            fastest[key] = min(fastest[key], 1000 * (clock() - started))
    return fastest


def measure(device: str) -> dict[int, dict[bool, Step]]:
    """Measure a step of each length without (False) and with (True) checkpointing."""
    models = {checkpointing: load_adapted_model(checkpointing, device) for checkpointing in (False, True)}
    steps = {}
    for length in LENGTHS:
        ids = load_blocks(length)[:BATCH].to(device)
        counted = {key: count_bytes(model, ids) for key, model in models.items()}
        times = time_backward(models, ids)
        steps[length] = {key: Step(*counted[key], times[key]) for key in models}
    return steps


def percent(new: float, old: float) -> float:
    return 100 * (new / old - 1)


def step_rows(steps: dict[int, dict[bool, Step]]) -> list[list[str]]:
    rows = []
    for length, step in steps.items():
        without, with_ = step[False], step[True]
        row = [f"{BATCH} x {length}"]
        for before, after, unit in (
            (without.kept, with_.kept, MIB),
            (without.peak, with_.peak, MIB),
            (without.milliseconds, with_.milliseconds, 1),
        ):
            row += [f"{before / unit:.1f}", f"{after / unit:.1f}", f"{percent(after, before):+.0f} %"]
        rows.append(row)
    return rows


def fixed_bytes(model: Any) -> int:
    """Return the bytes of weights, gradients and Adam's two moments, all in fp32."""
    trainable, total = count_parameters(model)
    return 4 * total + 12 * trainable


def print_findings(steps: dict[int, dict[bool, Step]], fixed: int) -> None:
    without, with_ = steps[LENGTHS[-1]][False], steps[LENGTHS[-1]][True]
    saved, cost = -percent(with_.peak, without.peak), percent(with_.milliseconds, without.milliseconds)
    whole = -percent(fixed + with_.peak, fixed + without.peak)
    print_text(
        f"At {LENGTHS[-1]} tokens it saves {saved:.0f} % of this peak and costs {cost:.0f} % of the time; often quoted are "
        f"{QUOTED_SAVING[0]} to {QUOTED_SAVING[1]} % and {QUOTED_COST[0]} to {QUOTED_COST[1]} %. What is left of the peak is "
        "mostly logits, which belong to no layer. Weights, gradients and Adam's moments stay as they are: of the whole memory it "
        f"saves {whole:.0f} %."
    )
    more, longer = LENGTHS[-1] // LENGTHS[0], without.milliseconds / steps[LENGTHS[0]][False].milliseconds
    if longer < 2:
        print_text(
            f"{more} times the tokens take {longer:.1f} times as long: a GPU waits for the kernels of so small a model to be "
            "launched, and what is computed again is launched again."
        )
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    assert shape is not None
    kept, again = (sum(estimate_memory(shape, Config(), 1, layers).values()) for layers in (0, shape.layers))
    extra = percent(shape.training_flops_per_token(recompute=True), shape.training_flops_per_token(recompute=False))
    print_text(
        f"For Qwen2.5-3B in 4 bits at 1 x 512 tokens qlora_kit.planning.memory predicts {again / GIB:.2f} GiB instead of "
        f"{kept / GIB:.2f} in torch's allocator, {-percent(again, kept):.0f} % less, for {extra:.0f} % more work in products. "
        "Full fine-tuning pays a smaller share: its backward pass takes two products for each of the forward pass, that of "
        "frozen weights only one, and checkpointing adds a forward pass to either."
    )


def draw(path: Path, steps: dict[int, dict[bool, Step]]) -> None:
    places = range(len(LENGTHS))
    with picture(path, columns=3, size=(14, 4.8)) as (memory, saving, cost):
        for offset, key, colour, label in ((-0.2, False, GREY, "without checkpointing"), (0.2, True, BLUE, "with checkpointing")):
            peaks = [steps[length][key].peak / MIB for length in LENGTHS]
            bars = memory.bar([place + offset for place in places], peaks, 0.38, color=colour, label=label)
            memory.bar_label(bars, [f"{peak:.0f}" for peak in peaks], padding=2, fontsize=9)
        memory.legend(loc="upper left")
        memory.set(title="Peak of activations and logits", ylabel="MiB")
        changes = {
            saving: [-percent(steps[length][True].peak, steps[length][False].peak) for length in LENGTHS],
            cost: [percent(steps[length][True].milliseconds, steps[length][False].milliseconds) for length in LENGTHS],
        }
        for axes, (low, high) in ((saving, QUOTED_SAVING), (cost, QUOTED_COST)):
            axes.axhspan(low, high, color=ORANGE, alpha=0.25, label=f"often quoted: {low} to {high} %")
            bars = axes.bar(places, changes[axes], 0.5, color=BLUE)
            axes.bar_label(bars, [f"{change:.0f} %" for change in changes[axes]], padding=2)
            axes.set_ylim(min(0, 1.2 * min(changes[axes])), 1.35 * max(high, *changes[axes]))
            axes.legend(loc="upper left")
        saving.set(title="Saved of that peak", ylabel="less memory (%)")
        cost.set(title="Cost", ylabel="more time for forward and backward (%)")
        for axes in (memory, saving, cost):
            axes.set_xticks(places, [f"{BATCH} x {length}" for length in LENGTHS])
            axes.set_xlabel("tokens of a step")


def main(argv: list[str] | None = None) -> None:
    folder = open_folder(create_parser(__doc__, "gradient_checkpointing").parse_args(argv).output_dir)
    use_one_thread()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = measure(device)
    header = ["tokens", "kept MiB", "with", "change", "peak MiB", "with", "change", "step ms", "with", "change"]
    print_table(f"Without checkpointing, and with it ({device})", header, step_rows(steps))
    print_findings(steps, fixed_bytes(load_adapted_model(False, device)))
    draw(folder / "gradient_checkpointing.png", steps)


if __name__ == "__main__":
    cli.run(main)
