"""Check that every lesson answers --help, refuses a folder it cannot create, prints a table and writes its picture."""

import importlib
import subprocess
import time
from pathlib import Path

import pytest

from finetuning_lessons.lesson import PRINTED_WIDTH, create_parser, open_folder, print_table, print_text
from qlora_kit.errors import UserError
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"__init__", "course", "lesson", "memory_charts", "short_run"}
LESSONS = sorted(path.stem for path in (ROOT / "finetuning_lessons").glob("*.py") if path.stem not in SHARED)
# Smaller settings, and a model of two layers, so that all lessons run with the other tests; the marker slow runs them whole.
SHORT: dict[str, dict[str, object]] = {
    "layers": {"STEPS": 2},
    "attention": {"STEPS": 1, "SEEDS": (0,), "HELD_OUT": 4},
    "quantization": {"EVALUATED": 2},
    "qlora": {"STEPS": 1, "HELD_OUT": 2},
    "methods": {"STEPS": 1, "TIMED": 1},
    "rank_study": {"STEPS": 1, "FIT_STEPS": 1, "TIMED": 1},
    "gradient_checkpointing": {"LENGTHS": (16, 32), "TIMED_TOKENS": 1},
    "paged_optimizer": {"STEPS": 1},
}
WHOLE = {"training_loop"}  # starts train_qlora.py, which takes seconds however little it trains


@pytest.mark.parametrize("name", LESSONS)
def test_help_says_what_the_lesson_is(name, capsys):
    lesson = importlib.import_module(f"finetuning_lessons.{name}")
    with pytest.raises(SystemExit) as ended:
        lesson.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"usage: python -m finetuning_lessons.{name}" in text and "--output_dir" in text
    assert lesson.__doc__.splitlines()[0] in " ".join(text.split())


def check_run(name: str, folder: Path, capsys) -> None:
    importlib.import_module(f"finetuning_lessons.{name}").main(["--output_dir", str(folder)])
    (picture,) = folder.iterdir()
    assert picture.name == f"{name}.png" and picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"picture  {picture}" in printed
    assert "nan" not in printed.split()
    assert max(len(line) for line in printed.splitlines()) <= 130


LONGER = ("layers", "methods", "paged_optimizer", "rank_study")  # seconds each; the slow test below runs them as they are


@pytest.mark.parametrize("name", [name for name in LESSONS if name not in (*WHOLE, *LONGER)])
def test_lesson_prints_a_table_and_writes_its_picture(name, tmp_path, capsys, monkeypatch, two_layers_dir):
    monkeypatch.setattr("finetuning_lessons.short_run.HELD_OUT", 2)
    for module in ("lesson", name):
        monkeypatch.setattr(f"finetuning_lessons.{module}.TINY_MODEL", two_layers_dir, raising=False)
    for setting, value in SHORT.get(name, {}).items():
        monkeypatch.setattr(f"finetuning_lessons.{name}.{setting}", value)
    check_run(name, tmp_path / "new" / "folder", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_whole_lesson_takes_less_than_a_minute(name, tmp_path, capsys):
    start = time.process_time()  # leaves out other programs
    check_run(name, tmp_path / "pictures", capsys)
    assert time.process_time() - start < 60


def test_run_as_a_command_a_wrong_folder_is_one_line():
    result = forked.run(["-m", "finetuning_lessons.layers", "--output-dir", "README.md/pictures"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: --output_dir: README.md/pictures: cannot be created (Not a directory). Use another folder.\n"
    )


def test_a_file_with_the_name_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir: .*file: cannot be created"):
        open_folder(tmp_path / "file")


def test_git_ignores_the_pictures():
    folder = create_parser("", "layers").parse_args([]).output_dir
    assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/layers.png"], cwd=ROOT).returncode == 0


def test_table_is_plain_columns_when_piped(capsys):
    print_table("Sizes", ["rank", "parameters"], [["8", "1,024"], ["all", "[bold]"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["Sizes", "rank  parameters", "8          1,024", "all       [bold]", ""]


def test_a_number_and_its_percent_sign_stay_on_one_line(capsys):
    print_text("a" * (PRINTED_WIDTH - len(" 10 to 20")) + " 10 to 20 %")
    assert capsys.readouterr().out.splitlines()[1] == "20 %"
