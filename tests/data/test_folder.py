"""The files of a folder: hidden ones, cards, and links that lead to more files, nowhere or in a circle."""

import os
from collections import defaultdict
from pathlib import Path

import pytest

from qlora_kit.data.folder import NAMES_SHOWN, describe_left_out, list_files, name_files
from qlora_kit.errors import UserError


@pytest.fixture
def folder(write, tmp_path):
    """Return a function that makes a folder of these files, and gives it."""

    def folder(*names: str) -> Path:
        for name in names:
            write(f"data/{name}", name)
        return tmp_path / "data"

    return folder


def names_in(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the files of a folder, and those left out by the reason."""
    left_out = defaultdict(list)
    files = list_files(str(folder), "data.dataset", left_out)
    names = {reason: [str(path.relative_to(folder)) for path in paths] for reason, paths in left_out.items() if paths}
    return [str(file.inside) for file in files], names


def problem_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        list_files(str(folder), "data.dataset")
    (line,) = caught.value.lines
    return line


def test_files_come_in_the_order_of_their_paths(folder):
    names = ["a.txt", "b/a.csv", "b/c/x.json", "b/z.jsonl", "b.md", "c.PARQUET"]
    in_order = sorted(names, key=lambda name: Path(name).parts)
    assert names_in(folder(*reversed(names))) == (in_order, {})


def test_files_of_other_kinds_are_left_out(folder):
    files, left_out = names_in(folder("a.txt", "cover.png", "b/more.jsonl.gz"))
    assert files == ["a.txt"] and left_out == {"of a kind that is not read": ["cover.png", "b/more.jsonl.gz"]}


@pytest.mark.parametrize(
    "name", [".hidden.jsonl", ".ipynb_checkpoints/a.jsonl", "b/.cache/c/a.jsonl", "._a.jsonl", "__MACOSX/a.jsonl", ".git/HEAD"]
)
def test_hidden_files_and_folders_are_left_out(folder, name):
    files, left_out = names_in(folder("a.jsonl", name))
    hidden = Path(*Path(name).parts[: 1 + next(at for at, part in enumerate(Path(name).parts) if part[0] in "._")])
    assert files == ["a.jsonl"] and left_out == {"hidden": [str(hidden)]}


def test_a_hidden_folder_that_is_named_itself_is_read(folder):
    assert [str(file.inside) for file in list_files(str(folder(".own/a.txt") / ".own"), "data.dataset")] == ["a.txt"]


CARDS = """
README.md readme.txt README.zh-TW.md Readme_old.rst LICENSE.txt licence.md LICENSE-MIT.txt COPYING.txt CITATION.md dataset_card.md
datacard.md dataset_infos.json dataset_info.json dataset_dict.json state.json config.json
""".split()


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_left_out(folder, name):
    assert names_in(folder("a.txt", f"b/{name}")) == (["a.txt"], {"card": [f"b/{name}"]})


@pytest.mark.parametrize("name", ["readmes.md", "license plates.txt", "my_readme.md", "citation.jsonl", "README.jsonl"])
def test_files_that_only_sound_like_cards_are_read(folder, name):
    assert names_in(folder(name)) == ([name], {})


def test_links_to_files_and_folders_are_followed(folder, write, tmp_path):
    data = folder("a.txt")
    write("elsewhere/x.txt", "x")
    write("elsewhere/deep/y.txt", "y")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "z.txt").symlink_to(tmp_path / "elsewhere" / "x.txt")
    files, left_out = names_in(data)
    assert files == ["a.txt", "linked/deep/y.txt", "linked/x.txt"] and left_out == {"named or linked twice": ["z.txt"]}


@pytest.mark.parametrize("link", ["aaa", "zzz"])
def test_a_file_that_is_linked_too_has_its_own_path(folder, link):
    """Whichever comes first: the name of its own folder may say that it is a test file."""
    data = folder("test/x.txt", "a.txt")
    (data / link).symlink_to(data / "test")
    (data / f"{link}.txt").symlink_to(data / "test" / "x.txt")
    assert names_in(data)[0] == ["a.txt", "test/x.txt"]


def test_folders_that_link_to_each_other_many_times_are_read_once(folder):
    """Each has two links to the next: 2**20 paths lead to the last."""
    data = folder(*(f"{number}/a.txt" for number in range(20)))
    for number in range(19):
        for name in ("x", "y"):
            (data / str(number) / name).symlink_to(data / str(number + 1))
    assert len(names_in(data)[0]) == 20


@pytest.mark.parametrize("target", [".", "..", "../..", "sub", "/"])
def test_a_link_in_a_circle_is_one_problem(folder, target):
    data = folder("a.txt", "sub/b.txt")
    (data / "sub" / "loop").symlink_to(target if target != "sub" else data / "sub")
    assert problem_of(data).endswith("sub/loop, a link to a folder around it, so that it has no end. Remove or correct the link.")


def test_a_circle_through_another_folder_is_one_problem(folder, tmp_path):
    data = folder("a.txt")
    (tmp_path / "other").mkdir()
    (data / "to").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(data)
    assert "to/back, a link to a folder around it" in problem_of(data)


@pytest.mark.parametrize("target", ["nowhere.txt", "self"])
def test_a_link_that_leads_nowhere_is_one_problem(folder, target):
    data = folder("a.txt")
    (data / "self").symlink_to(target)
    assert f"self, a link to {target}, which does not exist" in problem_of(data)


def test_hidden_links_are_not_followed(folder):
    data = folder("a.txt")
    (data / ".#lock").symlink_to("someone@here.1")
    assert names_in(data) == (["a.txt"], {"hidden": [".#lock"]})


def test_what_is_no_file_is_passed_over(folder):
    data = folder("a.txt")
    os.mkfifo(data / "pipe.txt")
    assert names_in(data)[0] == ["a.txt"]
    assert "pipe.txt: is neither a file nor a folder" in problem_of(data / "pipe.txt")


def test_a_folder_of_cards_says_what_is_left_out(folder):
    problem = problem_of(folder("README.md", "b/state.json"))
    assert ".parquet file (left out: 2 card (README.md, b/state.json)). Add one, or name a file itself." in problem


def test_ten_names_are_shown_in_one_line(tmp_path):
    paths = [tmp_path / f"{number}.txt" for number in range(NAMES_SHOWN + 2)]
    assert name_files(paths, tmp_path) == ", ".join(f"{number}.txt" for number in range(NAMES_SHOWN)) + " and 2 more"
    odd = Path("a\nb\x1b\udce9.txt")
    assert name_files([odd], None) == "a\\nb\\x1b\\udce9.txt"
    assert describe_left_out(defaultdict(list, hidden=paths[:2], card=[]), tmp_path) == "2 hidden (0.txt, 1.txt)"
