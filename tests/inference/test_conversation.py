"""The interactive mode: through a real pseudo-terminal, and what it says and keeps with answers that are given to it."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import train_qlora
from qlora_kit.config import GenerationSettings
from qlora_kit.config_file import load_config, override
from qlora_kit.data.formats import from_messages
from qlora_kit.inference.conversation import COMMANDS
from qlora_kit.inference.generator import Generator
from qlora_kit.inference.modes import run_interactive
from qlora_kit.inference.prompts import PromptEncoder
from qlora_kit.inference.terminal import Terminal

SPLIT = "👩‍👩‍👧‍👦 says 𓂀𓂀𓂀 and 日本語の文, then ½ ℵ and naïveté. "  # each of these signs is several tokens to the tiny tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


class Scripted:
    """An engine that gives answers in their order, each with its end; `^C` in one presses Ctrl+C there."""

    def __init__(self, tokenizer, *answers: str, context: int | None = 1024, pause: float = 0):
        self.tokenizer, self.answers, self.context, self.pause = tokenizer, list(answers), context, pause
        self.adapted = True
        self.asked: list[tuple] = []  # the prompt's text, settings, seed, whether the adapter was on

    def steps(self, prompts, settings, seed, stop_ids):
        self.asked.append((self.tokenizer.decode(prompts[0]), settings, seed, self.adapted))
        begun, pressed, rest = self.answers.pop(0).partition("^C")
        if begun == "full":
            raise torch.OutOfMemoryError("out of memory")
        ids = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (begun, rest)]
        for number, token in enumerate([*ids[0], *ids[1], stop_ids[0]][: settings.max_new_tokens], 1):
            time.sleep(self.pause)
            if pressed and number == max(len(ids[0]), 1):
                signal.raise_signal(signal.SIGINT)
            yield [token]

    @contextmanager
    def adapter_off(self):
        self.adapted = False
        yield
        self.adapted = True


class Typed(io.StringIO):
    """Standard input that takes itself for a terminal; a line `^C` is that key."""

    def isatty(self):
        return True

    def readline(self, *arguments):
        line = super().readline(*arguments)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def converse(tokenizer, monkeypatch, capsys):
    """Runs a conversation of some lines and answers -> what was printed, what was said beside it, and the engine."""

    def run(lines, *answers, style="chat", stdin=Typed, context=1024, compare=False, fixed=None, **settings):
        monkeypatch.setattr(sys, "stdin", stdin("".join(f"{line}\n" for line in lines)))
        engine = Scripted(tokenizer, *answers, context=context)
        encoder = PromptEncoder(tokenizer, style, [tokenizer.eos_token_id])
        run_interactive(Generator(engine, encoder, GenerationSettings(**settings), fixed=fixed), compare)
        out, err = capsys.readouterr()
        return out, err, engine

    return run


def chat(*turns: str) -> str:
    """Turns as the tiny tokenizer's template writes them, up to an answer."""
    roles = ("user", "assistant") if len(turns) % 2 else ("system", "user", "assistant")
    said = [
        (roles[0] if not number else ("user", "assistant")[(number + len(turns) + 1) % 2], turn)
        for number, turn in enumerate(turns)
    ]
    return "".join(f"<|im_start|>{role}\n{turn}<|im_end|>\n" for role, turn in said) + "<|im_start|>assistant\n"


# --- what is sent, printed and said -----------------------------------------------------------------------------------------


def test_a_chat_sends_the_conversation_and_the_first_line_says_so(converse):
    out, err, engine = converse(["Hi", "", "And?"], "Hello!", "That is all.")
    assert out == "Hello!\nThat is all.\n"
    assert [asked[0] for asked in engine.asked] == [chat("Hi"), chat("Hi", "Hello!", "And?")]
    assert err.startswith("Chat: the whole conversation is sent with each message.")


@pytest.mark.parametrize("style, first, sent", [
    ("text", "Text: the adapter continues each input", "{}"),
    ("instruction", "Instructions: the adapter follows each input", "### Instruction:\n{}\n\n### Response:\n"),
])  # fmt: skip
def test_other_adapters_get_each_input_alone(converse, style, first, sent):
    _, err, engine = converse([" = River = ", "And?"], "one", "two", style=style)
    assert [asked[0] for asked in engine.asked] == [sent.format(" = River = "), sent.format("And?")]
    assert err.startswith(first) and "not sent" in err.splitlines()[0]


def test_each_answer_is_followed_by_tokens_speed_and_context(converse, tokenizer):
    count = len(tokenizer("Hello there!")["input_ids"]) + 1  # and the end of turn
    prompt = len(tokenizer(chat("Hi"))["input_ids"])
    _, err, _ = converse(["Hi"], "Hello there!")
    assert re.search(rf"^> {count} tokens, [\d,]+\.\d tokens/s, context {prompt + count} of 1,024$", err, re.MULTILINE)
    _, err, _ = converse(["Hi"], "Hello there!", max_new_tokens=2)
    assert f"context {prompt + 2} of 1,024, cut at max_new_tokens" in err


def test_in_a_pipe_answers_alone_are_on_standard_output_and_no_prompt_is_written(converse):
    out, err, _ = converse(["Hi", "/reset", "And?"], "Hello!", "Yes.", stdin=io.StringIO)
    assert out == "Hello!\nYes.\n"
    assert "> " not in err and "\x1b" not in err


def test_a_backslash_joins_lines_also_at_the_end_of_input(converse, tokenizer):
    _, err, engine = converse(["one\\", "two\\", "", "three\\"], "a", "b")
    assert [asked[0] for asked in engine.asked] == [chat("one\ntwo"), chat("one\ntwo", "a", "three\n".strip())]
    assert err.count("... ") == 3


def test_control_characters_of_an_answer_reach_a_pipe_and_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    terminal = Terminal()
    terminal.print_answer("a\x1b[2J\x9b1m\tb\n")
    assert capsys.readouterr().out == "a\x1b[2J\x9b1m\tb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal.print_answer("a\x1b[2J\x9b1m\tb\n")
    assert capsys.readouterr().out == "a␛[2J\ufffd1m\tb\n"


# --- Ctrl+C -----------------------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(converse):
    before = signal.getsignal(signal.SIGINT)
    out, err, engine = converse(["Hi", "And?"], "Hello there^C and so on", "Yes.")
    assert out == "Hello there\nYes.\n"
    assert "cut by Ctrl+C" in err
    assert engine.asked[1][0] == chat("Hi", "Hello there", "And?")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_that_was_stopped_before_its_first_word_is_left_out(converse):
    out, err, engine = converse(["Hi", "And?"], "^C𓂀", "Yes.")
    assert out == "\nYes.\n"  # one token of the sign was there, and nothing of it is printed
    assert "no words: left out" in err and engine.asked[1][0] == chat("And?")


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_twice_leaves(converse):
    out, err, _ = converse(["^C", "Hi", "^C", "^C", "And?"], "Hello!")
    assert out == "Hello!\n"
    assert err.count("Ctrl+C again leaves, as /exit and Ctrl+D do.") == 2
    _, _, engine = converse(["one\\", "^C", "two"], "Yes.")  # what was typed before it is dropped
    assert engine.asked[0][0] == chat("two")


def test_ctrl_c_ends_the_program_where_nobody_types(converse):
    with pytest.raises(KeyboardInterrupt):
        converse(["Hi", "And?"], "Hello^C there", stdin=io.StringIO)


# --- commands ---------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(converse):
    _, err, _ = converse(["/help"])
    assert [name for name in COMMANDS if not re.search(rf"^(> )?{name}\b", err, re.MULTILINE)] == []


def test_retry_takes_another_seed_and_replaces_the_answer(converse):
    _, err, engine = converse(["Hi", "/retry", "/retry", "And?"], "one", "two", "three", "Yes.")
    assert [asked[2] for asked in engine.asked] == [42, 43, 44, 42]
    assert [asked[0] for asked in engine.asked] == [chat("Hi")] * 3 + [chat("Hi", "three", "And?")]
    assert "seed 43" in err and "seed 44" in err and "seed 42" not in err


def test_undo_and_reset(converse):
    _, err, engine = converse(["Hi", "More", "/undo", "And?", "/reset", "New"], "one", "two", "three", "four")
    assert "removed: More" in err
    assert [asked[0] for asked in engine.asked[2:]] == [chat("Hi", "one", "And?"), chat("New")]


def test_the_system_turn_is_set_kept_by_reset_and_left_out_again(converse):
    lines = ["/system Be brief.", "Hi", "/reset", "And?", "/system", "So?"]
    _, _, engine = converse(lines, "one", "two", "three")
    assert [asked[0] for asked in engine.asked] == [
        chat("Be brief.", "Hi"),
        chat("Be brief.", "And?"),
        chat("And?", "two", "So?"),
    ]


def test_set_changes_the_next_answer(converse):
    _, err, engine = converse(["/SET temperature 0.25", "/set  max_new_tokens 7", "Hi", "/set"], "Hello!", top_k=3)
    assert engine.asked[0][1] == GenerationSettings(temperature=0.25, max_new_tokens=7, top_k=3)
    assert err.count("max_new_tokens 7, temperature 0.25, top_p 0.9, top_k 3, repetition_penalty 1.1") == 2


def test_a_refused_setting_stays_what_it_was_set_to(converse):
    _, err, _ = converse(["/set temperature 0.25", "/set temperature -1"])
    assert "greater than or equal to 0. Use another value; it stays 0.25." in err


def test_compare_asks_the_base_model_the_same_and_keeps_the_adapters_answer(converse):
    lines = ["Hi", "/set temperature 0.1", "/compare", "And?", "/compare"]
    out, err, engine = converse(lines, "Hello!", "Base", "Yes.", "Yes.", top_k=9)
    (first, second, third, _) = engine.asked
    assert out == "Hello!\nBase\nYes.\nYes.\n"
    assert second == (*first[:3], False) and first[3]
    assert third[0] == chat("Hi", "Hello!", "And?") and third[1].temperature == 0.1 and third[3]
    assert err.count("without the adapter:") == 2 and err.count("the same answer") == 1


def test_with_compare_each_answer_is_followed_by_that_of_the_base_model(converse):
    out, err, engine = converse(["Hi", "And?", "/retry"], "Hello!", "Base", "Yes.", "Yes.", "No.", "Maybe", compare=True)
    assert out == "Hello!\nBase\nYes.\nYes.\nNo.\nMaybe\n"
    for asked, again in zip(engine.asked[::2], engine.asked[1::2], strict=True):
        assert asked[3] and again == (*asked[:3], False)
    assert engine.asked[2][0] == chat("Hi", "Hello!", "And?")  # the base model's answers are no part of the conversation
    assert err.count("with the adapter:") == err.count("without the adapter:") == 3 and err.count("the same answer") == 1


def test_an_answer_that_ctrl_c_cut_is_not_compared(converse):
    out, _, engine = converse(["Hi", "And?"], "Hello^C there", "Yes.", "No^C.", compare=True)
    assert out == "Hello\nYes.\nNo\n" and [asked[3] for asked in engine.asked] == [True, True, False]


@pytest.mark.parametrize("flag", ["--merged", "--base_only"])
def test_there_is_nothing_to_compare_with(converse, flag):
    out, err, engine = converse(["Hi", "/compare"], "Hello!", fixed=flag)
    assert out == "Hello!\n" and len(engine.asked) == 1 and f"error: /compare: cannot be used with {flag}" in err


def test_what_is_saved_is_trained_on_but_for_answers_that_were_cut(converse, tmp_path, tokenizer):
    file = tmp_path / "chat.jsonl"
    lines = ["/system Be brief.", "Hé 日本", "a\\", "b", "Last?", f"/save {file}", f"/save {file}"]
    _, err, _ = converse(lines, "Hello!", "one^C two", "The end.")
    (record,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(turn["role"], turn["content"], turn.get("weight")) for turn in from_messages(record)] == [
        ("system", "Be brief.", None), ("user", "Hé 日本", None), ("assistant", "Hello!", None), ("user", "a\nb", None),
        ("assistant", "one", 0), ("user", "Last?", None), ("assistant", "The end.", None),
    ]  # fmt: skip
    assert "of weight 0: 1" in err and f"error: /save: {file}: exists already" in err
    train, _ = train_qlora.prepare_dataset(
        override(load_config(Path("configs/instruct.yaml")), {"data.dataset": str(file), "data.eval_split": None}), tokenizer
    )
    trained = train[0]["labels"][train[0]["labels"] != -100]
    assert tokenizer.decode(trained) == "Hello!<|im_end|>The end.<|im_end|>"


def test_rounds_that_were_sent_alone_are_saved_alone(converse, tmp_path):
    converse(["one", "two", f"/save {tmp_path}/rounds.jsonl"], "1", "2", style="text")
    saved = [json.loads(line)["messages"] for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [[turn["content"] for turn in turns] for turns in saved] == [["one", "1"], ["two", "2"]]


# --- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, words", [
    ("/rset", ["/rset", "did you mean /reset?"]),
    ("/", ["is not a command", "/help"]),
    ("/reset now", ["takes no argument"]),
    ("/save", ["/save", "FILE"]),
    ("/save notes.txt", ["notes.txt", ".jsonl"]),
    ("/save chat.jsonl", ["needs an answer"]),
    ("/retry", ["needs an answer"]),
    ("/undo", ["needs an answer"]),
    ("/compare", ["needs an answer"]),
    ("/set temperature", ["/set temperature", "value"]),
    ("/set temprature 1", ["/set temprature", "did you mean temperature?"]),
    ("/set lora.rank 1", ["/set lora.rank", "top_k"]),
    ("/set temperature -1", ["/set temperature", "-1", "; it stays 0.7"]),
    ("/set temperature warm", ["/set temperature", "warm"]),
    ("/set temperature nan", ["/set temperature", "nan"]),
    ("/set temperature 1e-30", ["/set temperature", "should be 0, which always takes the likeliest token"]),  # logits / 1e-30 overflow
    ("/set temperature 1e300", ["/set temperature", "100"]),
    ("/set repetition_penalty 1e-40", ["/set repetition_penalty", "0.01"]),
    ("/set repetition_penalty 1e300", ["/set repetition_penalty", "100"]),
    ("/set top_p 0", ["/set top_p", "0"]),
    ("/set top_p 2", ["/set top_p", "2"]),
    ("/set top_p nan", ["/set top_p", "nan"]),
    ("/set top_k -1", ["/set top_k", "-1"]),
    ("/set max_new_tokens 0", ["/set max_new_tokens", "0"]),
    ("/set repetition_penalty 0", ["/set repetition_penalty", "0"]),
    ("bytes \udcff of no text", ["half a character"]),
    ("nul \0", ["NUL"]),
    ("full", ["the GPU's memory is full", "/reset"]),
])  # fmt: skip
def test_a_mistake_is_one_line_and_ends_nothing(converse, line, words):
    answers = ["full", "Hello!"] if line == "full" else ["Hello!"]
    out, err, engine = converse([line, "Hi"], *answers)
    (problem,) = [said for said in err.splitlines() if "error:" in said]
    for word in words:
        assert word in problem
    assert out.strip() == "Hello!" and engine.asked[-1][:2] == (chat("Hi"), GenerationSettings())


def test_a_command_that_does_not_fit_the_adapter(converse, tmp_path):
    _, err, _ = converse(["/system Be brief."], style="text")
    assert "error: /system: needs an adapter trained on chats" in err
    _, err, _ = converse(["Hi", "/retry", f"/save {tmp_path}/none/chat.jsonl"], "one", temperature=0)
    assert "error: /retry: gives the same answer at temperature 0" in err and "No such file" in err


def test_a_template_without_system_turns_refuses_one_and_the_chat_goes_on(converse, tokenizer, monkeypatch):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
    out, err, _ = converse(["/system Be brief.", "Hi"], "Hello!")
    assert out == "Hello!\n" and "no system turn here" in err


def test_a_full_context_is_refused_with_what_makes_room(converse, tokenizer):
    used = len(tokenizer(chat("Hi", "Hello!", "And then?"))["input_ids"])
    lines = ["Hi", "And then?", "/reset", "And then?"]
    out, err, _ = converse(lines, "Hello!", "Yes.", context=used + 9, max_new_tokens=10)
    (problem,) = [said for said in err.splitlines() if "error:" in said]
    assert f"error: input: {used} tokens and 10 new tokens exceed the model's context of {used + 9}. " in problem
    assert problem.endswith("Use /undo or /reset, or /set max_new_tokens 9.")
    assert out == "Hello!\nYes.\n"
    _, err, _ = converse(["word " * 50], context=20, max_new_tokens=10)
    assert ". Use a shorter input." in err
    _, err, _ = converse(["Hi"], context=100, max_new_tokens=100)
    assert re.search(r"\. Use /set max_new_tokens \d\d\.", err)


# --- a real terminal --------------------------------------------------------------------------------------------------------

# Makes the terminal on standard input the one whose Ctrl+C it hears, as a shell does.
OWN_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
UP, BACKSPACE, CTRL_C, CTRL_D, PASTE = "\x1b[A", "\x7f", "\x03", "\x04", "\x1b[200~{}\x1b[201~"


class Window:
    """A process in a terminal of 40 columns, and what it shows there."""

    def __init__(self, command: list[str], root: Path):
        self.keys, terminal = os.openpty()
        termios.tcsetwinsize(terminal, (24, 40))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TERM": "xterm", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, sys.executable, *command], cwd=root, env=environment, start_new_session=True,
            stdin=terminal, stdout=terminal, stderr=terminal,
        )  # fmt: skip
        os.close(terminal)
        self.reads: list[bytes] = []
        self.seen = 0

    def type(self, text: str) -> None:
        os.write(self.keys, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What was shown since the last wait, up to the pattern."""
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
        """A line and all that it brings, up to the next prompt."""
        self.type(line + "\n")
        return self.wait_for(r"\n[^\n]*> $")

    def interrupt(self) -> str:
        """Ctrl+C at the prompt, and what it brings."""
        time.sleep(0.3)  # the interpreter hears of it only while it waits for keys, not in the instant before
        self.type(CTRL_C)
        return self.wait_for(r"\n[^\n]*> $")

    def leave(self) -> int:
        self.type(CTRL_D)
        while self.read(30):
            pass
        os.close(self.keys)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def chat_adapter(adapter_of) -> Path:
    """Trained for 2 steps: enough to change answers, too few to learn when to end them."""
    return adapter_of("--config", "configs/instruct.yaml", "--max_steps", "2", "--set", "data.max_train_samples=16")


def test_a_conversation_in_a_narrow_terminal(root, chat_adapter, tmp_path):
    window = Window(["inference_example.py", "--adapter", str(chat_adapter), "--max_new_tokens", "6"], root)
    try:
        assert window.wait_for(r"> $").lstrip().startswith("Chat: the whole conversation is sent")

        assert "tokens/s" in window.ask(f"名x{BACKSPACE}前は、" + "とても長い" * 8 + "?")  # a wide sign, and a line that wraps
        assert "removed: 名前は、とても長い" in window.ask("/undo")
        window.ask(PASTE.format("one\rtwo\r"))
        assert "removed: one two" in window.ask("/undo")
        assert "did you mean /retry?" in window.ask("/rety")
        window.ask("/set repetition_penalty 1")  # the likeliest words repeat themselves without an end
        assert "temperature 0" in window.ask("/set temperature 0")
        assert "max_new_tokens 900" in window.ask("/set max_new_tokens 900")

        window.type("What is a river?\n")
        window.wait_for(r"2004l\r[^\x1b]{4}")  # the answer has begun
        window.type(CTRL_C)
        stopped = window.wait_for(r"\n[^\n]*> $")
        assert "cut by Ctrl+C" in stopped and int(re.search(r"(\d+) tokens", stopped)[1]) < 900

        assert "max_new_tokens 12" in window.ask("/set max_new_tokens 12")
        assert "max_new_tokens 12" in window.ask(UP)  # the line before, again
        window.ask("And a lake?")
        compared = window.ask("/compare")
        assert "without the adapter:" in compared and "tokens/s" in compared
        assert "saved in" in window.ask(f"/save {tmp_path}/chat.jsonl")

        window.type("half a li")
        window.wait_for("half a li")
        assert "again leaves" not in window.interrupt()
        assert "again leaves" in window.interrupt()
        assert window.leave() == 0
    finally:
        window.process.kill()
    turns = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [turn["content"] for turn in turns[::2]] == ["What is a river?", "And a lake?"] and turns[1]["weight"] == 0
    assert "".join(turns[1]["content"].split())[:20] in "".join(window.shown().split())
    assert "Traceback" not in window.shown()


SCRIPT = """\
from transformers import AutoTokenizer
from qlora_kit.inference.generator import Generator
from qlora_kit.inference.modes import run_interactive
from qlora_kit.inference.prompts import PromptEncoder
from qlora_kit.config import GenerationSettings
from tests.inference.test_conversation import SPLIT, Scripted
tokenizer = AutoTokenizer.from_pretrained("assets/tiny-qwen2")
engine = Scripted(tokenizer, SPLIT * 3, pause=0.003)
encoder = PromptEncoder(tokenizer, stop_ids=[tokenizer.eos_token_id])
run_interactive(Generator(engine, encoder, GenerationSettings(max_new_tokens=900)))
"""


def test_no_half_character_reaches_the_terminal(root):
    """Of signs that are several tokens each, in a window that each line of them leaves: each write is whole characters."""
    window = Window(["-c", SCRIPT], root)
    try:
        window.wait_for(r"> $")
        before = len(window.reads)
        answered = window.ask("Go")
        assert SPLIT * 3 in answered
        for written in window.reads[before:]:
            assert "\ufffd" not in written.decode()
        assert len(window.reads) - before > 20  # it was streamed
        assert window.leave() == 0
    finally:
        window.process.kill()
