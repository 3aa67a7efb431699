"""Flags, tables, pictures, the embedded model and its text, shared by all lessons.

def main(argv: list[str] | None = None) -> None:
    arguments = begin(create_parser(__doc__, "layers"), argv)
    progress(text("counting parameters", "計算參數量"))
    print_table(text("Parameters", "參數量"), ["rank", text("trained", "訓練")], [["8", "65,536"]])
    with picture(arguments.output_dir / "layers.png", columns=2) as (left, right):
        left.plot([1, 2], [3, 4], color=BLUE)
        left.set_xlabel(text("step", "步數"))
    finish(arguments)

if __name__ == "__main__":
    cli.run(main)
"""

import argparse
import os
import re
import shutil
import sys
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from finetuning_lessons.words import (
    FONT_PACKAGE,
    LANGUAGES,
    choose,
    chosen_language,
    english_labels,
    find_chinese_font,
    text,
)
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
PRINTED_WIDTH = 80  # columns of a line, or fewer on a narrower terminal
# In the order of docs/lessons.md.
LESSONS = (
    "layers", "attention", "quantization", "qlora", "memory", "methods", "rank_study", "variants", "formats", "training_loop",
    "gradient_checkpointing", "paged_optimizer",
)  # fmt: skip
WIDE = "\u3000-\u9fff\uff00-\uffef"  # Chinese characters and their punctuation
# What no line end may divide: a word, a number with its error and unit, a character with the punctuation that belongs to it.
PIECE = re.compile(
    rf"(\s*)([（「『《]*(?:[^\s{WIDE}]+(?: ± [\d.]+%?)?(?: (?:%|[MG]i?B|ms)(?!\w)[.,;:)]*)?|[{WIDE}])[，。、；：！？）」』》]*)"
)


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
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of tables, text and picture (%(default)s)")
    parser.add_argument("--show", action="store_true", help="open the picture at the end")
    parser.set_defaults(name=name)
    return parser


def begin(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of a lesson, choose its language and create the folder of its picture.

    Raises:
        UserError: the folder cannot be created or written.
    """
    arguments = parser.parse_args(argv)
    choose(arguments.language)
    open_folder(arguments.output_dir)
    return arguments


def finish(arguments: argparse.Namespace) -> None:
    """Name the lesson that comes next, and open the picture if it was asked for."""
    if arguments.show and not webbrowser.open((arguments.output_dir / f"{arguments.name}.png").resolve().as_uri()):
        print(text("No program was found that shows pictures.", "找不到可以開啟圖片的程式。"))
    following = LESSONS[LESSONS.index(arguments.name) + 1 :]
    command = f"python -m finetuning_lessons.{following[0]}" if following else "python train_qlora.py --config configs/tiny.yaml"
    language = f" --language {chosen_language()}" if following and chosen_language() != "en" else ""
    print(f"{text('next', '下一課') if following else text('try', '動手試試')}  {command}{language}")


def progress(doing: str) -> None:
    """Print at once what a lesson measures now, such as "training LoRA"."""
    print(f"... {doing}", flush=True)


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


def printed_width() -> int:
    return max(min(shutil.get_terminal_size().columns, PRINTED_WIDTH), 40) if sys.stdout.isatty() else PRINTED_WIDTH


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> None:
    """Print rows of text under a header, with lines on a terminal and as plain columns in a file or a pipe.

    Numbers are never broken. Where a table is too wide, headers and the columns of text wrap.

    Args:
        words: number of leading columns that are text, aligned left; the other columns are numbers, aligned right.
    """
    terminal, width = sys.stdout.isatty(), printed_width()
    if chosen_language() != "en":  # as it is set in Taiwan
        rows = [[cell.replace(" %", "%") for cell in row] for row in rows]
    columns = list(zip(header, *rows, strict=True))
    if sum(_longest(column) + 2 for column in columns) > width:
        header = [*header[:words], *(fill(name, _longest(cells)) for name, *cells in columns[words:])]
        columns = list(zip(header, *rows, strict=True))
    table = Table(box=box.SIMPLE_HEAD if terminal else None, show_edge=False, pad_edge=False)
    table.padding = (0, 1, 0, 0) if terminal else (0, 1)  # columns are two apart: a box has a column of its own between them
    for name, *cells in columns[:words]:
        table.add_column(name, min_width=_longest(" ".join([name, *cells]).split()))
    for name, *cells in columns[words:]:
        table.add_column(name, justify="right", width=_longest([*name.split("\n"), *cells]))
    for row in rows:
        table.add_row(*row)
    smallest = sum((column.width or column.min_width or 0) + 2 for column in table.columns)  # a narrow terminal breaks its lines
    # Without force_jupyter, rich would write HTML and colours in a notebook.
    width = max(width, smallest)
    console = Console(highlight=False, markup=False, width=width, force_jupyter=False, force_terminal=terminal)
    console.print(title, style="bold")
    console.print(table)
    print()


def _longest(cells: Iterable[str]) -> int:
    return max(map(cell_len, cells), default=0)


def fill(paragraph: str, width: int) -> str:
    """Wrap a paragraph of either language to `width` columns, between words or Chinese characters."""
    joined = re.sub(rf"(?<=[{WIDE}]) (?=[{WIDE}])", "", " ".join(paragraph.split()))  # a line end of the source is no space
    lines = [""]
    for gap, piece in PIECE.findall(joined):
        if lines[-1] and cell_len(lines[-1] + gap + piece) > width:
            lines.append(piece)
        else:
            lines[-1] += gap + piece
    return "\n".join(lines)


def print_text(paragraph: str) -> None:
    """Print a paragraph wrapped to PRINTED_WIDTH, or to a narrower terminal; a number and its unit stay on one line."""
    print(fill(paragraph, printed_width()) + "\n")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the lessons' style, in Chinese where it is chosen and a font has it; otherwise explain the English labels below."""
    import matplotlib.pyplot as plt

    font = find_chinese_font() if chosen_language() != "en" else None
    if chosen_language() == "en" or font:
        with plt.rc_context(STYLE | ({"font.family": ["DejaVu Sans", font]} if font else {})):
            yield
        return
    with plt.rc_context(STYLE), english_labels() as labels:
        yield
    print(
        fill(
            "圖中文字：" + "；".join(f"{word} = {chinese}" for word, chinese in labels.items() if word != chinese) + "。",
            printed_width(),
        )
    )
    print(fill(f"找不到中文字型，所以圖中是英文。安裝 {FONT_PACKAGE} 之後重跑，圖就是中文。", printed_width()))


@contextmanager
def picture(path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] | None = None) -> Iterator[Any]:
    """Yield matplotlib axes in the lessons' style, then write them to a PNG file and print its path.

    Args:
        size: width and height in inches; the default is 5.5 x 4.5 for each of the axes.

    Yields:
        One Axes, or an array of several: (columns,) in one row, (rows, columns) in more.
    """
    from matplotlib.figure import Figure  # has no window, and leaves alone how a notebook shows its own figures

    saved = f"{text('picture', '圖片')}  {path}"
    with drawing():
        figure = Figure(figsize=size or (5.5 * columns, 4.5 * rows), layout="constrained")
        yield figure.subplots(rows, columns)
        figure.savefig(path, dpi=120)
        print(saved)


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


def train(
    model: "torch.nn.Module",
    blocks: "torch.Tensor",
    steps: int,
    learning_rate: float = 2e-3,
    after_step: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Train with AdamW, four blocks per step in their order; return each step's loss in nats per token."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        model.train()
        batch = blocks[torch.arange(4 * step, 4 * step + 4) % len(blocks)]  # (4, T)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after_step()
    return losses


def held_out_loss(model: "torch.nn.Module", blocks: "torch.Tensor") -> float:
    """Return the mean loss in nats per token, without dropout."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=blocks, labels=blocks).loss.item()
