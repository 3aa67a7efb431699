"""Check what a conversation sends, prints, keeps and saves, with scripted answers."""

import io
import json
import re
import signal
import sys
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


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


class Scripted:
    """An engine that gives the answers in their order, each with a stop token; `^C` in an answer presses Ctrl+C there."""

    def __init__(self, tokenizer, *answers: str, context: int | None = 1024, pause: float = 0):
        self.tokenizer, self.answers, self.context, self.pause = tokenizer, list(answers), context, pause
        self.adapted = True
        self.asked: list[tuple] = []  # the prompt's text, settings, seed, whether the adapter is on

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
    """Standard input that claims to be a terminal; a line `^C` presses Ctrl+C."""

    def isatty(self):
        return True

    def readline(self, *arguments):
        line = super().readline(*arguments)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def converse(tokenizer, monkeypatch, capsys):
    """Return a function: inputs and answers of a conversation -> standard output, standard error, the engine."""

    def run(lines, *answers, style="chat", stdin=Typed, context=1024, compare=False, fixed=None, **settings):
        monkeypatch.setattr(sys, "stdin", stdin("".join(f"{line}\n" for line in lines)))
        engine = Scripted(tokenizer, *answers, context=context)
        encoder = PromptEncoder(tokenizer, style, [tokenizer.eos_token_id])
        run_interactive(Generator(engine, encoder, GenerationSettings(**settings), fixed=fixed), compare)
        out, err = capsys.readouterr()
        return out, err, engine

    return run


def chat(*turns: str) -> str:
    """Return turns as the tiny tokenizer's template writes them, up to an answer."""
    roles = ("user", "assistant") if len(turns) % 2 else ("system", "user", "assistant")
    messages = [
        (roles[0] if not number else ("user", "assistant")[(number + len(turns) + 1) % 2], turn)
        for number, turn in enumerate(turns)
    ]
    return "".join(f"<|im_start|>{role}\n{turn}<|im_end|>\n" for role, turn in messages) + "<|im_start|>assistant\n"


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


def test_a_pipe_gets_answers_alone_and_no_prompt(converse):
    out, err, _ = converse(["Hi", "/reset", "And?"], "Hello!", "Yes.", stdin=io.StringIO)
    assert out == "Hello!\nYes.\n"
    assert "> " not in err and "\x1b" not in err


def test_a_backslash_joins_lines_also_at_the_end_of_input(converse, tokenizer):
    _, err, engine = converse(["one\\", "two\\", "", "three\\"], "a", "b")
    assert [asked[0] for asked in engine.asked] == [chat("one\ntwo"), chat("one\ntwo", "a", "three\n".strip())]
    assert err.count("... ") == 3


def test_ctrl_c_stops_the_answer_and_keeps_what_was_printed(converse):
    before = signal.getsignal(signal.SIGINT)
    out, err, engine = converse(["Hi", "And?"], "Hello there^C and so on", "Yes.")
    assert out == "Hello there\nYes.\n"
    assert "cut by Ctrl+C" in err
    assert engine.asked[1][0] == chat("Hi", "Hello there", "And?")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_stopped_before_its_first_word_is_left_out(converse):
    out, err, engine = converse(["Hi", "/save chat.jsonl", "And?"], "^C𓂀", "Yes.")
    assert out == "\nYes.\n"  # one token of the character was generated, and none of it is printed
    assert "no words: left out" in err and "/save: chat.jsonl: needs an answer" in err
    assert engine.asked[1][0] == chat("And?")


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_twice_leaves(converse):
    out, err, _ = converse(["^C", "Hi", "^C", "^C", "And?"], "Hello!")
    assert out == "Hello!\n"
    assert err.count("Ctrl+C again leaves, as /exit and Ctrl+D do.") == 2
    _, _, engine = converse(["one\\", "^C", "two"], "Yes.")  # Ctrl+C drops the lines typed before it
    assert engine.asked[0][0] == chat("two")


def test_ctrl_c_ends_the_program_if_inputs_come_from_a_pipe(converse):
    with pytest.raises(KeyboardInterrupt):
        converse(["Hi", "And?"], "Hello^C there", stdin=io.StringIO)


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


def test_the_system_message_is_set_kept_by_reset_and_removed(converse):
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


def test_a_refused_setting_keeps_its_value(converse):
    _, err, _ = converse(["/set temperature 0.25", "/set temperature -1"])
    assert "greater than or equal to 0. Use another value, or keep 0.25." in err


def test_compare_asks_the_base_model_the_same_and_keeps_the_adapters_answer(converse):
    lines = ["Hi", "/set temperature 0.1", "/compare", "And?", "/compare"]
    out, err, engine = converse(lines, "Hello!", "Base", "Yes.", "Yes.", top_k=9)
    (first, second, third, _) = engine.asked
    assert out == "Hello!\nBase\nYes.\nYes.\n"
    assert second == (*first[:3], False) and first[3]
    assert third[0] == chat("Hi", "Hello!", "And?") and third[1].temperature == 0.1 and third[3]
    assert err.count("without the adapter:") == 2 and err.count("the same answer") == 1


def test_with_compare_the_base_models_answer_follows_each_answer(converse):
    out, err, engine = converse(["Hi", "And?", "/retry"], "Hello!", "Base", "Yes.", "Yes.", "No.", "Maybe", compare=True)
    assert out == "Hello!\nBase\nYes.\nYes.\nNo.\nMaybe\n"
    for asked, again in zip(engine.asked[::2], engine.asked[1::2], strict=True):
        assert asked[3] and again == (*asked[:3], False)
    assert engine.asked[2][0] == chat("Hi", "Hello!", "And?")  # without the base model's answers
    assert err.count("with the adapter:") == err.count("without the adapter:") == 3 and err.count("the same answer") == 1


def test_an_answer_that_ctrl_c_cut_is_not_compared(converse):
    out, _, engine = converse(["Hi", "And?"], "Hello^C there", "Yes.", "No^C.", compare=True)
    assert out == "Hello\nYes.\nNo\n" and [asked[3] for asked in engine.asked] == [True, True, False]


@pytest.mark.parametrize("flag", ["--merged", "--base_only"])
def test_compare_is_refused_without_an_adapter_to_switch(converse, flag):
    out, err, engine = converse(["Hi", "/compare"], "Hello!", fixed=flag)
    assert out == "Hello!\n" and len(engine.asked) == 1 and f"error: /compare: cannot be used with {flag}" in err


def trained_texts(file, tokenizer) -> list[str]:
    """Return what training learns of each record of a file."""
    settings = {"data.dataset": str(file), "data.eval_split": None, "data.packing": False, "data.max_length": 128}
    train, _ = train_qlora.prepare_dataset(override(load_config(Path("configs/instruct.yaml")), settings), tokenizer)
    return [tokenizer.decode(block["labels"][block["labels"] != -100]) for block in train]


def test_a_saved_conversation_trains_on_all_answers_but_those_that_were_cut(converse, tmp_path, tokenizer):
    file = tmp_path / "chat.jsonl"
    lines = ["/system Be brief.", "Hé 日本", "a\\", "b", "Nothing?", "Last?", f"/save {file}", f"/save {file}"]
    _, err, _ = converse(lines, "Hello!", "one^C two", "", "The end.")
    (record,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(turn["role"], turn["content"]) for turn in from_messages(record).messages] == [
        ("system", "Be brief."), ("user", "Hé 日本"), ("assistant", "Hello!"), ("user", "Last?"), ("assistant", "The end."),
    ]  # fmt: skip
    assert f"saved 2 rounds in {file}; 2 rounds left out" in err and f"error: /save: {file}: exists already" in err
    assert trained_texts(file, tokenizer) == ["Hello!<|im_end|>The end.<|im_end|>"]


def test_a_system_message_is_saved_before_what_it_was_sent_with(converse, tmp_path, tokenizer):
    lines = ["One?", "/system Be brief.", "Two?", "Three?", "/system", "Four?", f"/save {tmp_path}/chat.jsonl"]
    _, _, engine = converse(lines, "1", "2", "3", "4")
    records = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    sent = [engine.asked[number][0] for number in (0, 2, 3)]  # before the last answer of each record
    assert [chat(*(turn["content"] for turn in record[:-1])) for record in records] == sent
    assert trained_texts(tmp_path / "chat.jsonl", tokenizer) == ["1<|im_end|>", "2<|im_end|>3<|im_end|>", "4<|im_end|>"]


@pytest.mark.parametrize(
    ("style", "saved"),
    [
        ("text", [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "2"}]),
        ("instruction", [{"text": f"### Instruction:\n{q}\n\n### Response:\n{a}"} for q, a in (("one", "1"), ("two", "2"))]),
    ],
)
def test_rounds_without_a_chat_are_saved_one_a_record(converse, tmp_path, tokenizer, style, saved):
    file = tmp_path / "rounds.jsonl"
    converse(["one", "two", "three", f"/save {file}"], "1", "2", "3^C", style=style)
    assert [json.loads(line) for line in file.read_text().splitlines()] == saved
    assert trained_texts(file, tokenizer) == ["1<|im_end|>", "2<|im_end|>"]


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
    ("/set temperature -1", ["/set temperature", "-1", "or keep 0.7."]),
    ("/set temperature warm", ["/set temperature", "warm"]),
    ("/set temperature nan", ["/set temperature", "nan"]),
    ("/set temperature 1e-30", ["/set temperature", "should be 0, which always takes the likeliest token"]),
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
    (problem,) = [printed for printed in err.splitlines() if "error:" in printed]
    for word in words:
        assert word in problem
    assert out.strip() == "Hello!" and engine.asked[-1][:2] == (chat("Hi"), GenerationSettings())


def test_commands_that_cannot_work_are_refused(converse, tmp_path):
    _, err, _ = converse(["/system Be brief."], style="text")
    assert "error: /system: needs an adapter trained on chats" in err
    _, err, _ = converse(["Hi", "/retry", f"/save {tmp_path}/none/chat.jsonl"], "one", temperature=0)
    assert "error: /retry: gives the same answer at temperature 0" in err and "No such file" in err


def test_a_template_without_system_messages_refuses_one_and_the_chat_continues(converse, tokenizer, monkeypatch):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
    out, err, _ = converse(["/system Be brief.", "Hi"], "Hello!")
    assert out == "Hello!\n" and "no system turn here" in err


def test_a_full_context_is_refused_with_a_remedy(converse, tokenizer):
    used = len(tokenizer(chat("Hi", "Hello!", "And then?"))["input_ids"])
    lines = ["Hi", "And then?", "/reset", "And then?"]
    out, err, _ = converse(lines, "Hello!", "Yes.", context=used + 9, max_new_tokens=10)
    (problem,) = [printed for printed in err.splitlines() if "error:" in printed]
    assert f"error: input: {used} tokens and 10 new tokens exceed the model's context of {used + 9}. " in problem
    assert problem.endswith("Use /undo or /reset, or /set max_new_tokens 9.")
    assert out == "Hello!\nYes.\n"
    _, err, _ = converse(["word " * 50], context=20, max_new_tokens=10)
    assert ". Use a shorter input." in err
    _, err, _ = converse(["Hi"], context=100, max_new_tokens=100)
    assert re.search(r"\. Use /set max_new_tokens \d\d\.", err)
