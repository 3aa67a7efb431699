"""Line editing, safe output, Ctrl+C.

Answers go to standard output and everything else to standard error. Nothing that is typed is written to disk.
"""

import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

# Control characters in an answer could move the cursor or recolour the window: their symbols are printed instead, into a file or
# a pipe too, which may end at a terminal.
VISIBLE_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}
JSON_ESCAPES = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}  # json.dumps escapes only those below 0x20


def make_printable(text: str) -> str:
    """Return the text for standard output, without control characters but tab and line end; --json has them all."""
    return text.translate(VISIBLE_CONTROLS)


def format_json(values: dict[str, Any]) -> str:
    """Return JSON in one line, without control characters."""
    return json.dumps(values, ensure_ascii=False).translate(JSON_ESCAPES)


class Terminal:
    """Read inputs from standard input, with line editing where a person types them; print answers and messages.

    Attributes:
        is_typed: a person types the inputs; False for a pipe.
        interrupted: Ctrl+C was pressed while record_interrupts lasted.
    """

    def __init__(self) -> None:
        self.is_typed = sys.stdin.isatty()
        self.is_edited = self.is_typed and sys.stdout.isatty()  # only then does input() edit lines
        self.interrupted = False
        self._messages = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
            if isinstance(stream, io.TextIOWrapper):  # input that is not UTF-8 is refused later, with a reason
                stream.reconfigure(errors=errors)
        if self.is_edited:  # only then: some readlines write to standard output while they are imported
            _load_readline()

    def read(self) -> str:
        """Return the next input: a line, several lines that were pasted together, or lines joined by a backslash.

        Raises:
            EOFError: the input has ended.
            KeyboardInterrupt: Ctrl+C was pressed.
        """
        lines = [self._read_line("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            try:
                lines.append(self._read_line("... "))
            except EOFError:
                break
        return "\n".join(lines).removesuffix("\n")  # a pasted text ends with one

    def _read_line(self, prompt: str) -> str:
        if self.is_edited:
            return input(prompt)
        if self.is_typed:
            print(prompt, end="", file=sys.stderr, flush=True)
        return input()

    def print_answer(self, piece: str) -> None:
        """Print a piece of an answer at once."""
        print(make_printable(piece), end="", flush=True)

    def say(self, line: str) -> None:
        """Print a message."""
        self._messages.print(line)

    def say_dimly(self, line: str) -> None:
        """Print a message that matters less than the answer above it."""
        self._messages.print(line, style="dim")

    def has_unfinished_line(self) -> bool:
        """Return whether Ctrl+C was pressed on a line with text."""
        return self.is_edited and "readline" in sys.modules and bool(sys.modules["readline"].get_line_buffer())

    @contextmanager
    def record_interrupts(self) -> Iterator[None]:
        """Make Ctrl+C only set `interrupted` while the context lasts, so that an answer ends between two tokens.

        Where inputs come from a pipe, Ctrl+C ends the program as everywhere else.
        """
        self.interrupted = False
        before = signal.signal(signal.SIGINT, self._record_interrupt) if self.is_typed else None
        try:
            yield
        finally:
            if self.is_typed:
                signal.signal(signal.SIGINT, before)

    def _record_interrupt(self, number: int, frame: object) -> None:
        self.interrupted = True


def _load_readline() -> None:
    """Give input() line editing, this session's history, and pastes of several lines, where Python was built with readline."""
    with suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
