"""Find the files of a local folder, without hidden ones and cards; their content is not read here.

Links are followed, and a file that several paths lead to is found once. splits.py chooses among the files.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

from qlora_kit.errors import UserError
from qlora_kit.model.hub import FILE_SUFFIXES

# Cards: notes about the data, and what the Hub and the `datasets` library keep beside them.
NOTES = re.compile(
    r"(readme([-_.].*)?|licen[cs]e([-_.].*)?|copying|citation|notice|changelog|contributing|code_of_conduct|data(set)?[-_]?card)"
    r"\.(md|txt|text|rst)",
    re.IGNORECASE,
)
DESCRIPTIONS = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "dataset-metadata.json",
    "croissant.json", "datapackage.json", "citation.json",
}  # fmt: skip
HIDDEN, CARD, TWICE, OTHER_KIND = "hidden", "card", "named or linked twice", "of a kind that is not read"
NAMES_SHOWN = 10

LeftOut = defaultdict[str, list[Path]]  # files and folders that are left out, by the reason


@dataclass(frozen=True)
class LocalFile:
    """A file of local data.

    Attributes:
        path: where it was found.
        target: the same without links: all paths of one file have one target.
        inside: its path in the folder that was named; its name, if it was named itself.
        is_named: it was named itself.
    """

    path: Path
    target: str
    inside: PurePath
    is_named: bool = False


def list_files(name: str, key: str, left_out: LeftOut | None = None) -> list[LocalFile]:
    """Return a local file, or the files in a folder and in the folders in it, in the order of their paths.

    Args:
        key: the flag or config key that holds `name`, for messages.
        left_out: takes what is left out.

    Raises:
        UserError: it does not exist, cannot be read or has no file of a known kind, or a link in it leads nowhere or in a circle.
    """
    path, left_out = Path(os.path.expanduser(name)), defaultdict(list) if left_out is None else left_out
    if os.path.isfile(path):  # unlike Path.is_file without an error for a name that is too long
        return [LocalFile(path, os.path.realpath(path), PurePath(path.name), is_named=True)]
    if not os.path.exists(path):
        raise UserError(key, name, "does not exist", "use a text file, or a Hub data set such as Salesforce/wikitext")
    if not path.is_dir():
        raise UserError(key, name, "is neither a file nor a folder", "write it to a file")
    try:
        files = _search(path, left_out)
    except _BadLink as error:
        raise UserError(key, name, str(error), "remove or correct the link") from None
    except OSError as error:
        raise UserError(key, name, f"cannot be read ({error.filename}: {error.strerror})", "check its permissions") from None
    if not files:
        others = describe_left_out(left_out, path)
        problem = f"has no {' '.join(FILE_SUFFIXES)} file" + (f" (left out: {others})" if others else "")
        raise UserError(key, name, problem, "add one, or name a file itself" if left_out[HIDDEN] or left_out[CARD] else "add one")
    return files


class _BadLink(Exception):
    """A link leads nowhere or in a circle; the message is a clause."""


class _Folder(NamedTuple):
    path: Path
    inside: PurePath  # its path in the folder that was named
    around: tuple[str, ...]  # that folder, those on the way, and itself, without links


def _search(folder: Path, left_out: LeftOut) -> list[LocalFile]:
    """Return the files in a folder, each by its own path if that is in the folder, else by the path of a link to it."""
    folders = [_Folder(folder, PurePath(), (os.path.realpath(folder),))]
    linked_folders: list[_Folder] = []
    files: dict[str, LocalFile] = {}  # by target
    linked_files: list[LocalFile] = []
    visited: set[str] = set()
    while folders or linked_folders:
        here = folders.pop() if folders else linked_folders.pop(0)
        if here.around[-1] in visited:
            left_out[TWICE].append(here.path)
            continue
        visited.add(here.around[-1])
        for entry in sorted(os.scandir(here.path), key=lambda entry: entry.name):
            path, inside, name = here.path / entry.name, here.inside / entry.name, entry.name
            is_link, is_folder = entry.is_symlink(), os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
            if name.startswith(".") or (is_folder and name.startswith("__")):
                left_out[HIDDEN].append(path)
                continue
            target = _follow(path, here) if is_link else os.path.join(here.around[-1], name)
            if is_folder:
                (linked_folders if is_link else folders).append(_Folder(path, inside, (*here.around, target)))
            elif not name.lower().endswith(FILE_SUFFIXES) or not os.path.isfile(entry):
                left_out[OTHER_KIND].append(path)
            elif NOTES.fullmatch(name) or name.lower() in DESCRIPTIONS:
                left_out[CARD].append(path)
            elif is_link:
                linked_files.append(LocalFile(path, target, inside))
            else:
                files[target] = LocalFile(path, target, inside)
    for file in linked_files:
        if files.setdefault(file.target, file) is not file:
            left_out[TWICE].append(file.path)
    return sorted(files.values(), key=lambda file: file.inside.parts)


def _follow(link: Path, folder: _Folder) -> str:
    """Return where a link in a folder leads; raises _BadLink."""
    target = os.path.realpath(link)
    if not link.exists():
        raise _BadLink(f"holds {link}, a link to {os.readlink(link)}, which does not exist")
    if any(PurePath(around).is_relative_to(target) for around in folder.around):
        raise _BadLink(f"holds {link}, a link to a folder around it, so that it has no end")
    return target


def describe_left_out(left_out: LeftOut, base: Path | None) -> str:
    """Return what is left out in words: the number of files for each reason, and their names."""
    return "; ".join(f"{len(paths):,} {reason} ({name_files(paths, base)})" for reason, paths in left_out.items() if paths)


def name_files(paths: list[Path], base: Path | None) -> str:
    """Return the names of the first NAMES_SHOWN files: their paths in the folder `base` if they are in it."""
    names = [str(path.relative_to(base) if base and path.is_relative_to(base) else path) for path in paths[:NAMES_SHOWN]]
    more = f" and {len(paths) - NAMES_SHOWN:,} more" if len(paths) > NAMES_SHOWN else ""
    # A name may hold a line end, or bytes that are no text.
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in ", ".join(names) + more)
