"""Run checks in another process, each with a time limit, so that none can hang, crash or print over the others.

A check returns its measurement, or raises CheckFailed or CheckSkipped. A check that exceeds its time limit, or whose process dies
as with a broken library, has failed, and the next check gets a fresh process. The checks are in machine_checks.py and
compute_checks.py.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

from qlora_kit.cli import prepare_libraries

SECONDS = 120.0  # time limit of a check: the first that imports torch from a slow disk needs it
STARTING_SECONDS = 60  # time limit for starting a process, which imports its modules first


class CheckFailed(Exception):
    """A failure: the measurement, and one command or sentence that fixes the cause."""

    def __init__(self, measured: str, fix: str):
        super().__init__(measured)
        self.measured, self.fix = measured, fix


class CheckSkipped(Exception):
    """Nothing to check on this machine; the message is the reason."""


class Check(NamedTuple):
    """A check to run.

    Attributes:
        fix: for failures other than CheckFailed, which has its own.
        time_limit: in seconds.
    """

    name: str
    function: Callable[..., str]
    arguments: tuple[Any, ...]
    fix: str
    time_limit: float = SECONDS


@dataclass(frozen=True)
class Result:
    """The result of a check.

    Attributes:
        measured: the measurement, or the reason why the check failed or was skipped.
        fix: of a failure, else None.
        seconds: the time that the check took.
    """

    name: str
    status: Literal["pass", "fail", "skipped"]
    measured: str
    fix: str | None
    seconds: float


def run_checks(checks: Iterable[Check]) -> Generator[Result, None, None]:
    """Yield the result of each check as it ends. Close the generator if you leave it early: its process would wait."""
    worker = None
    try:
        for check in checks:
            worker = worker or _Worker()
            result = worker.run(check)
            if result.status == "fail":  # after a failure its process may be broken, or still compute
                worker.stop()
                worker = None
            yield result
    finally:
        if worker:
            worker.stop()


def run_check(check: Check) -> Result:
    """Run a check in this process."""
    started = time.perf_counter()
    fix = None
    status: Literal["pass", "fail", "skipped"] = "pass"
    try:
        measured = check.function(*check.arguments)
    except CheckSkipped as skipped:
        status, measured = "skipped", str(skipped)
    except CheckFailed as failure:
        status, measured, fix = "fail", failure.measured, failure.fix
    except Exception as error:  # any error of any library is a result here
        status, measured, fix = "fail", summarize(error), check.fix
    return Result(check.name, status, measured, fix, time.perf_counter() - started)


def summarize(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class _Worker:
    """A process that runs checks and sends their results."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end,))  # not a daemon: torch.compile starts processes there
        self.process.start()
        other_end.close()  # so that `connection` sees the end of the process
        self.is_ready = self.connection.poll(STARTING_SECONDS) and self._receive() is not None

    def run(self, check: Check) -> Result:
        started, problem = time.perf_counter(), "no process could be started for it"
        if self.is_ready:
            self.connection.send(check)
            problem = f"no result after {check.time_limit:.0f} s"
            if self.connection.poll(check.time_limit):
                if (result := self._receive()) is not None:
                    return result
                self.process.join(STARTING_SECONDS)
                code = self.process.exitcode or 0
                problem = f"its process died ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"
        return Result(check.name, "fail", problem, check.fix, time.perf_counter() - started)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _receive(self) -> Any:
        """Return what the process sent, or None if it has ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None


def _serve(connection: Connection) -> None:
    """Run checks in the worker's process: results go through the connection, and everything that libraries print is dropped."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    prepare_libraries()
    connection.send("ready")
    while True:
        try:
            check = connection.recv()
        except EOFError:
            return
        connection.send(run_check(check))
