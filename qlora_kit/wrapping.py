"""Fit messages to a terminal: prose wraps by words, a command stays whole, a row of a table turns into `name: value` if need be.

A pipe or a file gets every line as it is: one line for each event.
"""

import re
import sys
from typing import IO

from rich.cells import cell_len
from rich.console import Console

from qlora_kit.errors import spell_out

NARROW = 60  # columns, below which rows of tables turn into `name: value`
COMMAND = r"(?:python3?|torchrun|pip|hf|qlora) (?:-m )?[\w./~-]+(?: --?[\w=./~\[\],-]+(?: [^\s-]\S*)?)*"
# What no line end may divide: a command, a flag with its value, a number with its error and its unit, a word.
UNIT = re.compile(
    rf"{COMMAND}\S*|--\w\S* [\w./]\S*|\S*\d(?: ± [\d.]+)?(?: (?:%|[GM]iB|tokens/s|tokens|steps|min|s|h|left)(?!\w)\S*)?(?!\S)|\S+"
)
ROW = re.compile(r"( *)(\S+(?: \S+)*)(:? {2,})(?=\S)")  # the first column of a table, with the gap behind it


def say(text: str, file: IO[str] | None = None) -> None:
    """Print a message without control characters, on standard error unless a stream is given, wrapped by words on a terminal."""
    stream = file or sys.stderr
    print(fit(spell_out(text, kept="\n\t"), stream), file=stream, flush=True)


def fit(text: str, stream: IO[str]) -> str:
    """Return the text as it is to be printed on a stream: a terminal's lines are wrapped by words."""
    if not stream.isatty():
        return text
    width = max(Console(file=stream).width, 20)
    return "\n".join(wrap_line(line, width) for line in text.split("\n"))


def wrap_line(line: str, width: int) -> str:
    """Return one line as lines of at most `width` columns, the later ones indented; longer words and commands stay whole."""
    row, command = ROW.match(line), re.match(rf" *{COMMAND}", line)
    if row and command and cell_len(line) > width:  # with what it does behind it: below it
        return f"{row[1]}{row[2]}\n" + wrap_line(f"{row[1]}    {line[row.end() :]}", width)
    if row and width < NARROW and not command:
        line = f"{row[1]}{row[2]}: {line[row.end() :]}"
    if cell_len(line) <= width or command:
        return line
    start = line[: row.end()] if row and width >= NARROW else line[: len(line) - len(line.lstrip())]
    if len(start) > width // 2:  # no column, but words with a gap
        start = ""
    hanging = " " * (len(start) if start.strip() else len(start) + 2)
    lines, current = [], start
    for unit in UNIT.findall(line[len(start) :]):
        gap = "" if current in (start, hanging) else " "
        while cell_len(current + gap + unit) > width and cell_len(unit) > len(unit):  # a line may end after any wide character
            room = next(n for n in range(len(unit) + 1) if cell_len(current + gap + unit[: n + 1]) > width)
            lines.append(current + gap + unit[:room] if room else current)
            current, gap, unit = hanging, "", unit[room:]
        if gap and cell_len(current + gap + unit) > width:
            lines.append(current)
            current, gap = hanging, ""
        current += gap + unit
    return "\n".join([*lines, current])
