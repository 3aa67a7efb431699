"""Test the course in both languages: it runs, and both notebooks hold the same outputs of one run."""

import functools
import importlib
import io
import json
import platform
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LESSONS = ROOT / "finetuning_lessons"
ENGLISH = LESSONS / "finetuning_techniques.ipynb"
NOTEBOOKS = [ENGLISH, LESSONS / "finetuning_techniques.zh-TW.ipynb"]
NO_LESSONS = {"__init__", "course", "lesson", "memory_charts", "short_run"}


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def sources(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(path, kind)]


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


@functools.cache
def print_lesson(name: str, folder: str) -> str:
    """Return what a lesson prints; its picture goes to the folder."""
    with redirect_stdout(io.StringIO()) as shown:
        importlib.import_module(f"finetuning_lessons.{name}").main(["--output_dir", folder])
    return shown.getvalue()


def printed(path: Path) -> str:
    return "".join("".join(output["text"]) for output in outputs(path) if output["output_type"] == "stream")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom_in_five_minutes(path, tmp_path):
    import resource

    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path / "finetuning_techniques"  # keeps pictures out of the repository
    folder.mkdir()
    for package in ("finetuning_lessons", "qlora_kit"):
        (tmp_path / package).symlink_to(ROOT / package)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time leaves out other programs.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 300
    assert len(list((folder / "output_lessons").iterdir())) == sum("run(" in source for source in sources(path, "code")) - 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_with_the_outputs_of_one_run(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs(path)} <= {"stream", "execute_result", "display_data"}
    assert {output["name"] for output in outputs(path) if output["output_type"] == "stream"} == {"stdout"}
    for cell in code:
        last = "".join(cell["source"]).splitlines()[-1]
        assert last.startswith("run(") == any("image/png" in output.get("data", {}) for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_small_and_names_no_place_of_the_machine_it_ran_on(path):
    assert path.stat().st_size < 1e6
    text = printed(path) + json.dumps([output.get("data", {}).get("text/html") for output in outputs(path)])
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users)\b|[A-Z]:\\\\", text) == []
    assert platform.node() not in text


def test_both_show_the_same_run():
    assert outputs(ENGLISH) == outputs(NOTEBOOKS[1])


def test_runs_every_lesson():
    started = set(re.findall(r"^run\((\w+)\)$", "\n".join(sources(ENGLISH, "code")), re.MULTILINE))
    assert started == {path.stem for path in LESSONS.glob("*.py")} - NO_LESSONS


def test_has_the_seven_parts_in_order():
    parts = re.findall(r"^## Part (\d)", "\n".join(sources(ENGLISH, "markdown")), re.MULTILINE)
    assert parts == list("1234567")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["memory", "formats"])
def test_output_is_what_the_lesson_prints_today(path, name, tmp_path_factory):
    """These two lessons measure no time; the outputs of others differ a little from run to run."""
    today = print_lesson(name, str(tmp_path_factory.getbasetemp()))
    tables = today.partition("One question and its answer")[2 if name == "formats" else 0]
    lines = [line.rstrip() for line in tables.splitlines() if line.strip() and not line.startswith("picture")]
    kept = {line.rstrip() for line in printed(path).splitlines()}
    assert lines and [line for line in lines if line not in kept] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_measured_figures_of_the_summary_are_in_the_outputs(path):
    summary = sources(path, "markdown")[-1]
    rows = [line.split("|") for line in summary.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    shown = printed(path) + "".join(sources(path, "markdown")[:-1])
    figures = [number for row in rows for number in re.findall(r"(?<![\w-])\d[\d,.]*\d|(?<![\w-])\d(?= %)", row[2])]
    assert len(figures) > 15
    assert [number for number in figures if not re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d])", shown)] == []


def test_commands_are_ones_that_readme_gives():
    text = "\n".join(sources(ENGLISH, "markdown"))
    commands = re.findall(r"^(?:python|make|pip) .*$", text, re.MULTILINE) + re.findall(r"`(python -m \w+\.\w+)`", text)
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert commands and [command for command in commands if command not in pages and "NAME" not in command] == []
