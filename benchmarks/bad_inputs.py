"""Feed the commands bad inputs: each must end in one line, in bounded time and memory, and run nothing.

    python benchmarks/bad_inputs.py --number 2000

Files of a small sound adapter, base model, data set, checkpoint and token cache are damaged in every way of a list; settings and
environments are set out of range. Each trial is a forked child of this process, which has imported the libraries, with a limit of
memory. It is wrong if it prints a traceback or a control character, if it takes SECONDS or BYTES more than the same command on
the sound input, if it runs code that an input brought, or if it ends with status 0 where no reason in ACCEPTED allows it.
Prints a Markdown table; the exit status is 1 if a trial was wrong. Same seed, same trials.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from damaged_files import ACCEPTED, damaged_data, damaged_files, damaged_settings
from tiny_runs import ROOT

SECONDS, BYTES = 30.0, 2**30  # beyond the same command on a sound input
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CANARY = "CODE-OF-AN-INPUT-RAN"
TRAIN = [
    "--config", "configs/tiny.yaml", "--max_length", "32", "--batch_size", "2", "--max_steps", "1",
    "--set", "training.gradient_accumulation_steps=1", "--set", "data.max_train_samples=4", "--set", "data.max_eval_samples=1",
    "--set", "training.save_steps=1", "--set", "training.logging_steps=1",
]  # fmt: skip


class Trial(NamedTuple):
    """One bad input.

    Attributes:
        kind: what is damaged, for the table.
        name: what was done to it.
        command: train, infer or merge.
        arguments: of the command; `{place}` stands for the trial's own folder, which holds a copy of the sound files.
        damage: what to do in that folder before.
    """

    kind: str
    name: str
    command: str
    arguments: Sequence[str]
    damage: Callable[[Path], None]


class Outcome(NamedTuple):
    status: int  # negative for a signal
    seconds: float
    bytes: int  # the most memory that was resident
    text: str


def run(trial: Trial, place: Path, seconds: float, extra_bytes: int) -> Outcome:
    """Run a trial in a forked child, and kill it after `seconds`."""
    begun = time.monotonic()
    said = place / "said.txt"
    pid = os.fork()
    if pid == 0:
        _run_here(trial, place, said, extra_bytes)
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - begun > seconds:
            os.killpg(pid, signal.SIGKILL)
            ended, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    return Outcome(os.waitstatus_to_exitcode(status), time.monotonic() - begun, usage.ru_maxrss * 1024, text)


def _run_here(trial: Trial, place: Path, said: Path, extra_bytes: int) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        for number, handle in (
            (0, os.open(os.devnull, os.O_RDONLY)),
            (1, os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)),
        ):
            os.dup2(handle, number)
        os.dup2(1, 2)
        os.environ["CANARY"] = str(place / CANARY)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        arguments = [word.replace("{place}", str(place)) for word in trial.arguments]
        call_command(trial.command, arguments)
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def call_command(name: str, arguments: list[str]) -> None:
    import inference_example
    import qlora_kit.merge.command
    import train_qlora
    from qlora_kit import cli

    script, main = {
        "train": ("train_qlora.py", train_qlora.main),
        "infer": ("inference_example.py", inference_example.main),
        "merge": ("merge", qlora_kit.merge.command.main),
    }[name]
    sys.argv = [script, *arguments]
    cli.run(main)


def import_libraries() -> None:
    """Import what the commands import, so that no trial does."""
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import transformers.integrations.bitsandbytes
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import inference_example  # noqa: F401
    import qlora_kit.inference.load
    import qlora_kit.merge.check
    import qlora_kit.merge.command
    import qlora_kit.training.build  # noqa: F401
    import train_qlora  # noqa: F401


def make_sound_files(place: Path) -> None:
    """Write a sound base model, data, and an adapter with its checkpoint into `place`."""
    shutil.copytree(ROOT / "assets" / "tiny-qwen2", place / "base")
    for path in (place / "base").iterdir():
        path.chmod(0o644)
    (place / "data").mkdir()
    for name in ("articles.txt", "alpaca.jsonl", "notes.csv", "sharegpt.json"):
        shutil.copy(ROOT / "samples" / name, place / "data" / name)
    trial = Trial("", "", "train", [*TRAIN, "--model_name", "{place}/base", "--output_dir", "{place}/adapter"], lambda _: None)
    outcome = run(trial, place, 300, 8 * BYTES)
    if outcome.status:
        raise SystemExit(outcome.text)


COMMANDS = {
    "plan": ("train", ["--config", "configs/tiny.yaml", "--plan", "--model_name", "{place}/base"]),
    "train": ("train", [*TRAIN, "--model_name", "{place}/base", "--output_dir", "{place}/new"]),
    "resume": ("train", [*TRAIN, "--model_name", "{place}/base", "--output_dir", "{place}/adapter", "--resume", "--max_steps",
    "2"]),
    "data": ("train", [*TRAIN, "--model_name", "{place}/base", "--output_dir", "{place}/new", "--dataset", "{place}/data/FILE"]),
    "preview": ("train", [*TRAIN, "--preview", "--model_name", "{place}/base", "--dataset", "{place}/data/FILE"]),
    "infer": (
        "infer",
        ["--mode", "text", "--prompt", "The river", "--max_new_tokens", "2", "--adapter", "{place}/adapter", "--device", "cpu"],
    ),
    "merge": ("merge", ["--adapter", "{place}/adapter", "--output", "{place}/merged", "--check", "none"]),
}  # fmt: skip


def all_trials() -> Iterator[Trial]:
    """Yield every trial of the lists, in their order."""
    for kind, file, uses in (
        ("adapter", "adapter/adapter_config.json", ("infer", "merge")),
        ("adapter", "adapter/run.json", ("infer", "merge")),
        ("adapter", "adapter/config.yaml", ("infer",)),
        ("adapter", "adapter/adapter_model.safetensors", ("infer", "merge")),
        ("adapter", "adapter/tokenizer_config.json", ("infer",)),
        ("adapter", "adapter/chat_template.jinja", ("infer",)),
        ("base model", "base/config.json", ("plan", "train")),
        ("base model", "base/generation_config.json", ("infer", "merge")),
        ("base model", "base/tokenizer_config.json", ("train",)),
        ("base model", "base/tokenizer.json", ("train",)),
        ("base model", "base/chat_template.jinja", ("chat",)),
        ("base model", "base/model.safetensors", ("train", "infer", "merge")),
        ("checkpoint", "adapter/checkpoints/checkpoint-1/manifest.json", ("resume",)),
        ("checkpoint", "adapter/checkpoints/checkpoint-1/adapter_model.safetensors", ("resume",)),
    ):
        for name, damage in damaged_files(file):
            for use in uses:
                command, arguments = COMMANDS["preview" if use == "chat" else use]
                chat = ["--config", "configs/instruct.yaml", "--dataset", "{place}/data/alpaca.jsonl"] if use == "chat" else []
                words = [word.replace("{place}/data/FILE", "{place}/data/alpaca.jsonl") for word in (*arguments, *chat)]
                yield Trial(kind, f"{use}: {file}: {name}", command, words, damage)
    for file, name, damage in damaged_data():
        for use in ("data", "preview"):
            command, arguments = COMMANDS[use]
            words = [word.replace("FILE", file) for word in arguments]
            yield Trial("data", f"{use}: {file}: {name}", command, [*words, "--set", "data.eval_split=null"], damage)
    for name, words, damage in damaged_settings():
        command, arguments = COMMANDS[words[0]]
        yield Trial("settings and places", name, command, [*arguments, *words[1:]], damage)


def judge(trial: Trial, outcome: Outcome, sound: Outcome, place: Path) -> str | None:
    """Return what is wrong with the outcome, or None."""
    if (place / CANARY).exists():
        return "ran code of an input"
    if outcome.status < 0:
        return f"died of signal {-outcome.status} after {outcome.seconds:.0f} s"
    if "Traceback (most recent call last)" in outcome.text:
        return "traceback: " + outcome.text.strip().splitlines()[-1][:150]
    if found := CONTROL.search(outcome.text.replace("\r\n", "\n")):
        return f"control character {found.group()!r}"
    if outcome.seconds > sound.seconds + SECONDS:
        return f"took {outcome.seconds:.0f} s"
    if outcome.bytes > sound.bytes + BYTES:
        return f"took {(outcome.bytes - sound.bytes) / BYTES:.1f} GiB more"
    if outcome.status == 0:
        return None if any(re.search(pattern, trial.name) for pattern in ACCEPTED) else "accepted"
    if not any(line.startswith("error: ") for line in outcome.text.splitlines()):
        return f"status {outcome.status} without an error line: {outcome.text[-150:]!r}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="of trials, drawn from all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="PATTERN", help="trials whose name this regular expression finds")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    trials = [trial for trial in all_trials() if re.search(arguments.only, trial.name)]
    random.Random(arguments.seed).shuffle(trials)
    trials = trials[: arguments.number]
    import_libraries()
    tried, wrong, accepted = Counter[str](), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as folder:
        top = Path(folder)
        os.environ["HF_DATASETS_CACHE"] = str(top / "cache")
        (top / "sound").mkdir()
        make_sound_files(top / "sound")
        sound: dict[str, Outcome] = {}
        for number, trial in enumerate(trials):
            use = trial.name.partition(":")[0] if trial.kind != "settings and places" else trial.command
            if use not in sound:
                plain = trial._replace(arguments=_without_damage(trial), damage=lambda _: None)
                sound[use] = _try(plain, top, 120.0)[0]
            outcome, problem = _try(trial, top, sound[use].seconds + 2 * SECONDS, sound[use])
            tried[trial.kind] += 1
            accepted[trial.kind] += outcome.status == 0
            if problem:
                wrong[trial.kind] += 1
                print(f"WRONG {trial.name}: {problem}", flush=True)
            print(f"\r{number + 1} of {len(trials)}", end="", file=sys.stderr)
    print("\n| damaged | tried | accepted, with a reason | wrong |\n|---|---|---|---|")
    for kind in tried:
        print(f"| {kind} | {tried[kind]} | {accepted[kind]} | {wrong[kind]} |")
    sys.exit(bool(sum(wrong.values())))


def _without_damage(trial: Trial) -> list[str]:
    """Return the arguments on sound data, to compare time and memory with."""
    return [re.sub(r"\{place\}/data/.*", "{place}/data/alpaca.jsonl", word) for word in trial.arguments]


def _try(trial: Trial, top: Path, seconds: float, sound: Outcome | None = None) -> tuple[Outcome, str | None]:
    place = top / "trial"
    shutil.copytree(top / "sound", place, symlinks=True)
    try:
        # run.json and adapter_config.json name the folder of the base model
        for path in (place / "adapter").glob("*.json"):
            path.write_text(path.read_text(encoding="utf-8").replace(str(top / "sound"), str(place)), encoding="utf-8")
        trial.damage(place)
        outcome = run(trial, place, seconds, 4 * BYTES)
        return outcome, judge(trial, outcome, sound, place) if sound else None
    finally:
        for path in place.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
