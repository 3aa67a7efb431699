"""Check what each mode prints, to a pipe and to a terminal."""

import io
import json
import os
import sys
from contextlib import nullcontext

import pytest
from rich.console import Console

import inference_example
from qlora_kit import cli
from qlora_kit.config import GenerationSettings
from qlora_kit.inference.generator import Generated, Generator
from qlora_kit.inference.modes import AnsweredPrompt, choose_printer, format_columns, run_text
from qlora_kit.inference.prompts import DEMO_TEXTS, Prompt, PromptEncoder

PROMPT = "The river"
MANY = ["The river", "A lighthouse is in the", "In the spring of that year the city had begun to", "x", "The"]


def test_text_mode_prints_the_generated_text_alone(sampled, text_mode):
    expected = sampled(temperature=0.0, repetition_penalty=1.0, max_new_tokens=8).answer(PROMPT).text
    assert text_mode("--prompt", PROMPT, "--temperature", "0", "--repetition_penalty", "1") == f"{expected}\n"


def prompt_file(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff" + "\n\n  \n".join(MANY) + "\r\n", encoding="utf-8")
    return str(path)


def test_a_file_of_prompts_has_an_answer_for_each_line(tmp_path, sampled, text_mode):
    flags = ["--temperature", "0", "--repetition_penalty", "1", "--prompt_file", prompt_file(tmp_path), "--batch_size", "2"]
    alone = sampled(temperature=0.0, repetition_penalty=1.0, max_new_tokens=8)
    assert text_mode(*flags).removesuffix("\n").split("\n\f\n") == [alone.answer(p).text for p in MANY]


def test_json_has_one_object_a_line(tmp_path, sampled, text_mode):
    flags = ["--temperature", "0", "--repetition_penalty", "1", "--prompt_file", prompt_file(tmp_path), "--json", "--seed", "5"]
    objects = [json.loads(line) for line in text_mode(*flags).splitlines()]
    alone = sampled(temperature=0.0, repetition_penalty=1.0, max_new_tokens=8)
    expected = [alone.answer(prompt) for prompt in MANY]
    assert [found["prompt"] for found in objects] == MANY
    assert [(found["text"], found["tokens"], found["stop"]) for found in objects] == [
        (e.text, e.tokens, e.stop) for e in expected
    ]
    assert {found["seed"] for found in objects} == {5} and all(found["seconds"] > 0 for found in objects)
    assert all(set(found) == {"prompt", "text", "tokens", "stop", "seed", "seconds"} for found in objects)


def test_compare_answers_as_two_runs_with_and_without_the_adapter(text_mode):
    """Sample with one seed."""
    flags = ["--prompt", PROMPT, "--temperature", "1", "--max_new_tokens", "24", "--json"]
    (both,) = map(json.loads, text_mode(*flags, "--compare").splitlines())
    (one,) = map(json.loads, text_mode(*flags).splitlines())
    (base,) = map(json.loads, text_mode(*flags, "--base_only").splitlines())
    assert (both["text"], both["base"]["text"]) == (one["text"], base["text"])
    assert both["text"] != both["base"]["text"]


def test_compare_names_both_answers_in_plain_text(adapter, text_mode):
    out = text_mode("--prompt", PROMPT, "--compare")
    prompt, base, *_ = out.splitlines()
    assert prompt == f"--- prompt: {PROMPT!r}" and base.startswith("--- base, 8 tokens") and "--- adapter, 8 tokens" in out


class Script:
    """An engine that answers with given tokens."""

    context = None

    def __init__(self, ids: list[int]):
        self.ids = ids

    def steps(self, prompts, settings, seed, stop_ids):
        yield from ([token] * len(prompts) for token in self.ids)

    adapter_off = nullcontext


@pytest.mark.parametrize("flags", [[], ["--compare"], ["--json"], ["--json", "--compare"]])
def test_no_control_character_of_an_answer_is_printed(greedy, capsys, flags):
    answer = "a\x1b[2J\x9b1mb\x07"
    tokenizer = greedy.encoder.tokenizer
    generator = Generator(Script(tokenizer(answer)["input_ids"]), PromptEncoder(tokenizer), GenerationSettings())
    prompts = [Prompt("x", ids=(1,)), Prompt("\x1b]0;y", ids=(1,))]

    run_text(generator, prompts, 2, "--compare" in flags, choose_printer("text", "--json" in flags, base_only=False))
    seen = capsys.readouterr().out
    if "--json" in flags:
        assert {json.loads(line)["text"] for line in seen.splitlines()} == {answer}
    assert [sign for sign in seen.replace("\n\f\n", "") if (sign < " " and sign != "\n") or "\x7f" <= sign <= "\x9f"] == []
    assert "[2J" in seen and ("--json" in flags or "␛[2J" in seen)


def test_columns_hold_both_answers_without_control_characters():
    base = Generated("plain \x1b[31mred", 3, 1.0, "length")
    answered = AnsweredPrompt("prompt [bold]", 1, Generated("[dim]adapter", 4, 2.0, "end"), base)
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    console.print(format_columns(answered, base))
    printed = console.file.getvalue()
    (words,) = [line for line in printed.splitlines() if "plain" in line]
    assert words.split() == ["plain", "␛[31mred", "[dim]adapter"]
    assert "prompt [bold]" in printed and "3 tokens, 3.0 tokens/s" in printed and "4 tokens, 2.0 tokens/s" in printed


def test_demo_shows_every_prompt_with_both_answers_and_their_speed(adapter, capsys):
    inference_example.main(["--mode", "demo", "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "4"])
    out = capsys.readouterr().out
    for prompt in DEMO_TEXTS:
        assert repr(prompt) in out
    assert out.count("tokens/s") == 2 * len(DEMO_TEXTS)
    assert out.count("--- base") == out.count("--- adapter") == len(DEMO_TEXTS)
    assert "Size of the update" in out.splitlines()[-1]


def test_interactive_answers_each_line_and_ends_at_end_of_input(adapter, capsys, monkeypatch, sampled):
    too_long = "word " * 1100
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"The river\n\n{too_long}\nThe city\n"))
    inference_example.main([
        "--mode", "interactive", "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "4",
        "--temperature", "0", "--repetition_penalty", "1",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    alone = sampled(max_new_tokens=4, temperature=0.0, repetition_penalty=1.0)
    assert out == "".join(f"{alone.answer(prompt).text}\n" for prompt in ("The river", "The city"))
    assert err.count("error:") == 1 and "exceed the model's context" in err  # and the next prompt is answered


@pytest.mark.parametrize("mode", [["demo"], ["text", "--prompt", "x", "--json"]])
def test_a_reader_that_leaves_ends_the_command_with_status_0(adapter, monkeypatch, mode):
    """Use a real pipe whose reading end is closed, as `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:  # its end flushes, as the interpreter's end does
        monkeypatch.setattr(sys, "stdout", pipe)
        arguments = ["--mode", *mode, "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "2"]
        with pytest.raises(SystemExit) as ending:
            cli.run(lambda: inference_example.main(arguments))
    assert ending.value.code == 0
