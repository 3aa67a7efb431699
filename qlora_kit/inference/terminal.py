"""A person at a terminal, or a pipe in its place: what is typed, what is said beside the answers, and Ctrl+C.

Answers go to standard output and everything else to standard error. Nothing that is typed is kept on disk.
"""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

# Control characters in an answer could move the cursor or recolour the window: they are shown as signs of their own.
HARMLESS = {
    **{number: 0x2400 + number for number in range(0x20) if chr(number) not in "\t\n"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}


def shown(text: str) -> str:
    """Text as it may go to standard output: unchanged to a pipe or a file, harmless to a terminal."""
    return text.translate(HARMLESS) if sys.stdout.isatty() else text


class Terminal:
    """Reads inputs from standard input, with line editing where a person types them."""

    def __init__(self) -> None:
        self.typed = sys.stdin.isatty()
        self.edited = self.typed and sys.stdout.isatty()  # where input() edits lines
        self.interrupted = False  # Ctrl+C was pressed while it was noted
        self.messages = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
            if isinstance(stream, io.TextIOWrapper):  # bytes that are no text come through, to be refused with a reason
                stream.reconfigure(errors=errors)
        if self.edited:  # only then: some readlines write to standard output as they are loaded
            _load_readline()

    def read(self) -> str:
        """The next input: a line, several that were pasted together, or one that goes on behind a backslash.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl+C was pressed.
        """
        lines = [self._line("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            try:
                lines.append(self._line("... "))
            except EOFError:
                break
        return "\n".join(lines).removesuffix("\n")  # which a pasted text ends with

    def _line(self, prompt: str) -> str:
        if self.edited:
            return input(prompt)
        if self.typed:
            print(prompt, end="", file=sys.stderr, flush=True)
        return input()

    def answer(self, piece: str) -> None:
        """A piece of an answer, at once."""
        print(shown(piece), end="", flush=True)

    def say(self, line: str) -> None:
        self.messages.print(line)

    def whisper(self, line: str) -> None:
        """A line that matters less than the answer above it."""
        self.messages.print(line, style="dim")

    def refuse(self, reason: object) -> None:
        self.messages.print(f"error: {reason}")

    def half_typed(self) -> bool:
        """Whether Ctrl+C was pressed behind words."""
        return self.edited and "readline" in sys.modules and bool(sys.modules["readline"].get_line_buffer())

    @contextmanager
    def noting_interrupts(self) -> Iterator[None]:
        """Ctrl+C only sets `interrupted` while the context lasts, for an answer to end between two tokens.

        Where nobody types, it ends the program as anywhere else.
        """
        self.interrupted = False
        before = signal.signal(signal.SIGINT, self._note) if self.typed else None
        try:
            yield
        finally:
            if self.typed:
                signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: object) -> None:
        self.interrupted = True


def _load_readline() -> None:
    """Gives input() editing, the history of this session, and pastes of several lines, where the platform has it."""
    try:
        import readline
    except ImportError:  # Windows, whose console edits lines itself
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
