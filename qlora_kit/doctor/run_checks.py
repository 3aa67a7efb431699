"""Checks run one after the other in a process beside this one, so that none can hang, crash or print over the others.

A check returns what it measured, or raises Problem or Skipped. One that takes too long, or takes its process down as a broken
library does, has failed, and the next one gets a fresh process. What is checked: installation.py, arithmetic.py.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

STARTING_SECONDS = 60  # of a process, which reads its modules first


class Problem(Exception):
    """A check failed: what was measured, and one command or sentence that mends it."""

    def __init__(self, measured: str, fix: str):
        super().__init__(measured)
        self.measured, self.fix = measured, fix


class Skipped(Exception):
    """There is nothing to check here; the message says why."""


class Check(NamedTuple):
    name: str
    function: Callable[..., str]
    arguments: tuple[Any, ...]
    fix: str  # where the check ends in a way of its own
    seconds: float  # that it may take


@dataclass(frozen=True)
class Result:
    """How a check ended."""

    name: str
    status: Literal["pass", "fail", "skipped"]
    measured: str  # or why it was skipped
    fix: str | None  # of a failure
    seconds: float


def examine(checks: Iterable[Check]) -> Generator[Result, None, None]:
    """The result of each check, as it ends. To be closed where it is left early: a process waits."""
    worker = None
    try:
        for check in checks:
            worker = worker or _Worker()
            result = worker.run(check)
            if result.status == "fail":  # a process whose library failed, or still computes, is good for nothing more
                worker.stop()
                worker = None
            yield result
    finally:
        if worker:
            worker.stop()


def outcome(check: Check) -> Result:
    """Run a check here and now."""
    started = time.perf_counter()
    fix = None
    status: Literal["pass", "fail", "skipped"] = "pass"
    try:
        measured = check.function(*check.arguments)
    except Skipped as skipped:
        status, measured = "skipped", str(skipped)
    except Problem as problem:
        status, measured, fix = "fail", problem.measured, problem.fix
    except Exception as error:  # of any library, that is what is looked for
        status, measured, fix = "fail", one_line(error), check.fix
    return Result(check.name, status, measured, fix, time.perf_counter() - started)


def one_line(error: BaseException) -> str:
    """The first line of what an error says, and its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class _Worker:
    """A process that runs checks and sends their results."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.here, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,))  # torch.compile starts processes of its own there
        self.process.start()
        there.close()  # so that its end is seen when the process ends
        self.ready = self.here.poll(STARTING_SECONDS) and self._received() is not None

    def run(self, check: Check) -> Result:
        if not self.ready:
            return self._failed(check, "no process could be started for it", 0.0)
        self.here.send(check)
        started = time.perf_counter()
        if not self.here.poll(check.seconds):
            return self._failed(check, f"no result after {check.seconds:.0f} s", check.seconds)
        result = self._received()
        if result is None:
            return self._failed(check, f"its process died ({self._end()})", time.perf_counter() - started)
        return result

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.here.close()

    def _received(self) -> Any:
        """None where the process has ended."""
        try:
            return self.here.recv()
        except (EOFError, OSError):
            return None

    def _end(self) -> str:
        self.process.join(STARTING_SECONDS)
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"

    @staticmethod
    def _failed(check: Check, measured: str, seconds: float) -> Result:
        return Result(check.name, "fail", measured, check.fix, seconds)


def _serve(connection: Any) -> None:
    """In the process: results go through the connection; what libraries and compilers print goes nowhere."""
    from qlora_kit.cli import prepare_libraries

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    prepare_libraries()
    connection.send("ready")
    while True:
        try:
            check = connection.recv()
        except EOFError:
            return
        connection.send(outcome(check))
