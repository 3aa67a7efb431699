"""Flags, tables, pictures, the embedded model and its text, shared by all lessons.

def main(argv: list[str] | None = None) -> None:
    folder = open_folder(create_parser(__doc__, "layers").parse_args(argv).output_dir)
    print_table("Parameters", ["rank", "trainable"], [["8", "65,536"]])
    with picture(folder / "layers.png", columns=2) as (left, right):
        left.plot([1, 2], [3, 4], color=BLUE)

if __name__ == "__main__":
    cli.run(main)
"""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from qlora_kit import cli
from qlora_kit.errors import UserError
from qlora_kit.shipped import HOME as ROOT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY_MODEL = ROOT / "assets" / "tiny-qwen2"  # 6 layers, hidden size 192; see its README
ARTICLES = ROOT / "samples" / "articles.txt"  # not in the training data of the model, which is Python's documentation

# Eight colours that colour-blind readers can tell apart, in print too (Okabe and Ito, https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#6B6B6B",
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,  # draws bars over the grid
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
# Characters of a line of text: what the terminal has, where there is one.
PRINTED_WIDTH = 110  # characters of a line of text, or fewer on a narrower terminal


def create_parser(doc: str | None, name: str) -> cli.OneLineParser:
    """Create a parser with the flags of every lesson; a lesson may add its own.

    Args:
        doc: the lesson's docstring, which --help shows.
        name: name of the lesson's module, without the package.
    """
    parser = cli.OneLineParser(doc, prog=f"python -m finetuning_lessons.{name}")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output_lessons"), metavar="DIR", help="folder for the picture (%(default)s)"
    )
    return parser


def open_folder(path: Path) -> Path:
    """Create the folder if it is missing.

    Raises:
        UserError: the folder cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--output_dir", path, f"cannot be created ({error.strerror})", "use another folder") from error
    if not os.access(path, os.W_OK):
        raise UserError("--output_dir", path, "cannot be written", "change its permissions or use another folder")
    return path


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> None:
    """Print rows of text under a header, with lines on a terminal and as plain columns in a file or a pipe.

    Args:
        words: number of leading columns that are text, aligned left; the other columns are numbers, aligned right.
    """
    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Without force_jupyter, rich would write HTML and colours in a notebook.
    width = None if terminal else 250
    console = Console(highlight=False, markup=False, width=width, force_jupyter=False, force_terminal=terminal)
    console.print(title, style="bold")
    console.print(table)
    print()


def print_text(text: str) -> None:
    """Print a paragraph wrapped to PRINTED_WIDTH, or to a narrower terminal; a number and its % stay on one line."""
    joined = " ".join(text.split()).replace(" %", "\N{NO-BREAK SPACE}%")
    width = max(min(shutil.get_terminal_size().columns, PRINTED_WIDTH), 40) if sys.stdout.isatty() else PRINTED_WIDTH
    print(textwrap.fill(joined, width).replace("\N{NO-BREAK SPACE}", " ") + "\n")


@contextmanager
def picture(path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None) -> Iterator[Any]:
    """Yield matplotlib axes in the lessons' style, then write them to a PNG file and print its path.

    Args:
        size: width and height in inches; the default is 5.5 x 4.5 for each of the axes.

    Yields:
        One Axes, or an array of several: (columns,) in one row, (rows, columns) in more.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size or (5.5 * columns, 4.5 * rows), layout="constrained")
        try:
            yield axes
            figure.savefig(path, dpi=120)
        finally:
            plt.close(figure)
    print(f"picture  {path}")


def load_model(dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """Load the embedded model on the CPU, without a network, in `dtype` or fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=dtype or torch.float32)


def load_tokenizer() -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_MODEL)


def load_text() -> str:
    """Return 44 short encyclopedia articles, about 93,000 characters, in Wikitext's layout."""
    return ARTICLES.read_text(encoding="utf-8")


def load_blocks(block_length: int) -> "torch.Tensor":
    """Return the text as token ids in blocks without overlap and without its tail: (blocks, block_length)."""
    import torch

    tokens = torch.tensor(load_tokenizer()(load_text()).input_ids)
    return tokens[: len(tokens) // block_length * block_length].view(-1, block_length)


def train(model: "torch.nn.Module", blocks: "torch.Tensor", steps: int, learning_rate: float = 2e-3) -> list[float]:
    """Train with AdamW, four blocks per step in their order; return each step's loss in nats per token."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for step in range(steps):
        batch = blocks[torch.arange(4 * step, 4 * step + 4) % len(blocks)]  # (4, T)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def held_out_loss(model: "torch.nn.Module", blocks: "torch.Tensor") -> float:
    """Return the mean loss in nats per token, without dropout."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=blocks, labels=blocks).loss.item()
