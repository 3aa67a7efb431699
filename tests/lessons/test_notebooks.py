"""Test the course in both languages: it runs, says the same with the same code, and its exercises can be done."""

import ast
import importlib
import io
import json
import platform
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from finetuning_lessons import advice, exercises, words
from finetuning_lessons.lesson import LESSONS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "finetuning_lessons"
NOTEBOOKS = {"en": FOLDER / "finetuning_techniques.ipynb", "zh-TW": FOLDER / "finetuning_techniques.zh-TW.ipynb"}
EXERCISES = range(1, 8)
DRAWS = re.compile(
    r"^(?:losses = |results = )?(?:run|visualize_\w+|compare_lora_ranks|simple_lora_training_loop)\(", re.MULTILINE
)
CHINESE = re.compile(r"[\u4e00-\u9fff]")

in_each_language = pytest.mark.parametrize("language", NOTEBOOKS)


@pytest.fixture
def spoken(language):
    """Let the lessons speak the language of a notebook during a test."""
    words.choose(language)
    yield language
    words.choose("en")


def cells(language: str, kind: str) -> list[dict]:
    notebook = json.loads(NOTEBOOKS[language].read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def sources(language: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(language, kind)]


def texts(cell: dict) -> str:
    """Return what a cell printed or displayed as Markdown."""
    outputs = cell["outputs"]
    shown = [
        output["text"] if output["output_type"] == "stream" else output["data"].get("text/markdown", "") for output in outputs
    ]
    return "".join("".join(lines) for lines in shown)


def printed(language: str) -> str:
    return "".join(map(texts, cells(language, "code")))


@pytest.mark.slow
@in_each_language
def test_runs_from_top_to_bottom_in_six_minutes(language, tmp_path):
    import resource

    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path / "finetuning_techniques"  # keeps pictures out of the repository
    folder.mkdir()
    for package in ("finetuning_lessons", "qlora_kit"):
        (tmp_path / package).symlink_to(ROOT / package)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = nbformat.read(NOTEBOOKS[language], as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time leaves out other programs.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 360
    assert {path.stem for path in (folder / "output_lessons").iterdir()} == set(LESSONS)


@in_each_language
def test_is_kept_with_the_outputs_of_one_run(language):
    code = cells(language, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    for cell in code:
        draws = bool(DRAWS.search("".join(cell["source"])))
        assert draws == any("image/png" in output.get("data", {}) for output in cell["outputs"]), cell["source"]


@in_each_language
def test_is_small_and_names_no_place_of_the_machine_it_ran_on(language):
    assert NOTEBOOKS[language].stat().st_size < 675_000
    shown = json.dumps(
        [output.get("data", {}).get("text/html") for cell in cells(language, "code") for output in cell["outputs"]]
    )
    text = printed(language) + shown
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users)\b|[A-Z]:\\\\", text) == []
    assert platform.node() not in text


def without_words(source: str) -> str:
    """Return code without its comments and strings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            values = value if isinstance(value, list) else [value]
            blank = [
                ast.Constant("") if isinstance(one, ast.JoinedStr | ast.Constant) and not _is_number(one) else one
                for one in values
            ]
            setattr(node, name, blank if isinstance(value, list) else blank[0])
    return ast.unparse(tree)


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not isinstance(node.value, str)


def test_both_have_the_same_code_but_for_comments_and_strings():
    english, chinese = (list(map(without_words, sources(language, "code"))) for language in NOTEBOOKS)
    assert english == chinese
    assert len(sources("en", "markdown")) == len(sources("zh-TW", "markdown"))


def test_runs_every_lesson():
    started = re.findall(r"^run\((\w+)\)$", "\n".join(sources("en", "code")), re.MULTILINE)
    assert sorted(started) == sorted(LESSONS)


@in_each_language
def test_has_the_seven_parts_in_order(language):
    parts = re.findall(r"^## Part (\d)", "\n".join(sources(language, "markdown")), re.MULTILINE)
    assert parts == list("1234567")


def test_each_lesson_concludes_in_chinese():
    for cell in cells("zh-TW", "code"):
        if "".join(cell["source"]).splitlines()[-1].startswith("run("):
            sentences = [line for line in re.split("[。\n]", texts(cell)) if len(CHINESE.findall(line)) > 8]
            assert sentences, cell["source"]


def test_chinese_sets_percent_without_a_space():
    assert re.findall(r"\d %", printed("zh-TW") + "".join(sources("zh-TW", "markdown"))) == []


@in_each_language
@pytest.mark.parametrize("name", ["memory", "formats"])
def test_output_is_what_the_lesson_prints_today(name, spoken, tmp_path):
    """These two lessons measure no time; the outputs of others differ a little from run to run."""
    with redirect_stdout(io.StringIO()) as shown:
        lesson = importlib.import_module(f"finetuning_lessons.{name}")
        lesson.main(["--output_dir", str(tmp_path), "--language", spoken])
    text = shown.getvalue().partition("圖中文字")[0]  # explains English labels, where no font has Chinese ones
    if name == "formats":  # rich displays the records above its first table as HTML in a notebook
        text = text[text.index(words.text("One question and its answer", "一個問題與回答")) :]
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and str(tmp_path) not in line]
    kept = {line.rstrip() for line in printed(spoken).splitlines()}
    assert lines and [line for line in lines if line not in kept] == []


@in_each_language
def test_summary_is_computed_from_what_is_stored_today(spoken):
    assert advice.table_of_claims() in printed(spoken)
    assert advice.practical_advice() in printed(spoken)


def test_summary_has_the_same_figures_in_both_languages():
    figures = {}
    for language in NOTEBOOKS:
        words.choose(language)
        figures[language] = set(re.findall(r"\d[\d.,]*\d", advice.table_of_claims() + advice.practical_advice())) - {
            "6.74",
            "67.4",
        }
    words.choose("en")
    assert len(figures["en"]) > 40
    assert figures["en"] == figures["zh-TW"]


@in_each_language
@pytest.mark.parametrize("number", EXERCISES)
def test_exercise_is_open_and_its_folded_answer_is_right(number, spoken, capsys):
    [cell] = [cell for cell in cells(spoken, "code") if f"exercises.check_{number}(" in "".join(cell["source"])]
    assert texts(cell).startswith("…")
    answers = [re.search(r"<details>.*?```python\n(.*?)```", source, re.DOTALL) for source in sources(spoken, "markdown")]
    [answer] = [found[1] for found in answers[:] if found][number - 1 : number]
    names = {"torch": torch}
    exec(answer, names)
    last = "".join(cell["source"]).splitlines()[-1]
    exec(last, names | {"exercises": exercises})
    assert capsys.readouterr().out.startswith("✓")


def test_commands_are_ones_that_the_documents_give():
    text = "\n".join(sources("en", "markdown"))
    commands = re.findall(r"^(?:python|make|pip) .*$", text, re.MULTILINE) + re.findall(r"`(python [^`]*)`", text)
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert commands and [command for command in commands if command not in pages and "NAME" not in command] == []


@in_each_language
def test_links_lead_to_files(language):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", "\n".join(sources(language, "markdown")))
    assert links and [link for link in links if not (FOLDER / link).exists()] == []
