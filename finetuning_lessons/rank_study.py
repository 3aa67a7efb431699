"""Cost and use of a LoRA rank: parameters, time, the error of a low-rank copy of a full update, the loss after training.

    python -m finetuning_lessons.rank_study

The matrix of rank r that is closest to a full update ΔW keeps its r largest singular values (Eckart and Young, 1936). Its error,
sqrt(Σ σᵢ² beyond r / Σ σᵢ²), is the least that LoRA can reach at rank r: 0 % is an exact copy. The lesson copies the updates that
full fine-tuning makes to the embedded model's projections, and random matrices of the same shapes, which have no structure.

Then it trains the embedded model on the same tokens, at several ranks, on several sets of projections, with 4-bit and 16-bit
bases.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetuning_lessons.layers import ALL_SEVEN, ATTENTION, LoRALayer, count_parameters
from finetuning_lessons.lesson import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    TINY_MODEL,
    create_parser,
    held_out_loss,
    load_model,
    open_folder,
    picture,
    print_table,
    print_text,
    train,
)
from finetuning_lessons.short_run import Text, load_split, use_one_thread
from qlora_kit import cli

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TRAINED_RANKS = (4, 8, 16, 32, 64)
WIDTH = 768  # size of the layer that is timed
STEPS = 10  # of 4 x 128 tokens
LEARNING_RATE, FULL_LEARNING_RATE = 2e-3, 5e-4  # the best of 1, 2 and 5 times a power of ten
FIT_STEPS = 300
TIMED = 20  # forward passes per rank; the fastest counts


def best_errors(update: Tensor, ranks: tuple[int, ...]) -> list[float]:
    """Return the relative Frobenius error of the best approximation of `update` (out, in) at each rank."""
    squares = torch.linalg.svdvals(update).square()
    return [float((squares[rank:].sum() / squares.sum()).sqrt()) for rank in ranks]


def fitted_error(update: Tensor, rank: int) -> float:
    """Return the relative Frobenius error of a LoRALayer trained by gradient descent to copy `update` (out, in)."""
    torch.manual_seed(0)
    target = update / update.square().mean().sqrt()  # so that one learning rate fits updates of any size
    layer = LoRALayer(target.shape[1], target.shape[0], rank, alpha=2.0 * rank)  # (in, out)
    optimizer = torch.optim.Adam([layer.lora_A.weight, layer.lora_B.weight], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        loss = (layer.update() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float((layer.update().detach() - target).norm() / target.norm())


def fine_tune_fully(text: Text, steps: int) -> tuple[list[Tensor], float]:
    """Train every weight of the embedded model; return the update of each projection, (out, in), and the held-out loss."""
    before, model = load_model(), load_model()
    train(model, text.train, steps, FULL_LEARNING_RATE)
    after = dict(model.named_parameters())
    names = [name for name in after if name.removesuffix(".weight").endswith(ALL_SEVEN)]
    start = dict(before.named_parameters())
    return [(after[name] - start[name]).detach() for name in names], held_out_loss(model, text.held_out)


def pooled_errors(updates: list[Tensor], ranks: tuple[int, ...]) -> list[float]:
    """Return best_errors of many matrices taken together: the sums of squared errors over the sum of squared norms."""
    norms = torch.tensor([float(update.square().sum()) for update in updates])
    errors = torch.tensor([best_errors(update, ranks) for update in updates])  # (matrices, ranks)
    return ((errors.square() * norms[:, None]).sum(0) / norms.sum()).sqrt().tolist()


@torch.no_grad()
def forward_times(rounds: int) -> dict[int, float]:
    """Return the milliseconds of the fastest forward pass of 128 tokens through WIDTH x WIDTH at each rank; 0 is without LoRA."""
    layers: dict[int, Any] = {rank: LoRALayer(WIDTH, WIDTH, rank, alpha=2.0 * rank) for rank in RANKS}
    layers[0] = layers[1].linear
    x = torch.randn(1, 128, WIDTH)
    fastest = dict.fromkeys(layers, float("inf"))
    for _ in range(rounds):
        for rank, layer in layers.items():
            started = time.process_time()
            layer(x)
            fastest[rank] = min(fastest[rank], 1000 * (time.process_time() - started))
    return fastest


@dataclass(frozen=True)
class Copies:
    """Relative errors at each of RANKS."""

    random: list[float]  # least possible, of random numbers
    real: list[float]  # least possible, of all updates together
    one: list[float]  # least possible, of the update of the first layer's q
    fitted: list[float]  # of that update, with A and B trained to copy it


def measure_copies(updates: list[Tensor]) -> Copies:
    torch.manual_seed(0)
    return Copies(
        random=pooled_errors([torch.randn_like(update) for update in updates], RANKS),
        real=pooled_errors(updates, RANKS),
        one=best_errors(updates[0], RANKS),
        fitted=[fitted_error(updates[0], rank) for rank in RANKS],
    )


def rank_rows(times: dict[int, float], copies: Copies) -> list[list[str]]:
    def row(rank: int, *errors: float) -> list[str]:
        parameters = 2 * WIDTH * rank  # A (rank, in) and B (out, rank)
        share = f"{100 * parameters / WIDTH**2:.2f} %"
        return [str(rank), f"{parameters:,}", share, f"{times[rank]:.2f}", *(f"{100 * error:.1f} %" for error in errors)]

    return [row(*values) for values in zip(RANKS, copies.random, copies.real, copies.one, copies.fitted, strict=True)]


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    name: str
    rank: int = 16
    targets: tuple[str, ...] = ALL_SEVEN
    base: str = "16-bit"  # or nf4, fp4
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    trainable: int
    last_train_loss: float  # mean of the last four steps, nats a token
    loss: float  # held out


RUNS = (
    *(Run(f"rank {rank}", rank) for rank in TRAINED_RANKS),
    Run("rank 16, another seed", seed=1),
    Run("q and v only", targets=("q_proj", "v_proj")),
    Run("attention only", targets=ATTENTION),
    Run("attention only, rank 42", rank=42, targets=ATTENTION),  # as many parameters as all seven at rank 16
    Run("NF4 base", base="nf4"),
    Run("FP4 base", base="fp4"),
)


def load_base(kind: str) -> Any:
    """Load the embedded model with its 16-bit weights, or packed to 4 bits; products are in fp32 either way."""
    if kind == "16-bit":
        return load_model()
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, quantization_config=packing, dtype=torch.float32)


def train_run(run: Run, text: Text, steps: int) -> Outcome:
    base = load_base(run.base)
    torch.manual_seed(run.seed)  # decides where A starts
    config = LoraConfig(r=run.rank, lora_alpha=2 * run.rank, target_modules=list(run.targets), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    losses = train(model, text.train, steps, LEARNING_RATE)
    return Outcome(count_parameters(model)[0], sum(losses[-4:]) / len(losses[-4:]), held_out_loss(model, text.held_out))


def run_rows(outcomes: dict[str, Outcome], total: int) -> list[list[str]]:
    return [
        [name, f"{one.trainable:,}", f"{100 * one.trainable / total:.1f} %", f"{one.last_train_loss:.3f}", f"{one.loss:.3f}"]
        for name, one in outcomes.items()
    ]


def print_costs(times: dict[int, float], copies: Copies) -> None:
    at = RANKS.index(16)
    real, noise = (100 * (1 - errors[at] ** 2) for errors in (copies.real, copies.random))
    apart = 100 * max(trained - best for trained, best in zip(copies.fitted, copies.one, strict=True))
    print_text(
        f"Rank 16 can keep {real:.0f} % of the squares of the real updates, and {noise:.0f} % of random numbers: what training "
        f"adds is nearer to low rank, which is what LoRA bets on. Training A and B ends within {apart:.1f} points of the least. "
        "Those matrices have at most 192 singular values, so that a copy of rank 256 is exact. "
        f"Above rank {WIDTH // 2}, A and B of a layer of {WIDTH} x {WIDTH} have more parameters than W."
    )
    print_text(
        f"Without LoRA the layer takes {times[0]:.2f} ms, at rank 8 {times[8]:.2f}, at rank 256 {times[256]:.2f}. "
        "Merged, every rank takes what the layer takes without."
    )


def print_findings(outcomes: dict[str, Outcome], base_loss: float, full_loss: float) -> None:
    gain = {name: base_loss - outcome.loss for name, outcome in outcomes.items()}
    full, most = base_loss - full_loss, gain[f"rank {TRAINED_RANKS[-1]}"]
    noise = abs(gain["rank 16"] - gain["rank 16, another seed"])
    shares = ", ".join(f"{rank}: {100 * gain[f'rank {rank}'] / most:.0f} %" for rank in TRAINED_RANKS)
    print_text(
        f"Full fine-tuning takes {full:.3f} off the base model's loss of {base_loss:.3f}, rank 16 {gain['rank 16']:.3f}. Of what "
        f"rank {TRAINED_RANKS[-1]} takes off, the ranks take {shares}. Ranks of 8 to 32 are often said to be enough. "
        f"Another seed moves the loss by {noise:.3f}; differences of that size mean nothing."
    )
    more, fair = (100 * (gain["rank 16"] / gain[name] - 1) for name in ("attention only", "attention only, rank 42"))
    print_text(
        f"With the MLP's projections the loss falls {more:.0f} % further than with attention alone at rank 16, and {fair:.0f} % "
        "further than with attention alone at the same number of parameters; 10 to 20 % are often quoted. q and v alone reach "
        f"{100 * gain['q and v only'] / gain['rank 16']:.0f} % of what all seven do."
    )
    nf4, fp4 = (gain["rank 16"] - gain[name] for name in ("NF4 base", "FP4 base"))
    print_text(
        f"An NF4 base instead of 16-bit weights changes the final loss by {nf4:+.3f} nats a token, an FP4 base by {fp4:+.3f}, to "
        f"be held against the {noise:.3f} of another seed."
    )


def draw(path: Path, times: dict[int, float], copies: Copies, outcomes: dict[str, Outcome], base_loss: float) -> None:
    with picture(path, columns=2, rows=2, size=(12, 9)) as ((copied, timed), (ranked, variants)):
        curves = {
            "random numbers, least possible": (copies.random, GREY, "o--"),
            "all updates, least possible": (copies.real, BLUE, "o-"),
            "one update, least possible": (copies.one, GREEN, "-"),
            "one update, A and B trained to copy it": (copies.fitted, ORANGE, "s"),
        }
        for label, (errors, colour, style) in curves.items():
            copied.plot(RANKS, [100 * error for error in errors], style, color=colour, label=label)
        copied.set(title="Error of a copy of a full update", xlabel="rank", ylabel="relative error (%)", ylim=(-3, 105))
        copied.legend(loc="lower left", fontsize=9)
        timed.plot(RANKS, [times[rank] for rank in RANKS], "o-", color=BLUE, label="with LoRA, not merged")
        timed.axhline(times[0], color=ORANGE, linestyle="--", label="without LoRA, or merged")
        timed.set(title=f"Forward pass, {WIDTH} x {WIDTH}, 128 tokens", xlabel="rank", ylabel="milliseconds", ylim=(0, None))
        timed.legend()
        ranked.plot(TRAINED_RANKS, [outcomes[f"rank {rank}"].loss for rank in TRAINED_RANKS], "o-", color=BLUE, label="seed 0")
        ranked.plot(16, outcomes["rank 16, another seed"].loss, "x", color=ORANGE, markersize=9, label="another seed")
        ranked.set(title="Loss after the same tokens", xlabel="rank", ylabel="held-out loss (nats a token)")
        ranked.legend()
        for axes, ticks in ((copied, RANKS), (timed, RANKS), (ranked, TRAINED_RANKS)):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, ticks)
        names = ["rank 16", *(run.name for run in RUNS[len(TRAINED_RANKS) + 1 :])]
        bars = variants.barh(["all seven, 16-bit", *names[1:]], [base_loss - outcomes[name].loss for name in names], color=BLUE)
        variants.bar_label(bars, [f"{base_loss - outcomes[name].loss:.3f}" for name in names], padding=3)
        variants.invert_yaxis()
        variants.margins(x=0.15)
        variants.grid(visible=False)
        variants.set(title="What is trained, and on which base (rank 16)", xlabel="fall of the held-out loss (nats a token)")


def main(argv: list[str] | None = None) -> None:
    parser = create_parser(__doc__, "rank_study")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="optimizer steps of each run (%(default)s)")
    arguments = parser.parse_args(argv)
    folder = open_folder(arguments.output_dir)
    use_one_thread()
    text, times = load_split(), forward_times(TIMED)
    updates, full_loss = fine_tune_fully(text, arguments.steps)
    copies = measure_copies(updates)
    header = ["rank", "parameters", "share", "forward ms", "random", "all updates", "one update", "trained copy"]
    title = f"A layer of {WIDTH} x {WIDTH}; errors of copies of the embedded model's updates"
    print_table(title, header, rank_rows(times, copies), words=0)
    print_costs(times, copies)
    base = load_model()
    base_loss, total = held_out_loss(base, text.held_out), count_parameters(base)[1]
    outcomes = {run.name: train_run(run, text, arguments.steps) for run in RUNS}
    title = f"{arguments.steps} steps of 4 x 128 tokens; base model {base_loss:.3f}"
    print_table(title, ["run", "trainable", "share", "last training loss", "held-out loss"], run_rows(outcomes, total))
    print_findings(outcomes, base_loss, full_loss)
    draw(folder / "rank_study.png", times, copies, outcomes, base_loss)


if __name__ == "__main__":
    cli.run(main)
