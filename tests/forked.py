"""Start commands as processes that have the libraries already.

A new interpreter imports them for seven seconds. Here a server does so once, and each process is forked from it: one of its own
in all but the start, with its exit status, streams, signals, folder and environment. Tests of the start use a new interpreter.
"""

import fcntl
import io
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import termios
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preloaded"])


def start(command: list[str], streams: tuple[int, int, int], cwd: Path = ROOT, **environment: str) -> BaseProcess:
    """Start `python COMMAND` in a session of its own.

    Args:
        command: a script and its arguments, or `-c CODE ...`, or `-m MODULE ...`.
        streams: descriptors for standard input, output and error; a terminal becomes the controlling one.
        environment: variables that differ from this process's.
    """
    given = [DupFd(stream) for stream in streams]
    process = SERVER.Process(target=_execute, args=(list(command), given, str(cwd), os.environ | environment))
    process.start()
    return process


def run(command: list[str], cwd: Path = ROOT, timeout: float = 120, **environment: str) -> CompletedProcess:
    """Start a command with nothing to read, and wait for its end; a negative status is the signal that ended it."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        process = start(command, (nothing.fileno(), out.fileno(), err.fileno()), cwd, **environment)
        status = wait(process, timeout)
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(command, status, out.read(), err.read())


def run_ranks(command: list[str], count: int = 2, timeout: float = 120) -> CompletedProcess:
    """Start so many ranks of a command, and wait for all; the status is the first one that is not 0, the streams are joined."""
    with socket.socket() as port, tempfile.TemporaryFile("w+") as out, open(os.devnull) as nothing:
        port.bind(("localhost", 0))
        team = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port.getsockname()[1])}  # fmt: skip
        port.close()
        streams = (nothing.fileno(), out.fileno(), out.fileno())
        ranks = [start(command, streams, RANK=str(rank), LOCAL_RANK=str(rank), **team) for rank in range(count)]
        statuses = [wait(rank, timeout) for rank in ranks]
        out.seek(0)
        return CompletedProcess(command, next(filter(None, statuses), 0), "", out.read())


def wait(process: BaseProcess, timeout: float = 120) -> int:
    """Return the exit status; kill a process that takes longer than so many seconds, and fail."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {timeout} seconds")
    return process.exitcode


def _execute(command: list[str], streams: list, cwd: str, environment: dict[str, str]) -> None:
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream.detach(), number)
    with suppress(OSError):  # no terminal
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), "utf-8")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, "wb", closefd=False), "utf-8", errors, line_buffering=number == 2 or os.isatty(number))
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    match command:
        case ["-c", code, *_]:
            sys.argv = [command[0], *command[2:]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *_]:
            sys.argv = command[1:]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_]:
            sys.argv = command
            runpy.run_path(script, run_name="__main__")
