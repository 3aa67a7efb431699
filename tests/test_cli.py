"""Commands whose reader has left, as `| head` does (real pipes and processes), missing packages, and wrong flags."""

import errno
import io
import logging
import os
import subprocess
import sys

import pytest

import inference_example
from qlora_kit import cli, wrapping
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.merge import command
from tests import forked

SHORT = [
    "--config", "configs/tiny.yaml", "--max_length", "16", "--batch_size", "1", "--max_steps", "6", "--rank", "4",
    "--set", "data.max_train_samples=4", "--set", "data.eval_split=null", "--set", "training.logging_steps=1",
]  # fmt: skip


def test_training_continues_when_nobody_reads_its_messages(tmp_path):
    """`python train_qlora.py 2>&1 | head -1`"""
    reading, writing = os.pipe()
    command = ["train_qlora.py", *SHORT, "--output_dir", str(tmp_path / "out")]
    process = forked.start(command, (reading, writing, writing))
    os.close(writing)
    with os.fdopen(reading) as output:
        assert output.readline().startswith("Device:")
    assert forked.wait(process) == 0
    log = (tmp_path / "out" / "training_log.txt").read_text()
    assert [f"step {step}/6" in log for step in range(1, 7)] == [True] * 6 and "Done in" in log
    assert {"adapter_model.safetensors", "run.json", "training_curves.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.fixture
def close_reader(monkeypatch):
    """close_reader("stdout"): make the stream a pipe whose reader has left."""
    pipes = []

    def close(name):
        reading, writing = os.pipe()
        os.close(reading)
        pipes.append(os.fdopen(writing, "w", buffering=1))
        monkeypatch.setattr(sys, name, pipes[-1])

    yield close
    for pipe in pipes:
        pipe.close()


@pytest.mark.parametrize("ending, status", [
    (UserError("training.seed", -1, "is wrong", "use 1"), 2), (Failed("the disk is full"), 1), (Stopped(130, "stopped"), 130),
    (KeyboardInterrupt(), 130), (None, 0),
])  # fmt: skip
def test_the_exit_status_is_the_same_when_nobody_reads_the_last_message(close_reader, ending, status):
    def main():
        print("a message", file=sys.stderr)
        if ending:
            raise ending

    close_reader("stderr")
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == status


@pytest.mark.parametrize("show", [lambda: print("a result", flush=True), lambda: cli.results_console().print("a result")])
def test_a_command_whose_results_nobody_reads_ends_quietly(close_reader, show, capsys):
    close_reader("stdout")
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: [show() for _ in range(3)])
    assert end.value.code == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("is_terminal, expected", [(False, "漢字 é \\udce9\n".encode()), (True, "?? é ?\n".encode("cp1252"))])
@pytest.mark.parametrize("show", [print, lambda text: cli.results_console().print(text)])
def test_results_survive_a_locale_without_their_characters(monkeypatch, show, is_terminal, expected):
    """A terminal keeps its encoding; a file or a pipe gets UTF-8. \\udce9 is a byte of a file's name that is not UTF-8."""
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, "cp1252", write_through=True)
    stream.isatty = lambda: is_terminal
    written.readable = lambda: False
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: show("漢字 é \udce9"))
    assert end.value.code == 0 and written.getvalue().replace(os.linesep.encode(), b"\n") == expected


@pytest.mark.parametrize("command, package", [
    (["train_qlora.py"], "pydantic"),
    (["inference_example.py", "--prompt", "x"], "rich"),
    (["-m", "qlora_kit.doctor"], "yaml"),
    (["-m", "qlora_kit.merge", "--adapter", "x", "--output", "y"], "pydantic"),
    (["train_qlora.py", "--config", "configs/tiny.yaml", "--output_dir", "no_run"], "torch"),  # imported when it is needed
])  # fmt: skip
def test_a_missing_package_is_one_line(root, tmp_path, command, package):
    """It is missing in a new shell, where the environment is not active."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=root, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith(f"error: {package}: is not installed in {sys.prefix}. ") and "requirements.txt" in done.stderr


def test_a_package_that_a_library_misses_is_named_and_a_missing_file_of_ours_is_a_bug(capsys):
    """transformers raises an error without the name; its cause has it."""

    def fail(name):
        try:
            raise ModuleNotFoundError(name=name)
        except ModuleNotFoundError as cause:
            raise ModuleNotFoundError("Could not import module") from cause

    with pytest.raises(SystemExit) as ending:
        cli.run(lambda: fail("accelerate"))
    assert ending.value.code == 1 and capsys.readouterr().err.startswith("error: accelerate: is not installed")
    with pytest.raises(ModuleNotFoundError):
        cli.run(lambda: fail("qlora_kit.gone"))


@pytest.mark.parametrize("parse, flags", [
    (inference_example.parse_arguments, ["--adapter", ""]),
    (inference_example.parse_arguments, ["--perplexity", " "]),
    (command.parse_arguments, ["--output", "y", "--adapter", ""]),
    (command.parse_arguments, ["--adapter", "x", "--output", ""]),
    (command.parse_arguments, ["--adapter", "x", "--output", "y", "--check", ""]),
])  # fmt: skip
def test_an_empty_name_is_not_the_working_directory(parse, flags, capsys):
    """A shell variable that is not set gives one."""
    with pytest.raises(SystemExit) as ending:
        parse(flags)
    flag = flags[-2]
    assert (ending.value.code, capsys.readouterr().err) == (2, f"error: {flag}: is empty. See --help.\n")


@pytest.mark.parametrize("error, line", [
    (OSError(errno.ENOSPC, "No space left", "out/metrics.jsonl"), "out/metrics.jsonl: cannot be written (No space left)"),
    (PermissionError(errno.EACCES, "Permission denied", "a\x1b[31m"), "a\\x1b[31m: cannot be used (Permission"),
    (OSError(errno.EMFILE, "Too many open files"), "system: cannot be used (Too many open files). Allow"),
    (ImportError("libx.so: cannot open shared object file: Too many open files"), "libraries: cannot be loaded (Too many open"),
    (RuntimeError("can't start new thread"), "threads: cannot be started. Allow more processes"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory: is full"),
    (MemoryError(), "memory: is full. Close other programs"),
])  # fmt: skip
def test_what_the_system_refuses_is_one_line_and_status_1(capsys, error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ending:
        cli.run(main)
    said = capsys.readouterr().err
    assert ending.value.code == 1 and said.startswith(f"error: {line}") and said.count("\n") == 1


@pytest.mark.parametrize(
    "address", ["http://a b", "http://a:x", "http://a:99999999", "huggingface.co", "file:///etc", "http://\x1bx"]
)
def test_an_endpoint_that_is_no_address_is_one_line(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UserError, match=r"^HF_ENDPOINT: .*is no address of a server"):
        cli.prepare_libraries()


@pytest.mark.parametrize("files, line", [
    (8, "ulimit -n: 8: allows too few open files. Use ulimit -n 1024."),
    (1024, "ulimit -u: 9: allows too few processes and threads. Use ulimit -u 4096."),
])  # fmt: skip
def test_low_limits_are_one_line(monkeypatch, capsys, files, line):
    def start(thread):
        raise RuntimeError("can't start new thread")  # what Python says at the limit; the superuser has none

    monkeypatch.setattr(cli.threading.Thread, "start", start)
    monkeypatch.setattr(cli.resource, "getrlimit", lambda kind: (files if kind == cli.resource.RLIMIT_NOFILE else 9, -1))
    with pytest.raises(SystemExit) as ending:
        cli.run(lambda: None)
    assert (ending.value.code, capsys.readouterr().err) == (2, f"error: {line}\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("a bug"), ImportError("a bug")])
def test_a_bug_is_no_line(error):
    def main():
        raise error

    with pytest.raises(type(error), match="a bug"):
        cli.run(main)


def test_nothing_that_a_library_quotes_moves_the_cursor(capsys):
    handler = logging.StreamHandler()
    logging.getLogger("a.library").addHandler(handler)
    logging.getLogger("a.library").warning("holds %s\nand more", "\x1b[31mred")
    cli._show_warning(UserWarning("holds\n\x1b[31mred"), UserWarning, "/x/library.py", 3)
    wrapping.say("holds \x1b[31mred\nand more")
    assert capsys.readouterr().err.splitlines() == [
        "holds \\x1b[31mred", "and more", "warning: holds \\x1b[31mred (library.py, line 3)", "holds \\x1b[31mred", "and more",
    ]  # fmt: skip


CLOSED = """\
import os, sys
from qlora_kit import cli, wrapping
def main():
    print("a message", file=sys.stderr)
    found = os.open({path!r}, os.O_WRONLY | os.O_CREAT)
    print(found, sys.stdin is None, sys.stdout is None)
    os.write(2, b"of a library")
    if sys.stdout is None:
        os.write(found, b"done")
cli.run(main)
"""


@pytest.mark.parametrize(
    ("closed", "said"), [("0<&-", "3 True False\n"), (">&-", ""), ("2>&-", "3 False False\n"), ("0<&- >&- 2>&-", "")]
)
def test_closed_streams_are_nobodys_file(root, tmp_path, closed, said):
    """Without them, the next file that is opened would get what is printed."""
    path = tmp_path / "file"
    command = f'"{sys.executable}" -c "$CODE" {closed}'
    environment = os.environ | {"CODE": CLOSED.format(path=str(path))}
    done = subprocess.run(command, shell=True, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, said)
    assert path.read_text() == ("" if said else "done")


@pytest.mark.parametrize("flags, line", [
    (["--adapter", "x", "--output", "y", "--adaptr=hf_x"], "--adaptr: is not a flag (did you mean --adapter?). See --help."),
    (["--adapter", "x", "--output", "y", "--xyzzy"], "--xyzzy: is not a flag. See --help."),
    (["--adapter"], "--adapter: expected one argument. See --help."),
    (["--adapter", "x", "--output", "y", "stray"], "command line: unrecognized arguments: stray. See --help."),
    (["--adapter", "x"], "command line: the following arguments are required: --output. See --help."),
])  # fmt: skip
def test_a_wrong_flag_is_one_line_that_starts_with_it(flags, line, capsys):
    with pytest.raises(SystemExit) as ending:
        command.parse_arguments(flags)
    assert (ending.value.code, capsys.readouterr().err) == (2, f"error: {line}\n")
