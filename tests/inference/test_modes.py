"""The inference command: text, demo and interactive modes, streaming, and what it refuses."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen2Config

import inference_example
from qlora_kit import cli
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.config import GenerationSettings
from qlora_kit.config_file import load_config, override
from qlora_kit.data.dataset import load_blocks
from qlora_kit.errors import UserError
from qlora_kit.inference import compare
from qlora_kit.inference.compare import evaluation_blocks, judge_difference
from qlora_kit.inference.generator import Generated, Generator
from qlora_kit.inference.library_engine import LibraryEngine
from qlora_kit.inference.modes import AnsweredPrompt, choose_printer, format_columns, run_text
from qlora_kit.inference.prompts import DEMO_TEXTS, Prompt, PromptEncoder, demo_prompts
from qlora_kit.model.perplexity import Difference

PROMPT = "The river"


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


def load(adapter: Path, base_only: bool = False, **settings) -> Generator:
    chosen = {"max_new_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.0} | settings
    return inference_example.load_generator(adapter, device="cpu", base_only=base_only, settings=chosen)


@pytest.fixture(scope="module")
def greedy(adapter, root) -> Generator:
    before = Path.cwd()
    os.chdir(root)
    try:
        return load(adapter)
    finally:
        os.chdir(before)


def sampling(generator: Generator, seed: int = 1, **settings) -> Generator:
    """The same loaded model with other settings."""
    chosen = GenerationSettings(**{"max_new_tokens": 12, "temperature": 1.0} | settings)
    return Generator(generator.engine, generator.encoder, chosen, seed)


def text_mode(adapter, capsys, *arguments: str) -> str:
    inference_example.main(["--mode", "text", "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "8", *arguments])
    return capsys.readouterr().out


# --- what is generated --------------------------------------------------------------------------------------------------


def test_temperature_0_takes_the_likeliest_token_each_time(greedy):
    """Against a loop over plain forward passes, without generate() and without a cache."""
    ids = greedy.encoder.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, greedy.engine.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    answer = greedy.answer(PROMPT)
    assert answer.text == greedy.encoder.tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert answer.text == greedy.answer(PROMPT).text
    assert answer.tokens == 12 and answer.tokens_per_second > 0


def test_the_seed_fixes_the_text_whatever_came_before(greedy):
    one = sampling(greedy, seed=1)
    first = one.answer(PROMPT).text
    one.answer("something else")
    torch.rand(7)
    assert one.answer(PROMPT).text == first
    assert sampling(greedy, seed=1).answer(PROMPT).text == first
    assert any(sampling(greedy, seed=seed).answer(PROMPT).text != first for seed in (2, 3))


def test_streamed_pieces_add_up_to_the_complete_text(greedy):
    generator = sampling(greedy, max_new_tokens=40)
    pieces = list(generator.stream(greedy.encode(PROMPT)))
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == generator.answer(PROMPT).text


def test_a_text_ends_at_the_separator(greedy):
    """The separator is not the tokenizer's end of turn, and is not printed."""
    separator = greedy.encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert separator in greedy.encoder.stop_ids and greedy.encoder.tokenizer.eos_token_id in greedy.encoder.stop_ids
    ids = greedy.encode(PROMPT)
    likeliest = greedy.engine.model(torch.tensor([ids])).logits[0, -1].argmax().item()
    as_if_separator = replace(greedy.encoder, stop_ids=[likeliest])
    ending = Generator(greedy.engine, as_if_separator, greedy.settings)
    assert ending.answer(PROMPT).tokens == 1


def test_a_reader_that_stops_early_leaves_no_thread_behind(greedy):
    before = set(threading.enumerate())
    stream = sampling(greedy, max_new_tokens=500).stream(greedy.encode(PROMPT))
    next(stream)
    assert set(threading.enumerate()) != before
    stream.close()
    assert set(threading.enumerate()) == before


def test_a_failure_while_streaming_reaches_the_reader(greedy, monkeypatch):
    def fails(*arguments, **rest):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(greedy.engine.model, "generate", fails)
    with pytest.raises(RuntimeError, match="no memory left"):
        list(greedy.stream(greedy.encode(PROMPT)))


def test_the_adapter_changes_the_answer_and_base_only_leaves_it_out(adapter, greedy):
    base = load(adapter, base_only=True)
    ids = torch.tensor([greedy.encode(PROMPT)])
    with torch.no_grad():
        assert (base.engine.model(ids).logits - greedy.engine.model(ids).logits).abs().max() > 0.1
    assert not hasattr(base.engine.model, "peft_config")
    assert base.answer(PROMPT).text != greedy.answer(PROMPT).text


# --- modes --------------------------------------------------------------------------------------------------------------


def test_text_mode_prints_the_generated_text_alone(adapter, capsys):
    generator = load(adapter, max_new_tokens=8)
    assert text_mode(adapter, capsys, "--prompt", PROMPT, "--temperature", "0", "--repetition_penalty", "1") == (
        generator.answer(PROMPT).text + "\n"
    )


def test_a_dash_reads_the_prompt_from_standard_input(adapter, capsys, monkeypatch):
    expected = text_mode(adapter, capsys, "--prompt", PROMPT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert text_mode(adapter, capsys, "--prompt", "-") == expected


MANY = ["The river", "A lighthouse is in the", "In the spring of that year the city had begun to", "x", "The"]


@pytest.mark.parametrize("repetition_penalty", [1.0, 3.0])
def test_a_greedy_answer_does_not_depend_on_the_prompts_beside_it(greedy, repetition_penalty):
    """Nor does the penalty fall on what fills up a shorter prompt: the padding token is here one that an answer begins with."""
    alone = sampling(greedy, temperature=0.0, repetition_penalty=repetition_penalty, max_new_tokens=20)
    expected = [alone.answer(prompt).text for prompt in MANY]
    (first,) = next(alone.engine.steps([alone.encode(MANY[0])], alone.settings, 1, []))
    engine = LibraryEngine(greedy.engine.model, pad_id=first)
    batch = Generator(engine, alone.encoder, alone.settings, seed=1)
    assert [answer.text for answer in batch.complete([batch.encode(prompt) for prompt in MANY])] == expected


def prompt_file(tmp_path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff" + "\n\n  \n".join(MANY) + "\r\n", encoding="utf-8")
    return str(path)


def test_a_file_of_prompts_has_an_answer_for_each_line(adapter, greedy, tmp_path, capsys):
    flags = ["--temperature", "0", "--repetition_penalty", "1", "--prompt_file", prompt_file(tmp_path), "--batch_size", "2"]
    alone = sampling(greedy, temperature=0.0, repetition_penalty=1.0, max_new_tokens=8)
    assert text_mode(adapter, capsys, *flags).removesuffix("\n").split("\n\f\n") == [alone.answer(p).text for p in MANY]


def test_json_has_one_object_a_line(adapter, greedy, tmp_path, capsys):
    flags = ["--temperature", "0", "--repetition_penalty", "1", "--prompt_file", prompt_file(tmp_path), "--json", "--seed", "5"]
    objects = [json.loads(line) for line in text_mode(adapter, capsys, *flags).splitlines()]
    alone = sampling(greedy, temperature=0.0, repetition_penalty=1.0, max_new_tokens=8)
    expected = [alone.answer(prompt) for prompt in MANY]
    assert [found["prompt"] for found in objects] == MANY
    assert [(found["text"], found["tokens"], found["stop"]) for found in objects] == [
        (e.text, e.tokens, e.stop) for e in expected
    ]
    assert {found["seed"] for found in objects} == {5} and all(found["seconds"] > 0 for found in objects)
    assert all(set(found) == {"prompt", "text", "tokens", "stop", "seed", "seconds"} for found in objects)


def test_prompts_of_a_file_come_from_standard_input_too(adapter, tmp_path, capsys, monkeypatch):
    expected = text_mode(adapter, capsys, "--prompt_file", prompt_file(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(MANY)))
    assert text_mode(adapter, capsys, "--prompt_file", "-") == expected


def test_the_line_end_of_echo_is_not_of_the_prompt(adapter, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\nriver\n"))
    (found,) = map(json.loads, text_mode(adapter, capsys, "--prompt", "-", "--json").splitlines())
    assert found["prompt"] == "The\nriver"


def test_compare_answers_as_with_and_without_the_adapter(adapter, capsys):
    """Sampled, with one seed, in one process: the same as two processes of one answer each."""
    flags = ["--prompt", PROMPT, "--temperature", "1", "--max_new_tokens", "24", "--json"]
    (both,) = map(json.loads, text_mode(adapter, capsys, *flags, "--compare").splitlines())
    (one,) = map(json.loads, text_mode(adapter, capsys, *flags).splitlines())
    (base,) = map(json.loads, text_mode(adapter, capsys, *flags, "--base_only").splitlines())
    assert (both["text"], both["base"]["text"]) == (one["text"], base["text"])
    assert both["text"] != both["base"]["text"]


def test_compare_names_both_answers_in_plain_text(adapter, capsys):
    out = text_mode(adapter, capsys, "--prompt", PROMPT, "--compare")
    prompt, base, *_ = out.splitlines()
    assert prompt == f"--- prompt: {PROMPT!r}" and base.startswith("--- base, 8 tokens") and "--- adapter, 8 tokens" in out


def test_demo_asks_what_fits_the_adapter():
    assert demo_prompts("chat") == demo_prompts("instruction")
    assert not set(demo_prompts("chat")) & set(demo_prompts("text"))


class Saying:
    """An engine that says what it is given."""

    context = None

    def __init__(self, ids: list[int]):
        self.ids = ids

    def steps(self, prompts, settings, seed, stop_ids):
        yield from ([token] * len(prompts) for token in self.ids)

    adapter_off = nullcontext


@pytest.mark.parametrize("flags", [[], ["--compare"], ["--json"], ["--json", "--compare"]])
def test_what_a_terminal_would_obey_reaches_pipes_and_no_terminal(greedy, capsys, monkeypatch, flags):
    said = "a\x1b[2J\x9b1mb\x07"
    tokenizer = greedy.encoder.tokenizer
    speaker = Generator(Saying(tokenizer(said)["input_ids"]), PromptEncoder(tokenizer), GenerationSettings())
    prompts = [Prompt("x", ids=(1,)), Prompt("\x1b]0;y", ids=(1,))]

    def run():
        run_text(speaker, prompts, 2, "--compare" in flags, choose_printer("text", "--json" in flags, base_only=False))

    run()
    piped = capsys.readouterr().out
    assert ("--json" in flags) or piped.count(said) == (4 if flags else 2)
    if "--json" in flags:
        assert {json.loads(line)["text"] for line in piped.splitlines()} == {said}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run()
    seen = capsys.readouterr().out
    assert [sign for sign in seen.replace("\n\f\n", "") if (sign < " " and sign != "\n") or "\x7f" <= sign <= "\x9f"] == []
    assert "[2J" in seen and ("--json" in flags or "␛[2J" in seen)


def test_columns_stand_beside_each_other_and_hold_no_escape_sequence():
    base = Generated("plain \x1b[31mred", 3, 1.0, "length")
    answered = AnsweredPrompt("prompt [bold]", 1, Generated("[dim]adapter", 4, 2.0, "end"), base)
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    console.print(format_columns(answered, base))
    printed = console.file.getvalue()
    (words,) = [line for line in printed.splitlines() if "plain" in line]
    assert words.split() == ["plain", "␛[31mred", "[dim]adapter"]
    assert "prompt [bold]" in printed and "3 tokens, 3.0 tokens/s" in printed and "4 tokens, 2.0 tokens/s" in printed


# --- perplexity ---------------------------------------------------------------------------------------------------------


def library_loss(model, blocks) -> torch.Tensor:
    """(blocks,) by transformers' own loss."""
    with torch.no_grad():
        return torch.stack([model(ids[None], labels=ids[None]).loss for ids in (row["input_ids"] for row in blocks)]).double()


def test_perplexity_of_both_agrees_with_the_librarys_loss(adapter, greedy, capsys):
    name = "samples/README.md"
    inference_example.main(["--adapter", str(adapter), "--device", "cpu", "--perplexity", name, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)["perplexity"]
    tokens = greedy.encoder.tokenizer(Path(name).read_text(encoding="utf-8"))["input_ids"]
    blocks = [{"input_ids": torch.tensor(tokens[at : at + 64])} for at in range(0, len(tokens) - 63, 64)]
    after = library_loss(greedy.engine.model, blocks)
    with greedy.adapter_off():
        before = library_loss(greedy.engine.model, blocks)
    count = len(blocks)
    assert found["base"]["blocks"] == count > 5
    assert found["base"]["loss"] == pytest.approx(before.mean().item(), rel=1e-4)
    assert found["adapter"]["perplexity"] == pytest.approx(after.mean().exp().item(), rel=1e-3)
    assert found["difference"]["loss"] == pytest.approx((after - before).mean().item(), abs=1e-4)
    assert found["difference"]["standard_error"] == pytest.approx((after - before).std().item() / count**0.5, rel=1e-2)
    assert f"{count} blocks of 64 tokens" in found["definition"] and name in err


def test_perplexity_stands_beside_answers_on_standard_error(adapter, capsys):
    flags = ["--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "4", "--prompt", PROMPT]
    inference_example.main(flags)
    expected = capsys.readouterr().out
    inference_example.main([*flags, "--perplexity", "samples/alpaca.jsonl"])
    out, err = capsys.readouterr()
    assert out == expected
    assert "base " in err and "adapter " in err and "the adapter is worse" in err  # 4 steps on articles teach no answers
    assert "alpaca records" in err and "without overlap" in err


def test_perplexity_on_the_data_of_training_is_on_what_was_held_out(greedy):
    config = override(load_config(Path("configs/tiny.yaml")), {"data.max_length": 64})
    _, held_out = load_blocks(config, greedy.encoder.tokenizer)
    blocks, what = evaluation_blocks(config.data.dataset, config, greedy.encoder.tokenizer)
    assert blocks.fingerprint() == held_out.fingerprint() and "held out" in what


def test_base_only_measures_the_base_model_alone(adapter, capsys):
    flags = ["--adapter", str(adapter), "--device", "cpu", "--base_only", "--perplexity", "samples/alpaca.jsonl", "--json"]
    inference_example.main(flags)
    assert set(json.loads(capsys.readouterr().out)["perplexity"]) == {"data", "base", "definition"}


def test_a_text_is_measured_whatever_format_the_run_states_and_though_it_stopped_early(greedy):
    config = override(load_config(Path("configs/tiny.yaml")), {
        "data.max_length": 64, "data.format": "alpaca", "training.early_stopping_patience": 2, "training.save_steps": 10,
        "training.eval_steps": 10,
    })  # fmt: skip
    blocks, what = evaluation_blocks("samples/README.md", config, greedy.encoder.tokenizer)
    assert what == "samples/README.md" and len(blocks) > 5


def test_a_data_set_that_cannot_be_had_is_named_by_its_flag(greedy):
    config = override(load_config(Path("configs/tiny.yaml")), {"data.max_length": 64})
    trained = override(config, {"data.dataset": "nobody/has-this", "data.eval_split": "validation"})
    for found_in in (config, trained):
        with pytest.raises(UserError) as error:
            evaluation_blocks("nobody/has-this", found_in, greedy.encoder.tokenizer)
        (problem,) = error.value.lines
        assert problem.startswith("--perplexity: nobody/has-this: not on this machine")
        assert problem.endswith("--perplexity FILE") and "data.dataset" not in problem


def test_a_subset_may_follow_the_name_of_a_data_set(greedy, monkeypatch):
    opened = []
    untouched = compare.open_source

    def open_source(data, names, split, flag):
        opened.append((data.subset, names, split))
        return untouched(data.model_copy(update={"subset": None}), ["samples/articles.txt"], "", flag)

    monkeypatch.setattr(compare, "open_source", open_source)
    config = override(load_config(Path("configs/tiny.yaml")), {"data.max_length": 64})
    _, what = evaluation_blocks("Salesforce/wikitext:wikitext-2-raw-v1", config, greedy.encoder.tokenizer)
    assert opened == [("wikitext-2-raw-v1", ["Salesforce/wikitext"], "test")]
    assert what.startswith("Salesforce/wikitext:wikitext-2-raw-v1, split test")


@pytest.mark.parametrize("loss, error, words", [
    (-0.5, 0.1, "better"), (0.5, 0.1, "worse"), (0.1, 0.1, "no difference"), (0.0, 0.0, "nothing"), (1.0, math.nan, "one block"),
])  # fmt: skip
def test_a_verdict_needs_two_standard_errors(loss, error, words):
    assert words in judge_difference(Difference(loss, error))


def test_flags_go_over_the_adapters_own_settings(adapter):
    source = read_adapter(str(adapter))
    parsed = inference_example.parse_arguments(["--top_p", "0.5", "--max-new-tokens", "3"])
    settings = inference_example.sampling_settings(parsed, source.config.generation)
    assert (settings.top_p, settings.max_new_tokens) == (0.5, 3)
    assert settings.temperature == 0.5  # what configs/tiny.yaml sets


def test_demo_shows_every_prompt_with_both_answers_and_their_speed(adapter, capsys):
    inference_example.main(["--mode", "demo", "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "4"])
    out = capsys.readouterr().out
    for prompt in DEMO_TEXTS:
        assert repr(prompt) in out
    assert out.count("tokens/s") == 2 * len(DEMO_TEXTS)
    assert out.count("--- base") == out.count("--- adapter") == len(DEMO_TEXTS)
    assert "adapter norm" in out.splitlines()[-1]


def test_interactive_answers_each_line_and_ends_at_end_of_input(adapter, greedy, capsys, monkeypatch):
    too_long = "word " * 1100
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"The river\n\n{too_long}\nThe city\n"))
    inference_example.main([
        "--mode", "interactive", "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "4",
        "--temperature", "0", "--repetition_penalty", "1",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    alone = sampling(greedy, max_new_tokens=4, temperature=0.0, repetition_penalty=1.0)
    assert out == "".join(f"{alone.answer(prompt).text}\n" for prompt in ("The river", "The city"))
    assert err.count("error:") == 1 and "exceed the model's context" in err  # and the next prompt is answered


@pytest.mark.parametrize("mode", [["demo"], ["text", "--prompt", "x", "--json"]])
def test_a_reader_that_leaves_is_no_crash(adapter, monkeypatch, mode):
    """A real pipe whose reading end is closed, as `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:  # which writes out the rest at its end, as the interpreter does at its own
        monkeypatch.setattr(sys, "stdout", pipe)
        arguments = ["--mode", *mode, "--adapter", str(adapter), "--device", "cpu", "--max_new_tokens", "2"]
        with pytest.raises(SystemExit) as ending:
            cli.run(lambda: inference_example.main(arguments))
    assert ending.value.code == 0


# --- folders ------------------------------------------------------------------------------------------------------------


def copy(adapter: Path, folder: Path, *leave_out: str) -> Path:
    return Path(shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoints", *leave_out)))


def test_a_plain_peft_adapter_works_and_what_is_assumed_is_said(adapter, tmp_path, capsys, greedy):
    plain = copy(adapter, tmp_path / "plain", "run.json")
    inference_example.main([
        "--mode", "text", "--adapter", str(plain), "--device", "cpu", "--prompt", PROMPT, "--max_new_tokens", "12",
        "--temperature", "0", "--repetition_penalty", "1",
    ])  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out == greedy.answer(PROMPT).text + "\n"
    assert "no run.json" in captured.err and "assets/tiny-qwen2" in captured.err and "NF4" in captured.err


def test_what_is_assumed_without_run_json_is_what_is_done(adapter, tmp_path, capsys):
    """The run's own config.yaml still says how the base model was packed."""
    plain = copy(adapter, tmp_path / "plain", "run.json")
    config = (plain / "config.yaml").read_text()
    assert "quant_type: nf4" in config
    (plain / "config.yaml").write_text(config.replace("quant_type: nf4", "quant_type: fp4"))
    text_mode(plain, capsys, "--prompt", PROMPT)
    assert read_adapter(str(plain)).quantization.quant_type == "fp4"
    inference_example.main(["--mode", "text", "--adapter", str(plain), "--prompt", PROMPT, "--max_new_tokens", "1"])
    err = capsys.readouterr().err
    assert "FP4" in err and "NF4" not in err


@pytest.mark.parametrize("trained_in", ["float16", "bfloat16"])
def test_an_adapter_that_a_gpu_trained_speaks_on_a_cpu(adapter, tmp_path, trained_in):
    """The dtype of its training is no setting of inference: what this machine cannot compute in is replaced, not refused."""
    folder = copy(adapter, tmp_path / "moved")
    provenance = json.loads((folder / "run.json").read_text())
    provenance["quantization"]["compute_dtype"] = trained_in
    (folder / "run.json").write_text(json.dumps(provenance))
    generator = load(folder)
    assert (
        generator.engine.model.get_input_embeddings().weight.dtype
        == {"float16": torch.float32, "bfloat16": torch.bfloat16}[trained_in]
    )
    assert generator.answer(PROMPT).tokens == 12


def test_the_base_model_is_found_from_another_working_folder(adapter, tmp_path, monkeypatch, tiny_dir):
    monkeypatch.chdir(tmp_path)
    assert read_adapter(str(adapter)).model.name == str(tiny_dir)


@pytest.mark.parametrize("prepare, words", [
    (lambda adapter, folder: None, ["no such folder", "train_qlora.py"]),
    (lambda adapter, folder: folder.mkdir(), ["adapter_model.safetensors", "train_qlora.py"]),
    (lambda adapter, folder: shutil.copytree(adapter / "checkpoints", folder / "checkpoints"), ["--resume", "checkpoint-4"]),
    (lambda adapter, folder: shutil.copytree(adapter / "checkpoints", folder), ["use ", "checkpoint-4"]),
    (lambda adapter, folder: shutil.copytree("assets/tiny-qwen2", folder), ["whole model", "adapter to it"]),
    (lambda adapter, folder: folder.write_text("{}"), ["a file", "--adapter"]),
    (lambda adapter, folder: copy(adapter, folder, "adapter_config.json"), ["adapter_config.json"]),
    (lambda adapter, folder: (copy(adapter, folder) / "run.json").write_text("{"), ["run.json", "JSON"]),
    (lambda adapter, folder: (copy(adapter, folder) / "run.json").write_text("{}"), ["run.json", "base_model"]),
    (lambda adapter, folder: (copy(adapter, folder) / "adapter_model.safetensors").write_bytes(b"half"), ["damaged"]),
])  # fmt: skip
def test_a_folder_that_holds_no_whole_adapter(adapter, tmp_path, prepare, words):
    folder = tmp_path / "adapter"
    prepare(adapter, folder)
    with pytest.raises(UserError) as error:
        inference_example.main(["--mode", "text", "--adapter", str(folder), "--device", "cpu", "--prompt", PROMPT])
    (problem,) = error.value.lines
    assert str(folder) in problem and "\n" not in problem
    for word in words:
        assert word in problem


def test_an_adapter_of_another_model(adapter, tmp_path):
    folder = copy(adapter, tmp_path / "adapter", "run.json")
    other = tmp_path / "other-model"
    shutil.copytree("assets/tiny-qwen2", other)
    config = json.loads((other / "config.json").read_text())
    small = Qwen2Config(
        **config | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 64}
    )
    AutoModelForCausalLM.from_config(small).save_pretrained(other)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(other)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not fit") as error:
        load(folder)
    assert "\n" not in error.value.lines[0] and str(other) in error.value.lines[0]


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", ""], ["--prompt", "empty"]),
    ([], ["--prompt", "--mode text"]),
    (["--prompt", "x", "--temperature", "-1"], ["--temperature: '-1'", ". Leave it out for the adapter's own 0.5."]),
    (["--prompt", "x", "--temperature", "warm"], ["--temperature: 'warm'"]),
    (["--prompt", "x", "--top_p", "0"], ["--top_p: '0'", "greater than 0"]),
    (["--prompt", "x", "--top_p", "2"], ["--top_p: '2'", "less than or equal to 1"]),
    (["--prompt", "x", "--top_k", "-1"], ["--top_k: '-1'"]),
    (["--prompt", "x", "--max_new_tokens", "0"], ["--max_new_tokens: '0'"]),
    (["--prompt", "word " * 1100], ["--prompt", "1024", "--max_new_tokens"]),
    (["--prompt", "x", "--max_new_tokens", "1024"], ["--prompt", "1024", "--max_new_tokens"]),
    (["--prompt", "x", "--prompt_file", "y"], ["--prompt", "--prompt_file"]),
    (["--prompt_file", "no-such-file.txt"], ["--prompt_file: no-such-file.txt", "No such file"]),
    (["--prompt", "x", "--perplexity", "samples"], ["--perplexity", "name one kind at a time"]),
    (["--prompt_file", "samples"], ["--prompt_file: samples", "directory"]),
    (["--prompt_file", "/dev/null"], ["--prompt_file: /dev/null", "no prompt"]),
    (["--prompt_file", "assets/training_curves_tiny.png"], ["--prompt_file", "UTF-8"]),
    (["--prompt", "x\udcff"], ["--prompt", "UTF-8"]),
    (["--prompt", "x", "--system", "Be brief."], ["--system", "not trained on chats"]),
    (["--prompt", "x", "--compare", "--base_only"], ["--compare", "--base_only"]),
    (["--prompt", "x", "--batch_size", "0"], ["--batch_size", "0"]),
    (["--prompt", "x", "--batch_size", "many"], ["--batch_size", "many"]),
    (["--prompt", "x", "--seed", "-1"], ["--seed", "-1"]),
    (["--prompt", "x", "--seed", str(2**70)], ["--seed"]),
    (["--prompt", "x", "--perplexity", "no-such-file.txt"], ["--perplexity", "no-such-file.txt"]),
    (["--prompt", "x", "--perplexity", "samples/articles.txt"], ["--perplexity: samples/articles.txt", "held nothing out"]),
    (["--prompt", "x", "--perplexity", "pyproject.toml"], ["--perplexity", "pyproject.toml"]),
    (["--mode", "demo", "--prompt", "x"], ["--prompt", "demo"]),
    (["--mode", "interactive", "--json"], ["--json", "--mode"]),
    (["--prompt", "x", "--merged", "--compare"], ["--merged", "--compare"]),
    (["--prompt", "x", "--merged", "--base_only"], ["--merged", "--base_only"]),
    (["--prompt", "x", "--merged", "--perplexity", "samples/alpaca.jsonl"], ["--merged", "--perplexity"]),
    (["--mode", "demo", "--merged"], ["--merged", "demo"]),
])  # fmt: skip
def test_a_mistake_is_one_sentence(adapter, arguments, words):
    with pytest.raises(UserError) as error:
        inference_example.main(["--mode", "text", "--adapter", str(adapter), "--device", "cpu", *arguments])
    (problem,) = error.value.lines
    assert "\n" not in problem
    for word in words:
        assert word in problem


def test_a_line_that_is_too_long_is_named_before_any_is_answered(adapter, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "word " * 1100 + "\n")
    with pytest.raises(UserError, match=r"line 2: 1.* tokens .* context of 1024"):
        inference_example.main(["--adapter", str(adapter), "--device", "cpu", "--prompt_file", str(path), "--batch_size", "1"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flags", [
    ["--prompt_file", "no-such-file"], ["--compare", "--base_only"], ["--prompt", "x", "--top_p", "2"],
    ["--prompt", "x", "--system", "y"], ["--prompt", "x", "--temperature", "-1"], ["--perplexity", "no-such-file.txt"],
])  # fmt: skip
def test_what_can_be_known_early_is_refused_before_torch_is_imported(adapter, root, flags):
    code = (
        "import sys, inference_example\n"
        "from qlora_kit.config_file import UserError\n"
        f"try: inference_example.main(['--adapter', {str(adapter)!r}, *{flags!r}])\n"
        "except UserError: print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("flags", [
    ["--prompt", "word " * 1100], ["--mode", "demo", "--max_new_tokens", "1020"],
])  # fmt: skip
def test_a_prompt_that_is_too_long_is_refused_before_weights_are_loaded(adapter, root, tmp_path, flags):
    """The base model's folder holds none."""
    folder, base = copy(adapter, tmp_path / "adapter"), tmp_path / "base"
    shutil.copytree(root / "assets" / "tiny-qwen2", base, ignore=shutil.ignore_patterns("*.safetensors"))
    provenance = json.loads((folder / "run.json").read_text())
    provenance["base_model"] = {"name": str(base), "revision": None, "folder": str(base)}
    (folder / "run.json").write_text(json.dumps(provenance))
    with pytest.raises(UserError, match=r"--prompt: 1.* context of 1024|--mode: demo, prompt .* context of 1024"):
        inference_example.main(["--adapter", str(folder), *flags])
    with pytest.raises(UserError, match=r"no \*\.safetensors weights"):
        inference_example.main(["--adapter", str(folder), "--prompt", "short"])


@pytest.mark.parametrize("closed, flags", [
    ("stdin", ["--prompt", "-"]), ("stdin", ["--prompt_file", "-"]), ("stdin", []), ("stdout", ["--prompt", "x"]),
])  # fmt: skip
def test_a_pipe_that_was_closed_before_is_one_line(monkeypatch, closed, flags):
    """Python then has None in its place."""
    monkeypatch.setattr(sys, closed, None)
    with pytest.raises(UserError, match=f"standard {'input' if closed == 'stdin' else 'output'}: is closed. "):
        inference_example.main(["--adapter", "no-such-folder", *flags])


def test_pipes_are_utf_8_whatever_the_locale(monkeypatch):
    said, asked = io.BytesIO(), io.BytesIO("‖日本".encode())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, "ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(asked, "ascii"))
    inference_example.check_streams(inference_example.parse_arguments(["--prompt", "-"]))
    print(sys.stdin.read(), end="", flush=True)
    assert said.getvalue() == "‖日本".encode()


def test_a_gpu_that_is_not_there_is_named_by_the_flag(adapter):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"--device: cuda: needs a GPU.* or use auto"):
        inference_example.main(["--adapter", str(adapter), "--prompt", "x", "--device", "cuda"])


def test_empty_standard_input_is_an_empty_prompt(adapter, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="empty"):
        inference_example.main(["--mode", "text", "--adapter", str(adapter), "--prompt", "-"])


@pytest.mark.parametrize("arguments, word", [
    (["--mode", "chat"], "interactive"),
    (["--tempereture", "1"], "--temperature"),
    (["--seed", "x"], "--seed"),
    (["--mode", "text", "--adapter", "no-such-folder", "--prompt", "x"], "no-such-folder"),
])  # fmt: skip
def test_the_process_answers_a_mistake_with_status_2_and_one_line(root, arguments, word):
    command = [sys.executable, "inference_example.py", *arguments]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error:") and word in line
