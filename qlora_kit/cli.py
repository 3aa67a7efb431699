"""Flags, exit statuses and quiet libraries, which all commands share.

Exit status: 0 done, 2 the user's mistake, 130 stopped by Ctrl+C, 143 by SIGTERM, 129 by a closed terminal, 1 anything else.
"""

import argparse
import errno
import io
import logging
import os
import re
import resource
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from typing import Any, NoReturn, TextIO
from urllib.parse import urlsplit

from qlora_kit.errors import Failed, Problem, Stopped, UserError, closest, did_you_mean, spell_out
from qlora_kit.shipped import INSTALL, is_dispatched


def _not_installed(package: str) -> str:
    remedy = f"activate the right environment, or {INSTALL}"
    return f"error: {Problem(package, None, f'is not installed in {sys.prefix}', remedy)}"


try:
    from rich.console import Console

    import qlora_kit.config_file  # noqa: F401  imports pydantic and PyYAML, as every command does
    from qlora_kit.secrets import redact
    from qlora_kit.wrapping import say, wrap_line
except ModuleNotFoundError as missing:  # these are a command's first imports: no caller handles a missing package yet
    sys.exit(_not_installed(str(missing.name)))

FEWEST_FILES = 64
FEW_THREADS = 4096  # a limit below may be too low, as it counts all processes of the user
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # a full, read-only or broken disk
# What to do about an error of the system; of any other: check the file.
REMEDIES = dict.fromkeys(DISK_ERRORS, "free some space there, or write elsewhere")
REMEDIES |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)")
REMEDIES |= {errno.EAGAIN: "allow more processes (ulimit -u)", errno.ENOMEM: "free some memory"}
# What people type who know other tools: flag -> ours.
USUAL_FLAGS = {
    "lr": "learning_rate", "bs": "batch_size", "batch": "batch_size", "epochs": "num_epochs", "steps": "max_steps", "r": "rank",
    "lora_rank": "rank", "lora_alpha": "alpha", "model": "model_name", "base_model": "model_name", "data": "dataset",
    "output": "output_dir", "out": "output_dir", "seq_len": "max_length", "max_tokens": "max_new_tokens", "temp": "temperature",
    "lora": "adapter", "file": "prompt_file",
}  # fmt: skip


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(wrap_line(line, width) for line in text.splitlines())


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that accepts hyphens for underscores and reports a mistake in one line, with the closest flag.

    Args:
        doc: the command's docstring: its first paragraph is the head of --help, the others are the end.
        prog: how the command is called; None takes its file's name.
    """

    def __init__(self, doc: str | None, prog: str | None = None):
        summary, _, examples = (doc or "").partition("\n\n")
        prog = sys.argv[0] if is_dispatched() else prog  # `qlora train`
        super().__init__(prog, description=summary, epilog=examples, formatter_class=_HelpFormatter)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args([_underscored(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        error = UserError.of([self._problem(message)])
        if os.environ.get("RANK", "0") != "0":  # training/processes.py reports it unless rank 0 has reported the same
            raise error
        _report(error)
        sys.exit(2)

    def _problem(self, message: str) -> Problem:
        """Return argparse's message (`argument FLAG: ...`, `unrecognized arguments: ...`, and others) as a problem."""
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        if flag == "unrecognized arguments" and problem.startswith("--"):
            flag = problem.split()[0].partition("=")[0]  # without its value, which may be a secret
            known = [option for action in self._actions for option in action.option_strings]
            usual = f"--{USUAL_FLAGS.get(flag[2:])}"
            problem = "is not a flag" + did_you_mean(usual if usual in known else closest(flag, known))
        elif choice := re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", problem):
            return Problem(flag, choice[1], "is none of its values", f"use one of {choice[2].replace(chr(39), '')}")
        elif number := re.fullmatch(r"invalid int value: '(.*)'", problem):
            return Problem(flag, number[1], "is not a whole number", "see --help")
        elif not flag.startswith("-"):
            flag, problem = "command line", message
        return Problem(flag, None, problem, "see --help")


def nonempty(text: str) -> str:
    """Return the name of a file, folder or data set.

    Raises:
        ArgumentTypeError: it is empty, as an unset shell variable is; an empty path would mean the working directory.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def add_loading_flags(parser: argparse.ArgumentParser, purpose: str = "") -> None:
    """Add the flags of a command that loads a base model.

    Args:
        purpose: what the devices are for, as the help says it.
    """
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help=f"{purpose}auto, the default: the GPU if there is one"
    )
    parser.add_argument(
        "--device_map",
        choices=["auto", "one"],
        default="auto",
        help=f"{purpose}auto, the default: several GPUs if the first cannot hold the base model; one: always the first",
    )


def _underscored(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word


class IgnoreClosedStderr:
    """Standard error that drops what it gets once its reader has left, as after `2>&1 | head` or in a closed terminal.

    Messages there only accompany the work, and training writes a log file as well: a run must not end because of them.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:
            _redirect_to_devnull(self._stream)


def open_standard_streams() -> None:
    """Open what was closed before the program began, as `2>&-` does: a file that is opened later would get what is printed.

    Messages go nowhere then. Standard input and output stay None for Python, so that a command that needs them can say so.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def check_limits() -> None:
    """Check that the process may open the files and start the threads that the libraries need.

    Without threads, one library ends the process and another one panics.

    Raises:
        UserError: a limit is too low.
    """
    if (allowed := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < FEWEST_FILES:
        raise UserError("ulimit -n", allowed, "allows too few open files", "use ulimit -n 1024")
    allowed = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if 0 <= allowed < FEW_THREADS and not _can_start_threads(4 * (os.cpu_count() or 1)):
        raise UserError("ulimit -u", allowed, "allows too few processes and threads", f"use ulimit -u {FEW_THREADS}")


def _can_start_threads(count: int) -> bool:
    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:
        return False
    finally:
        done.set()
    return True


def _redirect_to_devnull(stream: TextIO) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


def set_encoding(stream: TextIO | None) -> None:
    """Let a terminal replace the characters that it cannot show; make files and pipes UTF-8, whatever the locale.

    Half a character, as an undecodable name of a file holds one, is spelled out.
    """
    if isinstance(stream, io.TextIOWrapper) and stream.isatty():
        stream.reconfigure(errors="replace")
    elif isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="strict" if stream.readable() else "backslashreplace")


def results_console(**options: Any) -> Console:
    """Return a rich console for standard output that leaves a closed pipe to `run`; rich's own would exit with status 1."""

    class Results(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Results(**options)


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Show on a terminal what takes seconds, in place of the libraries' bars, while the context lasts."""
    console, bars = Console(stderr=True), sys.modules.get("transformers.utils.logging")
    if not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield
        return
    hidden = bars is not None and bars.is_progress_bar_enabled()
    if bars and hidden:
        bars.disable_progress_bar()
    try:
        with console.status(f"{doing} ...", spinner="dots" if console.encoding.startswith("utf") else "line"):
            yield
    finally:
        if bars and hidden:
            bars.enable_progress_bar()


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main`, report its error and exit with its status; a user's mistake is never a traceback.

    A command whose results are no longer read, as before `| head`, ends quietly; one whose messages are no longer read continues.
    """
    open_standard_streams()
    set_encoding(sys.stdout)
    with redirect_stderr(IgnoreClosedStderr(sys.stderr)):
        try:
            check_limits()
            main()
            print(end="", flush=True)  # to nowhere, where standard output is closed
            status = 0
        except BrokenPipeError:  # the reader of the results has left, as `| head` does
            _redirect_to_devnull(sys.stdout)
            status = 0
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            status = 130
        except Stopped as stop:
            say(str(stop))
            status = stop.status
        except (UserError, Failed, ImportError, OSError, MemoryError, RuntimeError) as error:
            status = _report(error)
        sys.exit(status)


def _report(error: Exception) -> int:
    """Print the error in one line for each problem and return the exit status; raise an error that is a bug of ours."""
    if isinstance(error, UserError | Failed):
        lines = error.lines if isinstance(error, UserError) else [str(error)]
        say("\n".join(f"error: {redact(line)}" for line in lines))
        return 2 if isinstance(error, UserError) else 1
    if isinstance(error, ModuleNotFoundError) and (package := _missing_package(error)):
        say(_not_installed(package))
        return 1
    if problem := _explain_system_error(error):
        say(f"error: {problem}")
        return 1
    raise error


def _explain_system_error(error: Exception) -> Problem | None:
    """Return what the system refuses, such as a file, memory or a thread; None for a bug of ours."""
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map segment" in str(error)):
        return Problem("memory", None, "is full", "close other programs, or use smaller data")
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return Problem("threads", None, "cannot be started", REMEDIES[errno.EAGAIN])
    if isinstance(error, ImportError) and os.strerror(errno.EMFILE) in str(error):
        return Problem("libraries", None, f"cannot be loaded ({os.strerror(errno.EMFILE)})", REMEDIES[errno.EMFILE])
    if not isinstance(error, OSError) or error.errno is None:
        return None
    doing = "written" if error.errno in DISK_ERRORS else "used"
    key = error.filename if isinstance(error.filename, str | os.PathLike) else "output" if doing == "written" else "system"
    remedy = REMEDIES.get(error.errno, "check that it exists and its permissions, or use another")
    return Problem(str(key), None, f"cannot be {doing} ({error.strerror})", remedy)


def _missing_package(error: BaseException) -> str | None:
    """Return the package that is not installed; None where a file of this project is missing."""
    while isinstance(error.__cause__, ModuleNotFoundError):  # transformers names the package only in the cause
        error = error.__cause__
    name = getattr(error, "name", None)
    return None if name is None or name.startswith("qlora_kit") else name


class _CleanRecord(logging.LogRecord):
    """A message of a library, in which a terminal obeys nothing: it may quote a file."""

    def getMessage(self) -> str:
        return spell_out(super().getMessage(), kept="\n\t")


def _show_warning(message: Warning | str, category: type[Warning], filename: str, line: int, *_: Any) -> None:
    say(f"warning: {' '.join(str(message).split())} ({os.path.basename(filename)}, line {line})")


def check_endpoint(address: str) -> None:
    """Check the address of a server in HF_ENDPOINT, which the libraries read while they are imported; raises UserError."""
    try:
        parts = urlsplit(address)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # of the port
        is_sound = False
    if not is_sound or not address.isprintable() or " " in address:
        raise UserError("HF_ENDPOINT", address, "is no address of a server", "correct it, or unset it")


def prepare_libraries() -> None:
    """Silence library messages that a user can do nothing about. Call it before the libraries are imported.

    Raises:
        UserError: a variable of the environment would stop a library.
    """
    if sys.flags.optimize > 1:
        raise UserError("PYTHONOPTIMIZE", sys.flags.optimize, "drops docstrings, which transformers reads", "unset it, or set 1")
    if endpoint := os.environ.get("HF_ENDPOINT"):
        check_endpoint(endpoint)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    logging.setLogRecordFactory(_CleanRecord)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # data/dataset.py reports its errors
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9
    for name in names:
        if not re.fullmatch(r"(\w+:[^:,]+(:[^:,]+)*(,|$))*", os.environ.get(name, "")):  # torch would end the process
            raise UserError(name, os.environ[name], "is no list of NAME:VALUE", "correct it, or unset it")
    if not any(name in os.environ for name in names):
        is_before_2_9 = tuple(map(int, version("torch").split(".")[:2])) < (2, 9)
        os.environ[names[is_before_2_9]] = "expandable_segments:True"  # which waste less memory than segments of fixed size
    # Idle OpenMP threads sleep instead of spinning. While another program was busy, spinning on two cores halved the speed of
    # training the tiny model, and divided it by 40 next to a second training (2 cores, 2026-11). Alone, sleeping costs a quarter.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional CPU kernel package is missing
    for library in ("transformers", "peft", "accelerate", "bitsandbytes", "datasets", "torch"):
        for category in (DeprecationWarning, FutureWarning):  # meant for the libraries' developers
            warnings.filterwarnings("ignore", category=category, module=library)
    warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")  # adapter/switchable.py puts biases back
    # training/machine.py reports that a paged optimizer is not paged on the CPU
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
