"""Run the Python snippets of each page in docs/, in their order and in one process per page."""

import re
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("assets", "configs", "samples", "config.yaml")  # what snippets read, by its path in the repository
SNIPPETS = {
    page: re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for page in sorted((ROOT / "docs").glob("*.md"))
}


def test_there_are_snippets_to_run():
    assert sum(map(len, SNIPPETS.values())) > 4


@pytest.mark.parametrize("page", [page for page, snippets in SNIPPETS.items() if snippets], ids=lambda page: page.stem)
def test_snippets_run_in_order(page, tmp_path):
    for name in NEEDED:
        (tmp_path / name).symlink_to(ROOT / name)
    result = forked.run(["-c", "\n".join(SNIPPETS[page])], cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
