"""Line editing, safe output, Ctrl+C.

Answers go to standard output and everything else to standard error. Nothing that is typed is written to disk.
"""

import io
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from qlora_kit.errors import spell_out
from qlora_kit.wrapping import fit

# Control characters in an answer could move the cursor or recolour the window: their symbols are printed instead, into a file or
# a pipe too, which may end at a terminal.
VISIBLE_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}
INPUT_COLOUR, NO_COLOUR = "\x1b[1;36m", "\x1b[0m"  # what is typed is bold cyan: answers look apart
JSON_ESCAPES = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}  # json.dumps escapes only those below 0x20


def make_printable(text: str) -> str:
    """Return the text for standard output, without control characters but tab and line end; --json has them all."""
    return text.translate(VISIBLE_CONTROLS)


def format_json(values: dict[str, Any]) -> str:
    """Return JSON in one line, without control characters."""
    return json.dumps(values, ensure_ascii=False).translate(JSON_ESCAPES)


class WordWrap:
    """Break streamed text between words where a line of the terminal ends; each wide character is a word.

    A word is held back until it is complete.
    """

    NEVER_FIRST = "，。、；：？！」』）》〉】…—～ー々"  # of a line

    def __init__(self) -> None:
        self.column = 0
        self.gap = self.word = ""

    def feed(self, text: str, width: int) -> str:
        """Return what can be printed now; a line end completes everything before it."""
        shown = ""
        for sign in text:
            if sign == "\n":
                shown += self._end_word(width) + sign
                self.column, self.gap = 0, ""
            elif sign in " \t":
                shown += self._end_word(width)
                self.gap += sign
            else:
                if self._begins_word(sign):
                    shown += self._end_word(width)
                self.word += sign
        return shown

    def _begins_word(self, sign: str) -> bool:
        if not self.word or sign in self.NEVER_FIRST or self.word.endswith("\N{ZERO WIDTH JOINER}") or not cell_len(sign):
            return False
        return cell_len(sign) == 2 or cell_len(self.word[-1]) == 2

    def _end_word(self, width: int) -> str:
        word, self.word = self.word, ""
        if not word:
            return ""
        gap, self.gap = self.gap, ""
        size = cell_len(word)
        if self.column and self.column + len(gap) + size > width:
            gap, self.column = "\n", 0
        self.column += (gap != "\n") * len(gap) + size
        while self.column > width:  # a longer word goes on in the next line
            self.column -= width
        return gap + word


class Terminal:
    """Read inputs from standard input, with line editing where a person types them; print answers and messages.

    Args:
        completions: beginnings of lines that the Tab key completes.

    Attributes:
        is_typed: a person types the inputs; False for a pipe.
        interrupted: Ctrl+C was pressed while record_interrupts lasted.
    """

    def __init__(self, completions: Sequence[str] = ()) -> None:
        self.is_typed = sys.stdin.isatty()
        self.is_edited = self.is_typed and sys.stdout.isatty()  # only then does input() edit lines
        self.interrupted = False
        self._wrap = WordWrap()
        self._messages = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
            if isinstance(stream, io.TextIOWrapper):  # input that is not UTF-8 is refused later, with a reason
                stream.reconfigure(errors=errors)
        if self.is_edited:  # only then: some readlines write to standard output while they are imported
            _load_readline(completions)

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
            try:
                return input(self._colour(INPUT_COLOUR, prompt))
            finally:
                print(self._colour(NO_COLOUR), end="", flush=True)
        if self.is_typed:
            print(prompt, end="", file=sys.stderr, flush=True)
        return input()

    def _colour(self, code: str, prompt: str = "") -> str:
        """Return a colour's code, before a prompt as readline needs it: what stands between \\1 and \\2 takes no column."""
        if self._messages.color_system is None or self._messages.no_color:
            return prompt
        return f"\1{code}\2{prompt}" if prompt else code

    def print_answer(self, piece: str) -> None:
        """Print a piece of an answer at once; on a terminal, whole words."""
        piece = make_printable(piece)
        print(self._wrap.feed(piece, Console().width) if sys.stdout.isatty() else piece, end="", flush=True)

    def say(self, line: str) -> None:
        """Print a message."""
        self._messages.print(fit(spell_out(line, kept="\n\t"), sys.stderr))

    def say_dimly(self, line: str) -> None:
        """Print a message that matters less than the answer above it."""
        self._messages.print(fit(spell_out(line, kept="\n\t"), sys.stderr), style="dim")

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
            with without_echo() if self.is_edited else nullcontext():
                yield
        finally:
            if self.is_typed:
                signal.signal(signal.SIGINT, before)

    def _record_interrupt(self, number: int, frame: object) -> None:
        self.interrupted = True


@contextmanager
def without_echo() -> Iterator[None]:
    """Keep what is typed meanwhile, and ^C, out of an answer; the next prompt shows it."""
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _load_readline(completions: Sequence[str]) -> None:
    """Give input() line editing, history, Tab, and pastes of several lines, where Python was built with readline."""
    with suppress(ImportError):
        import readline

        def complete(line: str, number: int) -> str | None:
            return [*(start for start in completions if line and start.startswith(line)), None][number]

        readline.set_completer(complete)
        readline.set_completer_delims("")  # the whole line is completed, not its last word
        is_libedit = "libedit" in (readline.__doc__ or "")  # macOS
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")
