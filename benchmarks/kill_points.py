"""Kill commands just before each change that they make to the file system, and check that nothing is lost.

    python benchmarks/kill_points.py

An audit hook of Python counts what a forked child does below the trial's folder: files opened for writing, renames, removals,
folders made and removed. A first child counts all of them; then one child for each is killed (SIGKILL) before that change. After
a kill

- an adapter that was there before answers, or the new one does: base weights, digest and run.json fit together;
- the same command again (with --resume, where there is something to resume) ends with the result of an undisturbed one, byte for
  byte, and leaves the same files: no temporary folder of the killed process.

Prints a Markdown table; the exit status is 1 if anything was lost, different or left over. --every N takes each N-th point only.
"""

import argparse
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bad_inputs import import_libraries
from tiny_runs import ROOT, SETTINGS

WATCHED = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
ADAPTER, PROVENANCE = "adapter_model.safetensors", "run.json"
SHORT = ["--max_steps", "2"]


class Scenario(NamedTuple):
    """A command to be killed.

    Attributes:
        before: commands that make the state in which it starts.
        command: the command; the word PLACE stands for the trial's folder.
        again: what is started after a kill; `--resume` is left out where nothing can be resumed.
        result: the folder whose content counts.
        removed: what is removed before the command, so that a run was stopped rather than finished.
    """

    name: str
    before: list[list[str]]
    command: list[str]
    again: list[str]
    result: str
    removed: tuple[str, ...] = ()


def train(*words: str) -> list[str]:
    return ["train", *SETTINGS, *SHORT, "--output_dir", "PLACE/run", *words]


MERGE = ["merge", "--adapter", "PLACE/run", "--output", "PLACE/merged", "--check", "none"]
NEW = train("--overwrite", "--seed", "7")
LONGER = train("--max_steps", "3", "--resume")
UNFINISHED = ("run/adapter_model.safetensors", "run/run.json", "run/checkpoints/checkpoint-2")
SCENARIOS = [
    Scenario("fresh run, with a new token cache", [], train(), train("--resume"), "run"),
    Scenario("--resume after a stop", [train()], train("--resume"), train("--resume"), "run", UNFINISHED),
    Scenario("--overwrite, then --resume", [train()], NEW, train("--seed", "7", "--resume"), "run"),
    Scenario("--overwrite, then --overwrite", [train()], NEW, NEW, "run"),
    Scenario("a longer run", [train()], LONGER, LONGER, "run"),
    Scenario("merge", [train()], MERGE, MERGE, "merged"),
    Scenario("merge --overwrite", [train(), MERGE], [*MERGE, "--overwrite"], [*MERGE, "--overwrite"], "merged"),
]  # fmt: skip


def is_change(event: str, arguments: tuple[Any, ...], top: str) -> bool:
    """Return whether an audit event changes the file system below `top`."""
    if event == "open":
        path, mode, flags = arguments
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if mode is None else any(sign in mode for sign in "wax+")
        return writes and isinstance(path, str | bytes | os.PathLike) and os.fspath(path).__str__().startswith(top)
    return event in WATCHED and any(isinstance(word, str | os.PathLike) and str(word).startswith(top) for word in arguments)


def run(command: list[str], place: Path, kill_before: int | None = None) -> tuple[int, int, str]:
    """Run a command in a forked child.

    Args:
        kill_before: the number of the change, from 1, before which the child is killed.

    Returns:
        The exit status (negative for a signal), the changes that it made, and what it printed.
    """
    count_file, said = place.parent / "count", place.parent / "said.txt"
    pid = os.fork()
    if pid == 0:
        _run_here(command, place, kill_before, count_file, said)
    _, status = os.waitpid(pid, 0)
    changes = len(count_file.read_bytes()) if count_file.exists() else 0
    count_file.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), changes, said.read_text(errors="replace") if said.exists() else ""


def _run_here(command: list[str], place: Path, kill_before: int | None, count_file: Path, said: Path) -> None:
    status = 1
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        counter = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        made, top = 0, str(place)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal made
            if is_change(event, arguments, top):
                made += 1
                if made == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(counter, b".")

        from bad_inputs import call_command

        sys.addaudithook(watch)
        os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
        call_command(command[0], [word.replace("PLACE", str(place)) for word in command[1:]])
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def content(place: Path, result: str) -> dict[str, str]:
    """Return what must not differ: the files below `place` by name, with the digest of those whose content is determined."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_dir() or (name.startswith("cache/qlora_kit/") and "/" in name[16:]):
            continue
        fixed = path.suffix == ".safetensors" and name.startswith(f"{result}/") and "checkpoints" not in name
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if fixed else ""
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = str([{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines])
    return found


def has_whole_adapter(folder: Path) -> bool:
    """Return whether the folder's adapter and its run.json are of one run, as a reader finds them."""
    from qlora_kit.adapter.folder import read_adapter

    source = read_adapter(str(folder))
    recorded = source.provenance.get("adapter_sha256")
    return recorded in (None, hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest())


def try_point(scenario: Scenario, top: Path, point: int, expected: dict[str, str]) -> str | None:
    """Kill the command before a change and start it again; return what is wrong, or None."""
    place = top / "place"
    shutil.copytree(top / "start", place)
    try:
        had_adapter = (place / "run" / ADAPTER).exists()
        run(scenario.command, place, point)
        if had_adapter:
            try:
                if not has_whole_adapter(place / "run"):
                    return "adapter and run.json are of two runs"
            except Exception as error:
                return f"the adapter is lost: {error}"
        status, _, said = run(scenario.again, place)
        if status == 2 and "--resume" in scenario.again:  # nothing to resume: the run was killed before its first checkpoint
            plain = [word for word in scenario.again if word != "--resume"]
            extra = ["--overwrite"] if had_adapter or (place / "run" / "training_log.txt").exists() else []
            status, _, said = run([*plain, *extra], place)
        if status != 0:
            return f"started again, it ends with {status}: {said.strip().splitlines()[-1:]}"
        found = content(place, scenario.result)
        if left := sorted(set(found) - set(expected)):
            return f"left over: {left[:3]}"
        different = sorted(name for name in expected if found.get(name) != expected[name])
        return f"different: {different[:3]}" if different else None
    finally:
        shutil.rmtree(place)


def try_scenario(scenario: Scenario, top: Path, every: int, report: Callable[[str], None]) -> Counter[str]:
    """Kill a command before each of its changes; return the counts."""
    start = top / "start"
    start.mkdir()
    for command in scenario.before:
        status, _, said = run(command, start)
        if status:
            raise SystemExit(said)
    for name in scenario.removed:
        path = start / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(start, top / "place")
    status, changes, said = run(scenario.command, top / "place")
    if status:
        raise SystemExit(said)
    expected, found = content(top / "place", scenario.result), Counter[str]()
    shutil.rmtree(top / "place")
    for point in range(1, changes + 1, every):
        found["kills"] += 1
        problem = try_point(scenario, top, point, expected)
        if problem:
            found["wrong"] += 1
            report(f"{scenario.name}, before change {point} of {changes}: {problem}")
    shutil.rmtree(start)
    return found


def leave_out_what_takes_time() -> None:
    """Write the curves as an empty file, measure no speed, and let the children's garbage collector pass over the libraries."""
    import train_qlora
    from qlora_kit.training import machine

    train_qlora.plot_training_curves = lambda metrics, path, *rest: path.touch()  # type: ignore[assignment,misc]
    machine.check_patience = lambda *_: None  # type: ignore[assignment]
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take each N-th point only")
    parser.add_argument("--only", default="", metavar="NAME", help="scenarios whose name contains this")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    import_libraries()
    leave_out_what_takes_time()
    wrong = 0
    print("| command | kills | lost, different or left over |\n|---|---|---|", flush=True)
    for scenario in SCENARIOS:
        if arguments.only not in scenario.name:
            continue
        with tempfile.TemporaryDirectory(prefix="kill-points-") as folder:
            found = try_scenario(scenario, Path(folder), arguments.every, lambda line: print(line, file=sys.stderr, flush=True))
        wrong += found["wrong"]
        print(f"| {scenario.name} | {found['kills']} | {found['wrong']} |", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
