"""Check the flags of inference_example.py: which are refused, how early, and how."""

import io
import subprocess
import sys

import pytest

import inference_example
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.errors import UserError
from tests import forked


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


def test_flags_change_the_adapters_own_settings(adapter):
    source = read_adapter(str(adapter))
    parsed = inference_example.parse_arguments(["--top_p", "0.5", "--max-new-tokens", "3"])
    settings = inference_example.sampling_settings(parsed, source.config.generation)
    assert (settings.top_p, settings.max_new_tokens) == (0.5, 3)
    assert settings.temperature == 0.5  # what configs/tiny.yaml sets


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", ""], ["--prompt", "empty"]),
    ([], ["--prompt", "--mode text"]),
    (["--prompt", "x", "--temperature", "-1"], ["--temperature: '-1'", ". Use another value, or keep 0.5."]),
    (["--prompt", "x", "--temperature", "warm"], ["--temperature: 'warm'"]),
    (["--prompt", "x", "--top_p", "0"], ["--top_p: '0'", "greater than 0"]),
    (["--prompt", "x", "--top_p", "2"], ["--top_p: '2'", "less than or equal to 1"]),
    (["--prompt", "x", "--top_k", "-1"], ["--top_k: '-1'"]),
    (["--prompt", "x", "--max_new_tokens", "0"], ["--max_new_tokens: '0'"]),
    (["--prompt", "word " * 1100], ["--prompt", "1024", "--max_new_tokens"]),
    (["--prompt", "x", "--max_new_tokens", "1024"], ["--prompt", "1024", "--max_new_tokens"]),
    (["--prompt", "x", "--prompt_file", "y"], ["--prompt", "--prompt_file"]),
    (["--prompt_file", "no-such-file.txt"], ["--prompt_file: no-such-file.txt", "No such file"]),
    (["--prompt", "x", "--perplexity", "samples"], ["--perplexity", "Use one kind at a time"]),
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
    (["--prompt", "x", "--perplexity", "pyproject.toml"], ["pyproject.toml", "suffix"]),
    (["--mode", "demo", "--prompt", "x"], ["--prompt", "demo"]),
    (["--mode", "interactive", "--json"], ["--json", "--mode"]),
    (["--prompt", "x", "--merged", "--compare"], ["--merged", "--compare"]),
    (["--prompt", "x", "--merged", "--base_only"], ["--merged", "--base_only"]),
    (["--prompt", "x", "--merged", "--perplexity", "samples/alpaca.jsonl"], ["--merged", "--perplexity"]),
    (["--mode", "demo", "--merged"], ["--merged", "demo"]),
])  # fmt: skip
def test_a_mistake_is_one_line(adapter, arguments, words):
    with pytest.raises(UserError) as error:
        inference_example.main(["--mode", "text", "--adapter", str(adapter), "--device", "cpu", *arguments])
    (problem,) = error.value.lines
    assert "\n" not in problem
    for word in words:
        assert word in problem


CHECKED = [
    ["--prompt_file", "no-such-file"], ["--compare", "--base_only"], ["--prompt", "x", "--top_p", "2"],
    ["--prompt", "x", "--system", "y"], ["--prompt", "x", "--temperature", "-1"], ["--perplexity", "no-such-file.txt"],
]  # fmt: skip


def test_flags_are_checked_before_torch_is_imported(adapter, root):
    code = (
        "import sys, inference_example\n"
        "from qlora_kit.errors import UserError\n"
        f"for flags in {CHECKED!r}:\n"
        f"    try: inference_example.main(['--adapter', {str(adapter)!r}, *flags])\n"
        "    except UserError: print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["[]"] * len(CHECKED), result.stderr


@pytest.mark.parametrize("closed, flags", [
    ("stdin", ["--prompt", "-"]), ("stdin", ["--prompt_file", "-"]), ("stdin", []), ("stdout", ["--prompt", "x"]),
])  # fmt: skip
def test_a_closed_pipe_is_one_line(monkeypatch, closed, flags):
    """Python then sets the stream to None."""
    monkeypatch.setattr(sys, closed, None)
    with pytest.raises(UserError, match=f"standard {'input' if closed == 'stdin' else 'output'}: is closed. "):
        inference_example.main(["--adapter", "no-such-folder", *flags])


def test_pipes_are_utf_8_whatever_the_locale(monkeypatch):
    written, typed = io.BytesIO(), io.BytesIO("‖日本".encode())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, "ascii"))
    inference_example.check_streams(inference_example.parse_arguments(["--prompt", "-"]))
    print(sys.stdin.read(), end="", flush=True)
    assert written.getvalue() == "‖日本".encode()


@pytest.mark.parametrize("arguments, word", [
    (["--mode", "chat"], "interactive"),
    (["--tempereture", "1"], "--temperature"),
    (["--seed", "x"], "--seed"),
    (["--mode", "text", "--adapter", "no-such-folder", "--prompt", "x"], "no-such-folder"),
])  # fmt: skip
def test_a_mistake_ends_the_process_with_status_2(arguments, word):
    result = forked.run(["inference_example.py", *arguments])
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error:") and word in line
