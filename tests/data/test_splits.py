"""Which files of a folder, or of a list, are trained on, evaluated on, or neither."""

from pathlib import Path

import pytest
from datasets.data_files import get_data_patterns, resolve_pattern

from qlora_kit.config import DataSettings
from qlora_kit.data.splits import choose_files, describe_files, is_file_name
from qlora_kit.errors import UserError
from tests.data.builders import data_settings

ALL = ["a.jsonl", "train.jsonl", "val.jsonl", "test.jsonl"]


@pytest.fixture
def folder(write, tmp_path):
    """Return a function that makes a folder of these files, and gives it."""

    def folder(*names: str, at: str = "data") -> Path:
        for name in names:
            write(f"{at}/{name}", name)
        return tmp_path / at

    return folder


def chosen_from(*sources: Path | str, **changes) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Return the names of the files to train on, to evaluate on, and left out by the reason."""
    data = DataSettings(**{"dataset": [str(source) for source in sources], "subset": None, "eval_split": None, **changes})
    chosen = choose_files(data)
    train, evaluation = ([path.name for paths in some.values() for path in paths] for some in chosen[:2])
    left_out = {reason: [path.name for path in paths] for reason, paths in chosen.left_out.items() if paths}
    return train, evaluation, left_out


def problem_of(*sources: Path | str, **changes) -> str:
    with pytest.raises(UserError) as caught:
        chosen_from(*sources, **changes)
    (line,) = caught.value.lines
    return line


NAMES = """
train.jsonl training.jsonl my_train.jsonl train-00000-of-00001.parquet trainer.jsonl a.jsonl data.csv
test.jsonl latest.jsonl contest.jsonl my_test.jsonl my-test-2.jsonl test-00000-of-00001.parquet test.v2.jsonl testing.csv
tests.csv eval.json evaluation.json evals.json medieval.txt x.eval.txt val.jsonl valid.jsonl validation.jsonl validate.jsonl
interval.jsonl dev.jsonl devil.jsonl dev0.jsonl 0dev.jsonl developer.jsonl testüber.jsonl test/a.jsonl tests/a.jsonl
my_test/deep/a.jsonl deep/test-2/a.jsonl validation/train.jsonl train/test.jsonl train/a.jsonl latest/a.jsonl deep/val.jsonl
v1.0-dev/a.jsonl data/test-00000-of-00002.parquet data/train-00000-of-00002.parquet
""".split()


@pytest.mark.parametrize("name", [*NAMES, "en dev.jsonl", "my test/a b.jsonl"])
def test_a_split_is_recognised_as_the_datasets_library_does(folder, name):
    """Of a folder with this file alone; there a file without a split belongs to `train`, too."""
    patterns = get_data_patterns(str(folder(name)))
    splits = [str(split) for split, some in patterns.items() for pattern in some if _matches(pattern, folder())]
    (split,) = set(splits)
    train, evaluation, left_out = chosen_from(folder(name, "other.jsonl"), eval_split=0.1)
    assert (Path(name).name in train) == (split == "train")
    assert evaluation == [] and ([Path(name).name] in left_out.values()) == (split != "train")
    if split != "train":
        assert chosen_from(folder(), eval_split=split)[1] == [Path(name).name]


def _matches(pattern: str, folder: Path) -> bool:
    try:
        return bool(resolve_pattern(pattern, str(folder)))
    except FileNotFoundError:
        return False


def test_capitals_make_no_difference(folder):
    assert chosen_from(folder("Train.jsonl", "TEST.jsonl", "Dev/A.jsonl"))[::2] == (
        ["Train.jsonl"],
        {"of split dev": ["A.jsonl"], "of split test": ["TEST.jsonl"]},
    )


@pytest.mark.parametrize(
    ("eval_split", "evaluated", "left_out"),
    [
        (0.1, [], ["test.jsonl", "val.jsonl"]),
        (None, [], ["test.jsonl", "val.jsonl"]),
        ("validation", ["val.jsonl"], ["test.jsonl"]),
        ("dev", ["val.jsonl"], ["test.jsonl"]),
        ("test", ["test.jsonl"], ["val.jsonl"]),
        ("train", [], ["test.jsonl", "val.jsonl"]),  # the training data themselves
    ],
)
def test_other_splits_are_left_out(folder, eval_split, evaluated, left_out):
    train, evaluation, others = chosen_from(folder(*ALL), eval_split=eval_split)
    assert train == ["a.jsonl", "train.jsonl"] and evaluation == evaluated
    assert sorted(name for names in others.values() for name in names) == left_out


def test_the_word_itself_comes_before_another_for_the_same_split(folder):
    for word in ("eval", "test"):
        _, evaluation, left_out = chosen_from(folder("a.jsonl", "eval.jsonl", "test.jsonl"), eval_split=word)
        (other,) = {"eval", "test"} - {word}
        assert evaluation == [f"{word}.jsonl"] and left_out == {f"of split {other}": [f"{other}.jsonl"]}


def test_a_split_may_have_a_name_of_its_own(folder):
    data = folder("train_sft-0.jsonl", "train_gen-0.jsonl", "holdout.jsonl", "sub/holdout/b.jsonl", "holdouts.jsonl")
    train, evaluation, _ = chosen_from(data, eval_split="holdout")
    assert evaluation == ["holdout.jsonl", "b.jsonl"] and "holdouts.jsonl" in train
    assert chosen_from(data, train_split="train_sft")[0] == ["train_sft-0.jsonl"]
    assert chosen_from(folder(*ALL, at="b"), train_split="test", eval_split="train")[:2] == (["test.jsonl"], ["train.jsonl"])


def test_a_file_that_is_named_for_evaluation_is_not_trained_on(folder, tmp_path):
    data = folder("a.jsonl", "b.jsonl", "sub/c.jsonl")
    (tmp_path / "link.jsonl").symlink_to(data / "b.jsonl")
    for name in (data / "b.jsonl", tmp_path / "link.jsonl"):
        assert chosen_from(data, eval_split=str(name)) == (["a.jsonl", "c.jsonl"], [name.name], {})
    assert chosen_from(data, eval_split=str(data / "sub"))[:2] == (["a.jsonl", "b.jsonl"], ["c.jsonl"])
    assert chosen_from(data / "a.jsonl", data / "b.jsonl", eval_split=str(data / "b.jsonl"))[:2] == (["a.jsonl"], ["b.jsonl"])


@pytest.mark.parametrize(
    ("source", "eval_split"), [("data", "data/a.jsonl"), ("data/a.jsonl", "data/a.jsonl"), ("data", "data/"), ("tests", "test")]
)
def test_evaluation_that_leaves_nothing_to_train_on_is_one_problem(folder, monkeypatch, source, eval_split):
    folder("test.jsonl", at="tests")
    monkeypatch.chdir(folder("a.jsonl").parent)
    assert problem_of(source, eval_split=eval_split).startswith(f"data.eval_split: {eval_split}: leaves no file to train on")


def test_a_folder_of_test_files_alone_is_one_problem(folder):
    problem = problem_of(folder("test.jsonl", "sub/val.jsonl", "README.md"), eval_split=0.1)
    left_out = "1 card (README.md); 1 of split val (sub/val.jsonl); 1 of split test (test.jsonl)"
    assert f"data: has no file to train on (left out: {left_out}). " in problem and "data.train_split" in problem


def test_a_split_that_no_folder_has_is_one_problem_with_those_that_are_there(folder):
    data, plain = folder("a.jsonl", "test.jsonl", "dev/b.jsonl", "train.jsonl"), folder("a.jsonl", at="b")
    problem = problem_of(plain, eval_split="validation")
    assert f"is a named split, which {plain} does not have. Use a share (--set data.eval_split=0.1), another file, " in problem
    assert "Use dev, test, a share" in problem_of(data, eval_split="holdout")


def test_a_single_file_has_no_split_whatever_its_name(folder):
    data = folder("validation.jsonl", "test.jsonl")
    assert chosen_from(data / "test.jsonl", eval_split=0.1) == (["test.jsonl"], [], {})
    problem = problem_of(data / "validation.jsonl", eval_split="validation")
    assert "validation: is a named split, which a local source does not have. Use a share" in problem


def test_lists_work_in_the_same_way(folder):
    one, other = folder("train.jsonl", "val.jsonl", at="one"), folder("a.jsonl", "test.jsonl", at="two")
    extra = folder("tests.jsonl", at="three") / "tests.jsonl"
    train, evaluation, left_out = chosen_from(one, other, extra, eval_split="validation")
    assert train == ["train.jsonl", "a.jsonl", "tests.jsonl"] and evaluation == ["val.jsonl"]
    assert left_out == {"of split test": ["test.jsonl"]}
    assert chosen_from(one / "train.jsonl", one / "val.jsonl", eval_split="validation")[:2] == (["train.jsonl"], ["val.jsonl"])
    assert chosen_from(one / "train.jsonl", one / "val.jsonl")[0] == ["train.jsonl", "val.jsonl"]  # they were named
    assert chosen_from("Salesforce/wikitext", one, eval_split="validation")[:2] == (["train.jsonl"], ["val.jsonl"])
    assert chosen_from("Salesforce/wikitext", extra, eval_split="validation")[:2] == (["tests.jsonl"], [])


def test_a_file_that_is_reached_twice_is_used_once(folder, tmp_path):
    data = folder("a.jsonl", "test.jsonl")
    (tmp_path / "again").symlink_to(data)
    twice = {"named or linked twice": ["a.jsonl"]}
    assert chosen_from(data / "a.jsonl", data / "a.jsonl") == (["a.jsonl"], [], twice)
    assert chosen_from(data / "a.jsonl", str(data / "." / "a.jsonl").replace("/a.", "/./a.")) == (["a.jsonl"], [], twice)
    assert chosen_from(data, data / "a.jsonl", eval_split="test") == (["a.jsonl"], ["test.jsonl"], twice)
    assert chosen_from(data, tmp_path / "again", eval_split="test") == (["a.jsonl"], ["test.jsonl"], twice)
    assert chosen_from(data, data / "test.jsonl")[::2] == (["a.jsonl", "test.jsonl"], {})  # it was named


@pytest.mark.parametrize(
    ("name", "is_file"),
    [("validation", False), ("a.b", False), ("my.jsonl", True), ("./x", True), ("~/x", True), ("a/b", True), ("V.TXT", True)],
)
def test_a_path_is_told_from_a_split(name, is_file):
    assert is_file_name(name) == is_file


def test_the_files_are_described_by_number_and_name(folder):
    data = folder(*ALL, ".x.jsonl", "README.md", *(f"more/{number}.jsonl" for number in range(10)))
    rows = dict(describe_files(data_settings(data, eval_split="validation")))
    more = ", ".join(f"more/{number}.jsonl" for number in range(9))
    assert rows["files"] == f"12 (a.jsonl, {more} and 2 more)"
    assert rows["eval files"] == "1 (val.jsonl)"
    assert rows["left out"] == "1 hidden (.x.jsonl); 1 card (README.md); 1 of split test (test.jsonl)"
    assert describe_files(data_settings(data / "a.jsonl")) == describe_files(DataSettings()) == []
