"""Choose the local files to train on and to evaluate on.

A folder is read like a data set of the Hub: a word in a file's path says which split the file belongs to, and a file without such
a word is trained on. A file that data.eval_split names is never trained on, and other splits are left out. A file that was named
itself is trained on, whatever its name.
"""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from qlora_kit.config import DataSettings
from qlora_kit.data.folder import TWICE, LeftOut, LocalFile, describe_left_out, list_files, name_files
from qlora_kit.errors import UserError
from qlora_kit.model.hub import FILE_SUFFIXES, is_local

# The words by which the `datasets` library knows the splits, and the characters that may stand beside such a word.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
BORDER = "-._ 0-9"


def _compile_word(word: str) -> re.Pattern[str]:
    return re.compile(f"(?<![^{BORDER}])(?:{word})(?![^{BORDER}])", re.IGNORECASE)


SPLIT_WORD = _compile_word("|".join(word for words in SPLITS.values() for word in words))


class LocalFiles(NamedTuple):
    """The files to train on and to evaluate on, by the name in data.dataset or data.eval_split; and those left out."""

    train: dict[str, list[Path]]
    evaluation: dict[str, list[Path]]
    left_out: LeftOut


def is_file_name(eval_split: str) -> bool:
    """Return whether data.eval_split names a file or is written as a path; else it is a split, even if a folder has its name."""
    looks_like_path = "/" in eval_split or eval_split.startswith(("~", ".")) or eval_split.lower().endswith(FILE_SUFFIXES)
    return looks_like_path or os.path.isfile(eval_split)


def choose_files(data: DataSettings, key: str = "data.dataset") -> LocalFiles:
    """Return the local files of a run, each once.

    Args:
        key: the flag or config key of the data set, for messages.

    Raises:
        UserError: as list_files; or there is no file to train on, or none of the split that data.eval_split names.
    """
    left_out: LeftOut = defaultdict(list)
    found = {name: list_files(name, key, left_out) for name in data.names if is_local(name)}
    evaluation = _choose_evaluation(data, found, left_out)
    evaluated = {file.target for files in evaluation.values() for file in files}
    train: dict[str, list[Path]] = {}
    trained: set[str] = set()
    for name, files in found.items():
        mine = [file for file in _find_training(files, data.train_split) if file.target not in evaluated]
        train[name] = [file.path for file in mine if file.target not in trained]
        left_out[TWICE] += [file.path for file in mine if file.target in trained]
        trained |= {file.target for file in mine}
    used = trained | evaluated
    for name, files in found.items():
        others = [file for file in files if file.target not in used]
        for file in others:
            left_out[f"of split {' and '.join(sorted(find_split_words(file))) or 'unknown'}"].append(file.path)
        if len(others) == len(files):
            problem = f"has no file to train on (left out: {describe_left_out(left_out, Path(name))})"
            raise UserError(key, name, problem, "name the files themselves, or their split with data.train_split")
    if evaluated and not trained and len(found) == len(set(data.names)):
        problem = "leaves no file to train on, for it names all that data.dataset has"
        raise UserError("data.eval_split", data.eval_split, problem, "use a share (--set data.eval_split=0.1), or another file")
    left_out[TWICE] += [Path(name) for number, name in enumerate(data.names) if name in data.names[:number]]
    return LocalFiles(train, {name: [file.path for file in files] for name, files in evaluation.items()}, left_out)


def _choose_evaluation(data: DataSettings, found: dict[str, list[LocalFile]], left_out: LeftOut) -> dict[str, list[LocalFile]]:
    split, several = data.eval_split, len(data.names) > 1
    if not isinstance(split, str) or split == data.train_split:  # a share, or the training data themselves
        return {}
    if is_file_name(split):
        return {split: list_files(split, "data.eval_split", left_out)}
    candidates = [file for files in found.values() for file in files if several or not file.is_named]
    chosen = find_split(candidates, split)
    if found and not chosen and len(found) == len(set(data.names)):
        folders = [name for name, files in found.items() if not files[0].is_named]
        others = sorted({word for file in candidates for word in find_split_words(file)} - SPLITS["train"])
        problem = f"is a named split, which {', '.join(folders) or 'a local source'} does not have"
        remedy = ["a share (--set data.eval_split=0.1)", "another file", "or null for no evaluation"]
        raise UserError("data.eval_split", split, problem, f"use {', '.join(others + remedy)}")
    once = {file.target: file for file in reversed(chosen)}  # the first of several paths
    return {name: [file for file in files if once.get(file.target) is file] for name, files in found.items()}


def find_split_words(file: LocalFile) -> set[str]:
    """Return the words that say a file's split: those in the names of its folders, else those in its own name."""
    of_folders = [word for part in file.inside.parent.parts for word in SPLIT_WORD.findall(part)]
    return {word.lower() for word in of_folders or SPLIT_WORD.findall(file.inside.name)}


def _find_training(files: list[LocalFile], split: str) -> list[LocalFile]:
    """Return the files that are of the split `split`, were named themselves or, for the split `train`, name no split."""
    if split.lower() in SPLITS["train"]:
        return [file for file in files if file.is_named or not (words := find_split_words(file)) or words & SPLITS["train"]]
    of_split = set(find_split(files, split))
    return [file for file in files if file.is_named or file in of_split]


def find_split(files: list[LocalFile], split: str) -> list[LocalFile]:
    """Return the files with the word `split` in their path; if there are none, those with another word for the same split."""
    group = next((words for words in SPLITS.values() if split.lower() in words), None)
    if group is None:  # a name of the user's own
        word = _compile_word(re.escape(split))
        return [file for file in files if any(map(word.search, file.inside.parts))]
    exact = [file for file in files if split.lower() in find_split_words(file)]
    return exact or [file for file in files if find_split_words(file) & group]


def describe_files(data: DataSettings) -> list[tuple[str, str]]:
    """Return rows, of a name and a text, about the files of local folders and lists; none for a single file or the Hub."""
    chosen = choose_files(data)
    folders = [name for name in chosen.train if os.path.isdir(os.path.expanduser(name))]
    if not folders and not any(chosen.left_out.values()):
        return []
    base = Path(os.path.expanduser(folders[0])) if len(data.names) == 1 else None
    lists = [("files", chosen.train), ("eval files", chosen.evaluation)]
    paths = {name: [path for files in by_name.values() for path in files] for name, by_name in lists}
    rows = [(name, f"{len(some):,} ({name_files(some, base)})") for name, some in paths.items() if some]
    left_out = describe_left_out(chosen.left_out, base)
    return [*rows, ("left out", left_out)] if left_out else rows
