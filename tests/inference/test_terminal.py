"""Check the terminal through a real pseudo-terminal."""

import io
import os
import re
import select
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from qlora_kit.inference.terminal import Terminal, WordWrap
from tests import forked


def test_no_control_character_of_an_answer_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    Terminal().print_answer("a\x1b[2J\x9b1m\tb\n")
    assert capsys.readouterr().out == "a␛[2J\ufffd1m\tb\n"


@pytest.mark.parametrize("width", [1, 7, 12, 40])
@pytest.mark.parametrize("text", [
    "A lighthouse is an atomic and courced thing.",
    "  indented = 1\n    more\n", "日本語の文は、単語で折り返す。",
    "mixed 文字 and a-very-long-word end",
])  # fmt: skip
def test_streamed_text_breaks_between_words_and_loses_nothing(width, text):
    wrap = WordWrap()
    shown = "".join(wrap.feed(piece, width) for piece in [*text, "\n"])
    assert "".join(shown.split()) == "".join(text.split())
    words = re.findall(r"[^\s\u3000-\u9fff]+|[\u3000-\u9fff][、。]*", text)
    if width >= max(map(cell_len, words)):  # a longer one goes on in the next line of the window
        assert all(cell_len(line) <= width for line in shown.split("\n"))
    assert all(word in shown for word in words) and not re.search(r"\n[、。]", shown)
    if width == 40 and "\n" in text:
        assert shown == text + "\n"  # indentation stays


UP, BACKSPACE, CTRL_C, CTRL_D, PASTE = "\x1b[A", "\x7f", "\x03", "\x04", "\x1b[200~{}\x1b[201~"


class Window:
    """A process in a terminal of 40 columns, and the output that it shows there."""

    def __init__(self, command: list[str]):
        self.keys, terminal = os.openpty()
        termios.tcsetwinsize(terminal, (24, 40))
        self.process = forked.start(command, (terminal, terminal, terminal), TERM="xterm")
        os.close(terminal)
        self.reads: list[bytes] = []
        self.seen = 0

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Return the output since the last wait, up to the pattern."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, (shown := self.shown())[self.seen :], re.DOTALL)):
            assert time.monotonic() < deadline and self.read(deadline - time.monotonic()), (
                f"{pattern} not in {shown[self.seen :]!r}"
            )
        before, self.seen = self.seen, self.seen + found.end()
        return shown[before : self.seen]

    def read(self, seconds: float) -> bool:
        if not select.select([self.keys], [], [], max(seconds, 0))[0]:
            return False
        try:
            self.reads.append(os.read(self.keys, 4096))
        except OSError:  # the process has left
            return False
        return True

    def shown(self) -> str:
        return b"".join(self.reads).decode(errors="ignore")

    def ask(self, line: str) -> str:
        """Type a line; return the output up to the next prompt, as one line."""
        self.type(line + "\n")
        return " ".join(self.wait_for(r"\n[^\n]*> $").split())

    def interrupt(self) -> str:
        """Press Ctrl+C at the prompt; return the output up to the next prompt."""
        time.sleep(0.3)  # the interpreter must be waiting for keys by then
        self.type(CTRL_C)
        return self.wait_for(r"\n[^\n]*> $")

    def leave(self) -> int:
        self.type(CTRL_D)
        while self.read(30):
            pass
        os.close(self.keys)
        return forked.wait(self.process, timeout=30)


@pytest.fixture(scope="module")
def chat_adapter(adapter_of) -> Path:
    """Train for 2 steps: enough to change answers, too few to learn to end them."""
    return adapter_of("--config", "configs/instruct.yaml", "--max_steps", "2", "--set", "data.max_train_samples=16")


def test_a_conversation_in_a_narrow_terminal(chat_adapter):
    window = Window(["inference_example.py", "--adapter", str(chat_adapter), "--max_new_tokens", "6"])
    try:
        banner = " ".join(window.wait_for(r"> $").split())
        expected = ("Adapter:", "Base model:", "4-bit NF4", "Settings:", "Chat: the whole")
        assert [word for word in expected if word not in banner] == []
        assert banner.count(str(chat_adapter)) == 1 and str(chat_adapter) in window.ask("/show")
        assert "did you mean /exit?" in window.ask("/quit") and "Leave? Then type /exit." in window.ask("quit")

        assert "tokens/s" in window.ask(
            f"名x{BACKSPACE}前は、" + "とても長い" * 8 + "?"
        )  # a wide character, and a line that wraps
        assert "removed: 名前は、とても長い" in window.ask("/undo")
        window.ask(PASTE.format("one\rtwo\r"))
        assert "removed: one two" in window.ask("/undo")
        assert "did you mean /retry?" in window.ask("/rety")
        window.ask("/set repetition_penalty 1")  # the likeliest words repeat themselves without an end
        assert "temperature 0" in window.ask("/set temperature 0")
        assert "max_new_tokens 900" in window.ask("/set max\t900")  # the Tab key

        window.type("What is a river?\n")
        window.wait_for(r"2004l\r(\x1b\[0m)?[^\x1b]{4}")  # the answer has begun
        window.type(CTRL_C)
        stopped = window.wait_for(r"\n[^\n]*> $")
        assert "cut by Ctrl+C" in stopped and int(re.search(r"(\d+) tokens", stopped)[1]) < 900

        assert "max_new_tokens 12" in window.ask("/set max_new_tokens 12")
        assert "max_new_tokens 12" in window.ask(UP)  # the line before, again
        window.ask("And a lake?")
        compared = window.ask("/compare")
        assert "without the adapter:" in compared and "tokens/s" in compared
        assert "error: /save" in window.ask("/save chat.jsonl")  # both answers were cut

        window.type("half a li")
        window.wait_for("half a li")
        assert "again leaves" not in window.interrupt()
        assert "again leaves" in window.interrupt()
        assert window.leave() == 0
    finally:
        window.process.kill()
    assert "Traceback" not in window.shown()


SPLIT = "👩‍👩‍👧‍👦 says 𓂀𓂀𓂀 and 日本語の文, then ½ ℵ and naïveté. "  # several tokens each, to the tiny tokenizer
SCRIPT = f"""\
from transformers import AutoTokenizer
from qlora_kit.inference.generator import Generator
from qlora_kit.inference.modes import run_interactive
from qlora_kit.inference.prompts import PromptEncoder
from qlora_kit.config import GenerationSettings
from tests.inference.test_conversation import Scripted
tokenizer = AutoTokenizer.from_pretrained("assets/tiny-qwen2")
engine = Scripted(tokenizer, {SPLIT!r} * 3, pause=0.003)
encoder = PromptEncoder(tokenizer, stop_ids=[tokenizer.eos_token_id])
run_interactive(Generator(engine, encoder, GenerationSettings(max_new_tokens=900)))
"""


def test_only_whole_characters_reach_the_terminal():
    """Each write holds whole characters, though each character is several tokens and the lines are wider than the window."""
    window = Window(["-c", SCRIPT])
    try:
        window.wait_for(r"> $")
        before = len(window.reads)
        answered = window.ask("Go")
        assert "".join((SPLIT * 3).split()) in "".join(answered.split())
        for written in window.reads[before:]:
            assert "\ufffd" not in written.decode()
        assert len(window.reads) - before > 20  # it was streamed
        assert window.leave() == 0
    finally:
        window.process.kill()
