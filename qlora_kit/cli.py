"""What both commands share: one-line errors, exit statuses, and library noise kept from the user.

Exit status: 0 done, 2 the user's mistake, 130 stopped by Ctrl+C, 143 by SIGTERM, 1 anything else.
"""

import argparse
import difflib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from typing import Any, NoReturn, TextIO


def _not_installed(package: str) -> str:
    return f"error: {package}: not installed in {sys.prefix}; activate its environment, or pip install -r requirements.txt"


try:
    import pydantic  # noqa: F401  (what every command's settings need: asked for here, where a missing one is reported)
    import yaml  # noqa: F401
    from rich.console import Console

    from qlora_kit.errors import Failed, Stopped, UserError
    from qlora_kit.secrets import redact
except ModuleNotFoundError as missing:  # the first import of every command: nobody is there yet to catch it
    sys.exit(_not_installed(str(missing.name)))

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # a full, read-only or broken disk


class OneLineParser(argparse.ArgumentParser):
    """argparse that takes hyphens for underscores and answers a mistake in one line, with the closest flag.

    Args:
        doc: the command's docstring, whose first paragraph heads --help; the others end it.
        prog: how it is called where that is not its file's name.
    """

    def __init__(self, doc: str | None, prog: str | None = None):
        summary, _, examples = (doc or "").partition("\n\n")
        super().__init__(prog, description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args([_underscored(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and unknown.startswith("--"):
            flags = [flag for action in self._actions for flag in action.option_strings]
            flag = (unknown.split() or [unknown])[0].partition("=")[0]  # not its value, which may be a secret
            close = difflib.get_close_matches(flag, flags, n=1)
            message = f"{flag}: unknown flag; " + (f"did you mean {close[0]}?" if close else "--help lists them")
        (problem,) = UserError(message).lines
        if os.environ.get("RANK", "0") != "0":  # processes.py says it, where the first process has not said the same
            raise UserError(problem)
        print(f"error: {redact(problem)}", file=sys.stderr)
        sys.exit(2)


def nonempty(text: str) -> str:
    """For a flag that takes a file, folder or data set.

    Empty, as a shell variable that is not set, it would be the working folder.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give one")
    return text


def _underscored(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word


class Unheard:
    """Standard error that goes on in silence when its reader has left, as after `2>&1 | head` or in a terminal that is gone.

    What is said there is said beside the work, and a training run has its log file: neither may end for it.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """From here on into nothing; what waits in the stream's buffer goes there too."""
        _into_nothing(self._stream)


def _into_nothing(stream: TextIO) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def results_console(**options: Any) -> Console:
    """Standard output through rich, whose own answer to a reader that has left is status 1: here `run` answers."""

    class Results(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Results(**options)


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and leave the process with the right status; a user's mistake is never a traceback.

    A command whose results are no longer read, as before `| head`, ends quietly; one that says its progress to nobody goes on.
    """
    with redirect_stderr(Unheard(sys.stderr)):
        _run(main)


def _run(main: Callable[[], None]) -> NoReturn:
    try:
        main()
        sys.stdout.flush()
        sys.exit(0)
    except UserError as error:
        for problem in error.lines:
            print(f"error: {redact(problem)}", file=sys.stderr)
        sys.exit(2)
    except Failed as failure:
        print(f"error: {redact(str(failure))}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our results left, as `| head` does
        _into_nothing(sys.stdout)
        sys.exit(0)
    except ModuleNotFoundError as error:
        if (package := _missing_package(error)) is None:
            raise
        print(_not_installed(package), file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise
        print(
            f"error: {error.filename or 'output'}: cannot be written ({error.strerror}); make room there, or write elsewhere",
            file=sys.stderr,
        )
        sys.exit(1)


def _missing_package(error: BaseException) -> str | None:
    """None where it is not a package, but a part of this project. transformers says only beneath which one it misses."""
    while isinstance(error.__cause__, ModuleNotFoundError):
        error = error.__cause__
    name = getattr(error, "name", None)
    return None if name is None or name.startswith("qlora_kit") else name


def prepare_libraries() -> None:
    """Silence messages that a user can do nothing about. Call it before the libraries are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # sources.py words the errors
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        new, old = names
        before_2_9 = tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 9)
        # Segments that grow, instead of many of fixed size with room left over in each.
        os.environ[old if before_2_9 else new] = "expandable_segments:True"
    # Idle OpenMP threads sleep instead of spinning: beside one other busy program, two spinning cores trained the tiny model
    # at half this speed, and beside a second training at a fortieth (measured on 2 cores, 2026-11); alone it costs a quarter.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says that an optional CPU kernel package is missing
    for library in ("transformers", "peft", "accelerate", "bitsandbytes", "datasets", "torch"):
        for category in (DeprecationWarning, FutureWarning):  # what one library says to another
            warnings.filterwarnings("ignore", category=category, module=library)
    # report.py says in its own words that a paged optimizer is not paged on the CPU
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
