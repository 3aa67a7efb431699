"""Check that the English and the Traditional Chinese texts have the same headings, commands, code, links and figures."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COURSE = "finetuning_lessons/finetuning_techniques"
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
UNITS = {"million": 10**6, "billion": 10**9, "M": 10**6, "萬": 10**4, "億": 10**8}  # words for large numbers


def course(suffix: str) -> list[dict]:
    return json.loads((ROOT / f"{COURSE}{suffix}.ipynb").read_text(encoding="utf-8"))["cells"]


def text(cells: list[dict]) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def page(name: str) -> tuple[str, ...]:
    return tuple((ROOT / f"{name}{suffix}.md").read_text(encoding="utf-8") for suffix in ("", ".zh-TW"))


PAIRS = {
    "README": page("README"),
    **{name: page(f"docs/{name}") for name in ("how_it_works", "why_qlora", "faq", "experiments")},
    "course": (text(course("")), text(course(".zh-TW"))),
}
both = pytest.mark.parametrize(("english", "chinese"), PAIRS.values(), ids=PAIRS)


def sections(text: str) -> list[tuple[str, str]]:
    """Return the level of each heading and the text below it, without code blocks; text before the first has level ""."""
    parts = re.split(r"^(#+) ", FENCED.sub("", text), flags=re.MULTILINE)
    return list(zip(["", *parts[1::2]], parts[::2], strict=True))


def pictures_and_links(text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)]+)\)", text)
    return sorted(target.replace(".zh-TW", "") for target in targets)


@both
def test_headings_have_the_same_levels_in_the_same_order(english, chinese):
    levels = [level for level, _ in sections(english)]
    assert len(levels) > 2
    assert [level for level, _ in sections(chinese)] == levels


@both
def test_every_heading_is_translated(english, chinese):
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", chinese), re.MULTILINE)
    assert [heading for heading in headings if not re.search(r"[\u4e00-\u9fff]", heading)] == []


@both
def test_commands_and_code_blocks_are_the_same(english, chinese):
    """Pictures and answers in the course have translated words, so only commands are compared there."""
    fenced = [
        [b for b in FENCED.findall(text) if text not in PAIRS["course"] or b.startswith("```bash")] for text in (english, chinese)
    ]
    assert fenced[0] == fenced[1]


@both
def test_each_section_names_the_same_code(english, chinese):
    for (_, one), (_, other) in zip(sections(english), sections(chinese), strict=True):
        code = set.symmetric_difference(*({" ".join(c.split()) for c in re.findall(r"`([^`]+)`", part)} for part in (one, other)))
        assert code == set(), one.splitlines()[0]


def in_digits(text: str) -> str:
    """Write out large numbers: 3.5 million and 350 萬 are the same."""
    unit = "|".join(UNITS)
    return re.sub(rf"(\d[\d.]*) ?({unit})(?![A-Za-z])", lambda match: f"{round(float(match[1]) * UNITS[match[2]]):,}", text)


@both
def test_each_section_has_the_same_figures(english, chinese):
    """Compare numbers of two digits or more; smaller ones are words in one of the languages here and there."""
    for (_, one), (_, other) in zip(sections(english), sections(chinese), strict=True):
        texts = (re.sub(r"\[[^]]*\]\([^)]*\)", "", part) for part in (one, other))
        figures = [set(re.findall(r"\d[\d,.]*\d", in_digits(text))) for text in texts]
        assert figures[0] == figures[1], one.splitlines()[0]


@both
def test_links_and_pictures_are_the_same(english, chinese):
    assert pictures_and_links(english) == pictures_and_links(chinese)


@pytest.mark.parametrize(
    "name", ["README.md", "docs/how_it_works.md", "docs/why_qlora.md", "docs/faq.md", "docs/experiments.md", f"{COURSE}.ipynb"]
)
def test_the_other_language_is_one_click_away(name):
    path = ROOT / name
    other = path.with_suffix(f".zh-TW{path.suffix}")
    for here, there in ((path, other), (other, path)):
        assert f"]({there.name})" in "".join(here.read_text(encoding="utf-8")[:1000])
