"""Messages in terminals of several widths, and in a pipe."""

import io
import re

import pytest
from rich.cells import cell_len

from qlora_kit.wrapping import say, wrap_line

COMMAND = "python inference_example.py --mode interactive --adapter output_with_a_long_name/checkpoints/checkpoint-100"
LINES = [
    "paged_adamw_8bit: paging needs a GPU; the optimizer's state stays in ordinary memory here",
    "  perplexity   base model 659.023 ± 44.433  ->  adapter 146.188 ± 9.481",
    "step 10/52: loss 5.6081, lr 1.90e-03, 2,631 tokens/s, 12.30 GiB, 0:00:31 left",
    "error: training.device: no CUDA GPU was found. Try python train_qlora.py --config configs/tiny.yaml, or insist with --set "
    "training.device=cpu.",
    "removed: 名前は、とても長いとても長いとても 長いとても長いとても長い",
]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
@pytest.mark.parametrize("line", LINES)
def test_lines_wrap_between_words_and_leave_numbers_and_commands_whole(line, width):
    lines = wrap_line(line, width).split("\n")
    words = [word for shown in lines for word in shown.split()]
    row = width < 60 and line.startswith("  perplexity")
    expected = (line.replace("perplexity  ", "perplexity:") if row else line).split()
    assert "".join(words) == "".join(expected) and (words == expected or cell_len(line) > len(line))
    command = "python train_qlora.py --config configs/tiny.yaml,"
    assert all(cell_len(shown) <= max(width, 2 + len(command)) for shown in lines)
    assert all(shown.startswith("  ") for shown in lines[1:])
    text = "\n".join(lines)
    for whole in (r"± *\n", r"\d *\n *(tokens|GiB|left)", r"--set *\n", r"--config *\n"):
        assert not re.search(whole, text)


def test_a_line_that_is_a_command_stays_one_line():
    assert wrap_line(f"  {COMMAND}", 40) == f"  {COMMAND}"


@pytest.mark.parametrize("width, shown", [
    (80, "  projection weights     1.33 GiB"), (50, "  projection weights: 1.33 GiB"),
])  # fmt: skip
def test_a_row_of_a_table_becomes_name_and_value_in_a_narrow_window(width, shown):
    assert wrap_line("  projection weights     1.33 GiB", width) == shown


def test_only_a_terminal_gets_other_lines_than_were_written(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for is_terminal in (False, True):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda answer=is_terminal: answer, raising=False)
        say(LINES[0], stream)
        assert stream.getvalue().count("\n") == (3 if is_terminal else 1)
