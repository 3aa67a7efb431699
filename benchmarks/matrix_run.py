"""What the two support matrices share: a row in a process of its own with a time limit, and the tables of docs/models.md."""

import gc
import json
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runs import ROOT, versions_of

PAGE = ROOT / "docs" / "models.md"
Row = dict[str, Any]  # `wrong` lists what is wrong with it


def prepare(work: Path) -> None:
    """Set the environment of all rows, with a token cache of their own; call it before any library is imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "500"}
    os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
    sys.path.insert(0, str(ROOT))
    from qlora_kit.cli import prepare_libraries

    prepare_libraries()
    os.chdir(ROOT)


def run_rows(checks: Mapping[str, Callable[[], Row]], work: Path, limit_seconds: float, jobs: int = 1) -> dict[str, Row]:
    """Run each check in a forked child; one that crashes, or takes too long, is a row that says so.

    Args:
        work: folder for what the children print and return.
        jobs: children at a time.
    """
    gc.freeze()  # a start of the Trainer has the collector look through everything, for half a second
    rows: dict[str, Row] = {}
    waiting, running = list(checks), dict[int, tuple[str, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[_fork(checks[name], work / name)] = (name, time.monotonic() + limit_seconds)
        for pid, (name, until) in list(running.items()):
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                rows[name] = _read_row(work / name, os.waitstatus_to_exitcode(status), limit_seconds)
                print(f"{name:<28} {'; '.join(rows[name]['wrong']) or 'ok'}", file=sys.stderr, flush=True)
        time.sleep(0.02)
    return {name: rows[name] for name in checks}


def _fork(check: Callable[[], Row], file: Path) -> int:
    """Start the check in a child, which writes its row to FILE.json and everything it prints to FILE.txt."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)
    if pid := os.fork():
        return pid
    said = os.open(file.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # a test runner has replaced them
    status = 1
    try:
        row = check()
        file.with_suffix(".json").write_text(json.dumps(row), encoding="utf-8")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _read_row(file: Path, status: int, limit_seconds: float) -> Row:
    if status == 0:
        return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    if status == -signal.SIGKILL:
        return {"wrong": [f"not done after {limit_seconds:.0f} s, or killed"]}
    said = file.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"wrong": [f"ended by signal {-status}" if status < 0 else f"crash: {said[-1][:200] if said else 'no word'}"]}


def update_json(file: Path | None, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Put rows into a file of earlier rows, and return all of them."""
    if file is None:
        return dict(rows)
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found |= rows
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def describe_run(command: str, packages: tuple[str, ...]) -> str:
    """Return the lines above a table: command, hardware, versions and date."""
    processor = platform.processor() or platform.machine()
    if (cpu := Path("/proc/cpuinfo")).exists():
        processor = re.findall(r"model name\s*: (.*)", cpu.read_text())[0]
    cores = len(os.sched_getaffinity(0))
    machine = f"{cores} cores of {processor}, no GPU"
    return f"```bash\n{command}\n```\n\n{machine}; {versions_of(packages)}; {datetime.now(UTC):%Y-%m-%d}."


def write_section(page: Path, marker: str, text: str) -> None:
    """Put text between `<!-- MARKER: begin -->` and `<!-- MARKER: end -->` of a page."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"error: {page}: {begin} and {end}: not found. Add both lines.")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


def shorten(text: str, most: int = 160) -> str:
    """Return a text as one cell of a Markdown table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= most else f"{line[: most - 3]}..."
