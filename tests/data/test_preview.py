"""`train_qlora.py --preview` prints records and counts, and does nothing else."""

import io
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import train_qlora
from qlora_kit import cli
from qlora_kit.data.preview import draw_histogram
from qlora_kit.errors import UserError
from tests.data.tool_templates import template

RECORDS = [
    {"instruction": "Say hi", "input": "", "output": "Hi"},
    {"instruction": "Translate", "input": "Hallo", "output": "Hello"},
    {"instruction": "Say \x1b[2J it", "input": "", "output": "It"},
    {"instruction": "Count", "input": "", "output": "one two three " * 20},
    {"instruction": "word " * 40, "input": "", "output": "Yes"},
]


@pytest.fixture
def preview(root, tmp_path, monkeypatch, capsys):
    """Return a function that previews records with flags and returns standard output."""
    monkeypatch.chdir(root)

    def preview(records: list[dict], *flags: str) -> str:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = ["--set", "data.eval_split=null", "--max_length", "48", "--output_dir", str(tmp_path / "out")]
        train_qlora.main(["--preview", "--config", "configs/tiny.yaml", "--dataset", str(path), *settings, *flags])
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out

    return preview


def rows_of(output: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in output.splitlines() if line[:1].isalpha() and line[11:12] == " "}


def test_the_first_records_are_shown_with_their_trained_tokens_marked(preview):
    output = preview(RECORDS)
    assert "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n[[Hi<|im_end|>]]\n" in output
    assert "<|im_start|>user\nTranslate\n\nHallo<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\n" in output


def test_control_characters_are_escaped(preview):
    output = preview(RECORDS)
    assert "\x1b" not in output and "Say \\x1b[2J it" in output


def test_counts_by_hand(preview):
    """The answer of the fourth record is longer than a block, and the prompt of the fifth loses its beginning."""
    rows = rows_of(preview(RECORDS))
    assert rows["records"] == "5 (alpaca, recognised by their keys)"
    assert rows["dropped"].startswith("1 records of ")
    assert rows["cut"].startswith("1 records, by ")
    assert rows["template"] == "the tokenizer's chat template"
    assert rows["end token"] == "<|im_end|>, trained: yes"
    tokens, longest = (int(rows[name].split()[0].replace(",", "")) for name in ("tokens", "longest"))
    assert 48 < longest < tokens


def test_the_trained_share_follows_train_on(preview):
    share = {
        on: float(rows_of(preview(RECORDS[:2], "--set", f"data.train_on={on}"))["trained"].split()[0])
        for on in ("assistant", "all")
    }
    # 15 and 19 tokens: the answer and its end are trained; then all but each record's first token
    assert 0 < share["assistant"] < 30 and share["all"] > 90


def test_a_stated_format_is_not_called_recognised(preview):
    assert rows_of(preview(RECORDS, "--set", "data.format=alpaca"))["records"] == "5 (alpaca)"


def test_held_out_records_are_counted_by_themselves(preview):
    rows = rows_of(preview(RECORDS[:3] * 4, "--set", "data.eval_split=0.25"))
    assert rows["records"].startswith("9 ") and rows["evaluation"].startswith("3 alpaca records")


def test_the_files_of_a_folder_are_named_and_equal_records_counted(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    for name, records in [
        ("a.jsonl", RECORDS[:3]),
        ("b.jsonl", RECORDS[3:]),
        ("test.jsonl", RECORDS[1:2]),
        (".a.jsonl", RECORDS),
    ]:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--config", "configs/instruct.yaml", "--dataset", str(tmp_path), "--set", "data.eval_split=test"]
    train_qlora.main(["--preview", *flags])
    rows = rows_of(capsys.readouterr().out)
    assert rows["files"] == "2 (a.jsonl, b.jsonl)" and rows["eval files"] == "1 (test.jsonl)"
    assert rows["left out"] == "1 hidden (.a.jsonl)" and rows["records"].startswith("5 ")
    assert rows["overlap"].startswith("1 of 1 evaluation records are trained on, too")


def test_tools_keys_that_are_not_used_and_the_template_are_shown(preview, tmp_path):
    record = RECORDS[0] | {"id": 7, "tools": [{"name": "look_up", "parameters": {}}]}
    (tmp_path / "own.jinja").write_text(template())
    output = preview([record], "--set", f"data.chat_template={tmp_path / 'own.jinja'}")
    rows = rows_of(output)
    assert (rows["tools"], rows["not used"]) == ("in 1 records", "id")
    assert rows["template"] == f"{tmp_path / 'own.jinja'} (data.chat_template)"
    assert '"look_up"' in output.partition("records")[0]


def test_running_text_is_shown_as_blocks(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    train_qlora.main(["--preview", "--config", "configs/tiny.yaml"])
    output = capsys.readouterr().out
    assert output.startswith("Block 1\n \n[[ = Tides = \n")  # the first token of a block is predicted from nothing
    rows = rows_of(output)
    assert rows["documents"] == "37 (rows joined at ' = Title = ' lines)"
    assert rows["separator"] == "<|endoftext|> after each document, trained: yes"


def test_a_mistake_in_a_record_is_one_problem_with_its_line(preview):
    with pytest.raises(UserError) as caught:
        preview([*RECORDS, {"instruction": "x", "output": 7}])
    (problem,) = caught.value.lines
    assert "records.jsonl: line 6: output holds int, expected text. " in problem


def test_lengths_are_counted_in_equal_steps_and_above_the_limit():
    lines = [line.split() for line in draw_histogram(np.array([1, 8, 9, 64, 65, 900]), 64)]
    assert [line[:4] for line in lines[1:3]] == [["1", "-", "8", "2"], ["9", "-", "16", "1"]]
    assert lines[-2][3] == "1" and lines[-1][:4] == ["more", "than", "64", "2"]
    assert len(lines) == 1 + 8 + 1


def test_on_a_terminal_trained_tokens_are_coloured_instead(preview, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system="standard", width=100)
    monkeypatch.setattr(cli, "results_console", lambda: terminal)
    assert preview(RECORDS) == ""
    assert "[[" not in screen.getvalue()
    assert "\x1b[32mHi<|im_end|>" in screen.getvalue()


@pytest.mark.slow
def test_ten_thousand_records_take_seconds_and_no_weights(root, tmp_path):
    """About 7 s of processor time, which unlike the time on the clock does not depend on what else runs."""
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for number in range(10_000):
            file.write(
                json.dumps({"prompt": f"What is {number} + 1?", "completion": f"{number + 1}, of course. " * (number % 20 + 1)})
                + "\n"
            )
    code = (
        "import sys, train_qlora; train_qlora.main(sys.argv[1:]);"
        "print(sorted({'peft', 'bitsandbytes', 'matplotlib'} & set(sys.modules)))"
    )
    flags = ["--preview", "--config", "configs/tiny.yaml", "--dataset", str(path)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
