"""Run a function in a process of its own, within limits of time and memory.

Chat templates are programs, and patterns of an adapter may never end. A sandbox keeps templates from files and modules, not from
loops without an end or texts that fill the memory, and Python cannot interrupt one of its own operations. A process can be ended.
"""

import math
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from qlora_kit.config import GIB
from qlora_kit.errors import UserError

SECONDS, BYTES = 20.0, GIB  # of a call, and beyond what this process has
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class LimitExceeded(Exception):
    """The limit that a call exceeded, in words."""


class LimitedWorker(Generic[Argument, Result]):
    """A forked process that answers calls of one function; it starts with the first call and again after an exceeded limit.

    Args:
        function: called in the process with each argument. Argument, result and exceptions are pickled.
    """

    def __init__(self, function: Callable[[Argument], Result], seconds: float = SECONDS, extra_bytes: int = BYTES):
        self.function, self.seconds, self.extra_bytes = function, seconds, extra_bytes
        self.process: Any = None
        self.connection: Connection | None = None

    def call(self, argument: Argument) -> Result:
        """Return the function's result; a worker that calls another one computes it itself, within its own limits.

        Raises:
            LimitExceeded: it took more than `seconds`, or more than `extra_bytes` of memory.
            UserError: the system allows no other process.
            Exception: what the function raises.
        """
        if multiprocessing.current_process().daemon:
            return self.function(argument)
        if self.connection is None:
            self._start()
        assert self.connection is not None
        try:
            self.connection.send(argument)
            if not self.connection.poll(self.seconds):
                raise LimitExceeded(f"it takes more than {self.seconds:g} seconds")
            succeeded, result = self.connection.recv()
        except (EOFError, OSError):
            self.close()
            raise LimitExceeded(f"it takes more than {self.extra_bytes / GIB:.3g} GiB of memory") from None
        except BaseException:
            self.close()
            raise
        if isinstance(result, MemoryError):
            raise LimitExceeded(f"it takes more than {self.extra_bytes / GIB:.3g} GiB of memory") from None
        if not succeeded:
            raise result
        return result

    def close(self) -> None:
        """End the process."""
        if self.connection is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
        self.process = self.connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # the libraries are imported already
        try:
            self.connection, end = context.Pipe()
            work = (self.function, end, self.connection, self.seconds, self.extra_bytes)
            self.process = context.Process(target=_serve, args=work, daemon=True)
            self.process.start()
        except OSError as error:
            self.process = self.connection = None
            problem = f"another one cannot be started ({error.strerror})"
            raise UserError("processes", None, problem, "allow more processes and open files (ulimit -u, ulimit -n)") from None
        end.close()


def _serve(
    function: Callable[[Any], Any], connection: Connection, other_end: Connection, seconds: float, extra_bytes: int
) -> None:
    other_end.close()  # so that the end of the parent ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's threads are the parent's, and workers share the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C goes to the parent too, which ends this process
    for number in (signal.SIGTERM, signal.SIGALRM):  # the alarm rings where the parent was killed
        signal.signal(number, signal.SIG_DFL)
    with suppress(OSError):  # macOS has no /proc
        limit = _address_space() + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        while True:
            argument = connection.recv()
            signal.alarm(math.ceil(seconds) + 1)
            try:
                answer = (True, function(argument))
            except Exception as error:
                answer = (False, error)
            connection.send(answer)
            signal.alarm(0)
    finally:  # without a traceback: the parent has ended, or says that memory is full
        os._exit(1)


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
