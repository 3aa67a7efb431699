"""Adam's state in 32 bits, in 8 bits and paged: bytes, time and loss.

    python -m finetuning_lessons.paged_optimizer

Adam keeps two moments for each trained parameter. In 32 bits they take 8 bytes; in 8 bits (arXiv 2110.02861) 2 bytes, and one
fp32 absmax for every 256 values. bitsandbytes keeps tensors of less than 4,096 elements in 32 bits.

Paging (QLoRA, arXiv 2305.14314, section 3) does not make the state smaller. CUDA moves its pages to the host when the GPU is
full, and back when a step needs them, so that a peak, as of one long sequence, does not end the run. bitsandbytes pages tensors
of 100,000 elements or more. Without a GPU a paged optimizer is the plain one, and this lesson shows its bytes and its loss, but
not the cost of moving pages.
"""

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
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
    create_parser,
    held_out_loss,
    load_model,
    open_folder,
    picture,
    print_table,
    print_text,
)
from finetuning_lessons.short_run import load_split, use_one_thread
from qlora_kit import cli
from qlora_kit.planning.shape import KNOWN_CONFIGS, ModelShape, read_shape

MIB = 2**20
STEPS = 16  # of 4 x 128 tokens
LEARNING_RATE = 2e-3
PAGED_FROM = 100_000  # elements of a tensor (bitsandbytes 0.50.2, optim/optimizer.py, get_state_buffer)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW, 32 bits": torch.optim.AdamW,
    "AdamW, 8 bits": bnb.optim.AdamW8bit,
    "paged AdamW, 8 bits": bnb.optim.PagedAdamW8bit,
}
COLOURS = dict(zip(OPTIMIZERS, (GREY, BLUE, GREEN), strict=True))


def load_adapted_model() -> Any:
    torch.manual_seed(0)
    return get_peft_model(load_model(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def join_parameters(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Copy the parameters into one tensor, as qlora_kit/fast/flat_adapters.py does."""
    return [nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))]


@dataclass(frozen=True)
class State:
    """Size and speed of an optimizer's state after its first steps."""

    bytes: int
    parameters: int
    milliseconds: float  # of the fastest step
    in_allocator: int | None  # bytes that torch's allocator holds for it; None without a GPU


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of moments and their absmax values, without step counts and the 256 levels that all tensors share."""
    tensors = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key != "step" and not key.startswith("qmap")
    ]
    return sum(tensor.nbytes for tensor in tensors)


def measure_state(name: str, parameters: list[nn.Parameter], rounds: int = 5) -> State:
    """Take a few steps with random gradients on a copy of `parameters`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copies = [nn.Parameter(parameter.detach().to(device, copy=True)) for parameter in parameters]
    for parameter in copies:
        parameter.grad = torch.randn_like(parameter)
    optimizer, fastest = OPTIMIZERS[name](copies, lr=LEARNING_RATE, weight_decay=0.0), float("inf")
    clock = time.perf_counter if device == "cuda" else time.process_time  # process_time leaves out other programs
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    for _ in range(rounds):
        started = clock()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, 1000 * (clock() - started))
    in_allocator = torch.cuda.memory_allocated() - before if device == "cuda" else None
    return State(state_bytes(optimizer), sum(parameter.numel() for parameter in copies), fastest, in_allocator)


def measure_states() -> dict[tuple[str, str], State]:
    """Measure each optimizer with LoRA's tensors, with LoRA in one tensor, and with all weights."""
    adapters = trainable_parameters(load_adapted_model())
    trained = {
        f"LoRA, {len(adapters)} tensors": adapters,
        "LoRA, in one tensor": join_parameters(adapters),
        "all weights": list(load_model().parameters()),
    }
    return {(what, name): measure_state(name, parameters) for what, parameters in trained.items() for name in OPTIMIZERS}


def state_rows(states: dict[tuple[str, str], State]) -> list[list[str]]:
    return [
        [
            what,
            name,
            f"{state.parameters:,}",
            f"{state.bytes / MIB:.2f}",
            f"{state.bytes / state.parameters:.2f}",
            "-" if state.in_allocator is None else f"{state.in_allocator / MIB:.2f}",
            f"{state.milliseconds:.1f}",
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
    trained["all weights"] = shape.parameters()
    in_8_bits = 2 + 2 * 4 / 256  # bytes: two moments, and for each an absmax in 256 values
    return [
        [what, f"{count:,}", f"{4 * count / MIB:,.0f}", f"{8 * count / MIB:,.0f}", f"{in_8_bits * count / MIB:,.0f}"]
        for what, count in trained.items()
    ]


def print_findings(states: dict[tuple[str, str], State], held_out: dict[str, float], shape: ModelShape) -> None:
    apart, one, everything = list(dict.fromkeys(what for what, _ in states))
    wide, narrow, _ = OPTIMIZERS
    smaller = {what: states[what, wide].bytes / states[what, narrow].bytes for what in (apart, one, everything)}
    slower = states[everything, narrow].milliseconds / states[everything, wide].milliseconds
    print_text(
        f"8 bits make the state of all weights {smaller[everything]:.1f} times smaller, that of LoRA's matrices in one tensor "
        f"{smaller[one]:.1f} times, and in tensors of their own {smaller[apart]:.1f} times: the small ones stay in 32 bits. A "
        f"step for all weights takes {slower:.1f} times as long here: it unpacks, computes in 32 bits and packs again."
    )
    print_text(
        f"After {STEPS} steps the held-out loss is {held_out[wide]:.4f} with all moments in 32 bits and {held_out[narrow]:.4f} "
        "with all in 8, those of small tensors too."
    )
    print_text(
        f"Of LoRA's parameters on Qwen2.5-3B, {100 * paged_share(shape, 16):.0f} % at rank 16 and "
        f"{100 * paged_share(shape, 8):.0f} % at rank 8 are in tensors of {PAGED_FROM:,} elements or more. The state of the "
        "others stays on the GPU, whatever the optimizer is called, unless all are kept in one tensor, as this toolkit's fast "
        "path does."
    )
    if not torch.cuda.is_available():
        print_text("There is no GPU here, so nothing was paged: the paged optimizer was the plain 8-bit one.")


def draw(path: Path, states: dict[tuple[str, str], State], losses: dict[str, list[float]]) -> None:
    with picture(path, columns=2, size=(13, 4.8)) as (memory, curves):
        trained = list(dict.fromkeys(what for what, _ in states))
        for offset, name in zip((-0.27, 0, 0.27), OPTIMIZERS, strict=True):
            values = [states[what, name].bytes / states[what, name].parameters for what in trained]
            bars = memory.bar([i + offset for i in range(len(trained))], values, 0.25, color=COLOURS[name], label=name)
            memory.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=9)
        memory.set_xticks(range(len(trained)), trained)
        memory.set(title="State of the optimizer", ylabel="bytes a parameter", xlabel="what is trained", ylim=(0, 12))
        memory.legend(loc="upper right", ncols=3, fontsize=9)
        for (name, values), width, style in zip(losses.items(), (5, 2.5, 1.5), ("-", "-", "--"), strict=True):
            curves.plot(range(1, len(values) + 1), values, style, color=COLOURS[name], linewidth=width, label=name)
        curves.set(title="The same run with each", xlabel="optimizer step", ylabel="training loss (nats a token)")
        curves.legend()


def main(argv: list[str] | None = None) -> None:
    folder = open_folder(create_parser(__doc__, "paged_optimizer").parse_args(argv).output_dir)
    use_one_thread()
    # print_findings says that nothing is paged on a CPU.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    shape = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])
    assert shape is not None
    states = measure_states()
    header = ["trained", "optimizer", "parameters", "state MiB", "bytes each", "torch's MiB", "step ms"]
    print_table("The embedded model", header, state_rows(states), words=2)
    header = ["trained", "parameters", "gradients fp32", "state 32 bits", "state 8 bits"]
    print_table("Qwen2.5-3B, MiB, computed", header, qwen_rows(shape))
    text, model = load_split(), load_adapted_model()
    models = {name: copy.deepcopy(model) for name in OPTIMIZERS}
    losses = {name: train_with(name, models[name], text.train, STEPS) for name in OPTIMIZERS}
    held_out = {name: held_out_loss(models[name], text.held_out) for name in OPTIMIZERS}
    rows = [[name, f"{losses[name][0]:.4f}", f"{losses[name][-1]:.4f}", f"{held_out[name]:.4f}"] for name in OPTIMIZERS]
    print_table(f"{STEPS} steps of 4 x 128 tokens", ["optimizer", "first loss", "last loss", "held-out loss"], rows)
    print_findings(states, held_out, shape)
    draw(folder / "paged_optimizer.png", states, losses)


if __name__ == "__main__":
    cli.run(main)
