"""Check that every lesson answers --help, refuses a folder it cannot create, prints a table and writes its picture."""

import importlib
import re
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from finetuning_lessons.lesson import (
    LESSONS,
    PRINTED_WIDTH,
    begin,
    create_parser,
    fill,
    finish,
    open_folder,
    picture,
    print_table,
    print_text,
)
from finetuning_lessons.words import choose, find_chinese_font, text
from qlora_kit.errors import UserError
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
# Smaller settings, and a model of two layers; the marker slow runs most of the lessons so, and all of them whole.
SHORT: dict[str, dict[str, object]] = {
    "layers": {"STEPS": 2},
    "attention": {"STEPS": 1, "HELD_OUT": 4},
    "quantization": {"EVALUATED": 2},
    "qlora": {"STEPS": 1, "TIMED": 1},
    "methods": {"STEPS": 1, "TIMED": 1},
    "rank_study": {"STEPS": 1, "TIMED": 1},
    "gradient_checkpointing": {"LENGTHS": (16, 32), "ROUNDS": 1},
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


@pytest.fixture(autouse=True)
def english():
    yield
    choose("en")


def test_the_lessons_are_the_files_that_can_be_started():
    files = [path for path in (ROOT / "finetuning_lessons").glob("*.py") if path.stem != "lesson"]
    assert {path.stem for path in files if "cli.run(main)" in path.read_text(encoding="utf-8")} == set(LESSONS)


def check_run(name: str, folder: Path, capsys, language: str) -> None:
    importlib.import_module(f"finetuning_lessons.{name}").main(["--output_dir", str(folder), "--language", language])
    (path,) = folder.iterdir()
    assert path.name == f"{name}.png" and path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    lines = [line.rstrip() for line in printed.splitlines() if not line.startswith('  "')]  # without JSON
    assert f"{text('picture', '圖片')}  {path}" in lines
    assert "nan" not in re.findall(r"\w+", printed)
    assert [line for line in lines if cell_len(line) > 80 and str(path) not in line] == []
    if name != "formats":  # which prints English records, and takes no time
        assert any(line.startswith("... ") for line in lines)
    if name != "formats" and language != "en":
        assert [line for line in lines if len(re.findall("[a-z]{3,}", line)) > 5 and line.isascii()] == []


QUICK = ("memory", "formats")  # the others take seconds


@pytest.mark.filterwarnings("error:Glyph")  # a Chinese label in a picture that has no font for it
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LESSONS if name not in WHOLE],
)
def test_lesson_prints_a_table_and_writes_its_picture_in_chinese(name, tmp_path, capsys, monkeypatch, two_layers_dir):
    monkeypatch.setattr("finetuning_lessons.short_run.HELD_OUT", 2)
    for module in ("lesson", name):
        monkeypatch.setattr(f"finetuning_lessons.{module}.TINY_MODEL", two_layers_dir, raising=False)
    for setting, value in SHORT.get(name, {}).items():
        monkeypatch.setattr(f"finetuning_lessons.{name}.{setting}", value)
    monkeypatch.setattr("finetuning_lessons.lesson.find_chinese_font", lambda: None)
    check_run(name, tmp_path / "new" / "folder", capsys, "zh-TW")


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_whole_lesson_takes_less_than_a_minute(name, tmp_path, capsys):
    start = time.process_time()  # leaves out other programs
    check_run(name, tmp_path / "pictures", capsys, "en")
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


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_wide_table_wraps_its_words_and_never_a_number(is_terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "80")
    header = ["method", *[f"loss over five seeds, number {number}" for number in range(4)]]
    print_table("Losses", header, [["LoRA on weights in NF4, packed twice", *["0.4123 ± 0.0021"] * 4]])
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= PRINTED_WIDTH and sum(line.count("0.4123 ± 0.0021") for line in lines) == 4


def test_a_number_and_its_percent_sign_stay_on_one_line(capsys):
    print_text("a" * (PRINTED_WIDTH - len(" 10 to 20")) + " 10 to 20 %")
    assert capsys.readouterr().out.splitlines()[1] == "20 %"


def test_chinese_wraps_between_characters_and_keeps_their_punctuation():
    assert fill("記憶體（GiB）\n  需要 5.31 GiB。", 14) == "記憶體（GiB）\n需要\n5.31 GiB。"
    assert fill("一二三四，五", 8) == "一二三\n四，五"


def test_without_a_font_a_chinese_picture_is_labelled_in_english_and_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("finetuning_lessons.lesson.find_chinese_font", lambda: None)
    choose("zh-TW")
    with picture(tmp_path / "a.png") as axes:
        axes.set_xlabel(text("step", "步數"))
        assert axes.get_xlabel() == "step"
    assert text("step", "步數") == "步數"
    printed = capsys.readouterr().out
    assert "step = 步數" in printed and "fonts-noto-cjk" in printed and f"圖片  {tmp_path / 'a.png'}" in printed


@pytest.mark.parametrize(
    "name, known",
    [
        ("NotoSansCJK-Regular.ttc", True),
        ("NotoSansTC[wght].ttf", True),
        ("PingFang.ttc", True),
        ("msjh.ttc", True),
        ("NotoSansCJK-Bold.ttc", False),
        ("NotoSansSC-Regular.otf", False),  # for simplified characters
        ("DejaVuSans.ttf", False),
    ],
)
def test_fonts_for_chinese_are_known_by_their_files(name, known, monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [f"/fonts/{name}"])
    monkeypatch.setattr("matplotlib.font_manager.fontManager.addfont", lambda path: None)
    font = SimpleNamespace(name="some family", fname=f"/fonts/{name}")
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", [font])
    assert find_chinese_font() == ("some family" if known else None)


def test_with_a_font_a_picture_is_labelled_in_chinese(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("finetuning_lessons.lesson.find_chinese_font", lambda: "DejaVu Sans")
    choose("zh-TW")
    with picture(tmp_path / "a.png") as axes:
        assert text("rank", "秩") == "秩" and axes.figure
    assert "fonts" not in capsys.readouterr().out


@pytest.mark.parametrize("language, line", [("en", "next  python -m finetuning_lessons.methods"),
    ("zh-TW", "下一課  python -m finetuning_lessons.methods --language zh-TW")])  # fmt: skip
def test_a_lesson_ends_with_the_next_one_and_shows_its_picture(language, line, tmp_path, capsys, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)) or True)
    flags = ["--output_dir", str(tmp_path), "--language", language]
    finish(begin(create_parser("", "memory"), flags))
    assert capsys.readouterr().out.splitlines() == [line] and opened == []
    finish(begin(create_parser("", "memory"), [*flags, "--show"]))
    assert opened == [(tmp_path / "memory.png").as_uri()]


def test_the_last_lesson_ends_with_a_run_of_the_toolkit(tmp_path, capsys):
    finish(begin(create_parser("", LESSONS[-1]), ["--output_dir", str(tmp_path)]))
    assert capsys.readouterr().out.startswith("try  python train_qlora.py --config configs/")
