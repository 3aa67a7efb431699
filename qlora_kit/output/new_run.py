"""`.new`: what a run puts in place of what its folder holds, whole or not at all.

    .new/training_log.txt, metrics.jsonl, config.yaml, checkpoints/      of a run with --overwrite, from its start
    .new/adapter_model.safetensors, tokenizer, ...                       of every run, at its end
    .new/run.json                                                        is written last: with it the new files are whole

Then they are moved into the folder one by one, run.json last. A process may be killed between any two moves: run.json holds the
adapter's digest, by which whoever comes next sees that the move has begun, and ends it.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_kit.errors import UserError
from qlora_kit.output.checkpoints import clean
from qlora_kit.output.folder import (
    ADAPTER_FILES,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    LOG,
    METRICS,
    NEW,
    OUTPUT_FILES,
    PROVENANCE,
    SAVING,
    digest,
    flush,
    remove,
    report_disk_errors,
)
from qlora_kit.output.lock import OutputLock
from qlora_kit.output.place import has_begun, holds_run
from qlora_kit.untrusted import parse_json, read_regular_file

OF_THE_RUN = (LOG, METRICS, CONFIG, CHECKPOINTS)  # are in .new before the end
FORMER = ".former"  # in .new: a folder that the move replaces
NOT_INHERITED = (CURVES, "chat_template.jinja")  # the new run may have none
IN_ORDER = {LOG: -1, CHECKPOINTS: 1, ADAPTER_FILES[1]: 2, ADAPTER_FILES[0]: 3, PROVENANCE: 4}
REMEDY = "free some space, and continue with --resume"
PATIENCE = 10.0  # seconds that a reader waits for a run that moves its files


def choose_folder(folder: Path, resume: bool, overwrite: bool) -> Path:
    """Return where a run writes until its end: into its folder, or, where it replaces another run, into .new."""
    replaces = has_begun(folder / NEW) or (overwrite and not resume and holds_run(folder))
    return folder / NEW if replaces else folder


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Give .new to write an adapter and its run.json into, run.json last; drop them if that fails."""
    new = folder / NEW
    _drop_staged(new)
    new.mkdir(exist_ok=True)
    try:
        with report_disk_errors("run.json", folder, 0, REMEDY):
            yield new
    except BaseException:
        _drop_staged(new)
        raise


def _drop_staged(new: Path) -> bool:
    """Remove from .new what a run wrote at its end, and .new if nothing else is left; return whether there was anything."""
    staged = [path for path in new.iterdir() if path.name not in OF_THE_RUN] if new.is_dir() else []
    for path in sorted(staged, key=lambda path: path.name != PROVENANCE):  # first what makes the others count
        remove(path)
    with suppress(OSError):  # it holds a run, or does not exist
        new.rmdir()
    return bool(staged)


def is_whole(folder: Path) -> bool:
    """Return whether .new holds all that a run left at its end, or what is left of it while it is moved."""
    try:
        recorded = parse_json(read_regular_file(folder / NEW / PROVENANCE))["adapter_sha256"]
        adapter = next(path for path in (folder / NEW / ADAPTER_FILES[0], folder / ADAPTER_FILES[0]) if path.is_file())
        return bool(recorded == digest(adapter))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return False


def move_in(folder: Path) -> None:
    """Move the files of .new, which are whole, into the folder; what they replace is removed."""
    new = folder / NEW
    if (new / LOG).exists():  # a run that replaces another one, whose move begins here
        for name in NOT_INHERITED:
            remove(folder / name)
    for path in sorted(new.iterdir(), key=lambda path: (IN_ORDER.get(path.name, 0), path.name)):
        if path.name.startswith("."):
            continue
        target = folder / path.name
        if target.is_dir():  # which os.replace cannot replace
            remove(new / FORMER)
            os.rename(target, new / FORMER)
        os.replace(path, target)
    flush(folder)
    remove(new)


def finish(folder: Path) -> list[str]:
    """End what a killed run left half-done in a folder that this process has locked; return lines that say what."""
    new = folder / NEW
    if not new.is_symlink() and is_whole(folder):
        move_in(folder)
        return [f"Moved the finished adapter of a killed run from {new} into {folder}"]
    removed = [str(path.relative_to(folder)) for root in (folder, new) for path in clean(root / CHECKPOINTS)]
    if new.is_symlink() or not has_begun(new):
        removed += [NEW] if remove(new) else []
    elif _drop_staged(new):
        removed.append(f"{NEW}/{ADAPTER_FILES[0]}")
    unfinished = [folder / f".{name}" for name in OUTPUT_FILES]  # files that were to take the place of others
    earlier = folder.glob(f"{SAVING}*")  # as earlier versions left them
    removed += [path.name for path in (*unfinished, *earlier) if remove(path)]
    return [f"Removed what a killed run left in {folder}: {', '.join(removed)}"] if removed else []


def finish_for_reader(folder: Path, key: str) -> list[str]:
    """End the move that a killed run began, before a command reads the folder; return lines that say so.

    Args:
        key: the flag that names the folder.

    Raises:
        UserError: the folder cannot be written, so that two runs are mixed in it.
    """
    until = time.monotonic() + PATIENCE
    while os.path.isfile(folder / NEW / PROVENANCE) and is_whole(folder):  # isfile raises nothing
        try:
            with OutputLock(folder):
                return finish(folder)
        except (UserError, OSError) as error:  # its run may be alive, and moving them now
            if time.monotonic() > until or not os.access(folder, os.W_OK):
                problem = f"holds in {NEW} a finished adapter that is not yet in its place ({error})"
                raise UserError(key, folder, problem, "read it once where it can be written") from None
            time.sleep(0.05)
    return []
