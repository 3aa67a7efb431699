"""Feed the commands bad inputs: each must end in one line, in bounded time and memory, and run nothing.

    python benchmarks/bad_inputs.py --number 2000 --workers 2

Files of a small sound adapter, base model, data set, checkpoint and token cache are damaged in every way of a list; settings and
environments are set out of range. Each trial is a forked child of this process, which has imported the libraries, with a limit of
memory; what depends on the process (streams, limits, environment, code that lies about) is started as a command of its own. A
trial is wrong if it prints a traceback or a control character, if it takes SECONDS or BYTES more than the same command on the
sound input, if it runs code that an input brought, or if it ends with status 0 where no reason in ACCEPTED allows it.
Prints Markdown tables; the exit status is 1 if a trial was wrong. Same seed, same trials.
"""

import argparse
import ctypes
import json
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
from odd_surroundings import Surroundings, odd_surroundings
from tiny_runs import ROOT

from qlora_kit.model.weight_files import read_header

SECONDS, BYTES = 30.0, 2**30  # beyond the same command on a sound input
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CANARY = "CODE-OF-AN-INPUT-RAN"
TRAIN = ["--config", "configs/tiny.yaml"]  # all by --set, which a later one overrides; a named flag would win
for setting in (
    "data.max_length=32", "training.batch_size=2", "training.max_steps=1", "training.gradient_accumulation_steps=1",
    "data.max_train_samples=4", "data.max_eval_samples=1", "training.save_steps=1", "training.logging_steps=1",
):  # fmt: skip
    TRAIN += ["--set", setting]


class Trial(NamedTuple):
    """One bad input.

    Attributes:
        kind: what is damaged, for the table.
        name: what was done to it.
        use: the command, a key of COMMANDS.
        more: flags behind the command's own; `{place}` stands for the trial's own folder, which holds a copy of the sound files.
        damage: what to do in that folder before.
        surroundings: of a process of its own; None runs the trial in a forked child.
    """

    kind: str
    name: str
    use: str
    more: Sequence[str]
    damage: Callable[[Path], None]
    surroundings: Surroundings | None = None


class Outcome(NamedTuple):
    status: int  # negative for a signal
    seconds: float  # of the processors: other programs may slow a trial down
    bytes: int  # the most memory that was resident
    text: str


def run(trial: Trial, place: Path, seconds: float, extra_bytes: int) -> Outcome:
    """Run a trial in a child, and kill it after `seconds`."""
    begun = time.monotonic()
    said = place / "said.txt"
    command, arguments = COMMANDS[trial.use]
    arguments = [word.replace("{place}", str(place)) for word in (*arguments, *trial.more)]
    pid = os.fork()
    if pid == 0:
        try:
            _redirect(said)
            os.environ["CANARY"] = str(place / CANARY)
            if trial.surroundings is not None:
                trial.surroundings.start(command, arguments, place)
            _run_here(command, arguments, extra_bytes)
        finally:
            os._exit(1)
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
    return Outcome(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text)


def _redirect(said: Path) -> None:
    os.setpgid(0, 0)
    for number, handle in (
        (0, os.open(os.devnull, os.O_RDONLY)),
        (1, os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)),
    ):
        os.dup2(handle, number)
    os.dup2(1, 2)


def _run_here(command: str, arguments: list[str], extra_bytes: int) -> None:
    status = 1
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        _obey_permissions()
        call_command(command, arguments)
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _obey_permissions() -> None:
    """Take from the superuser, on Linux, the right to read and search what its permissions forbid."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of 32 capabilities each, twice
    libc = ctypes.CDLL(None)
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        libc.capset(header, sets)


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
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (place / "base" / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    shutil.copytree(place / "base", place / "sharded")
    shard = (place / "sharded" / "model.safetensors").rename(place / "sharded" / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(read_header(shard), shard.name)}
    (place / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (place / "data").mkdir()
    for name in ("articles.txt", "alpaca.jsonl", "notes.csv", "sharegpt.json"):
        shutil.copy(ROOT / "samples" / name, place / "data" / name)
    trial = Trial("", "", "train", ["--output_dir", "{place}/adapter"], lambda _: None)
    outcome = run(trial, place, 300, 8 * BYTES)
    if outcome.status:
        raise SystemExit(outcome.text)


SOUND = "{place}/data/alpaca.jsonl"
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "plan": ("train", ["--config", "configs/tiny.yaml", "--plan", "--model_name", "{place}/base"]),
    "train": ("train", [*TRAIN, "--model_name", "{place}/base", "--output_dir", "{place}/new"]),
    "sharded": ("train", [*TRAIN, "--model_name", "{place}/sharded", "--output_dir", "{place}/new"]),
    "resume": (
        "train",
        [*TRAIN, "--model_name", "{place}/base", "--output_dir", "{place}/adapter", "--resume", "--set", "training.max_steps=2"],
    ),
    "data": ("train", [*TRAIN, "--model_name", "{place}/base", "--output_dir", "{place}/new", "--dataset", SOUND]),
    "preview": ("train", [*TRAIN, "--preview", "--model_name", "{place}/base", "--dataset", SOUND]),
    "chat": ("train", ["--preview", "--config", "configs/instruct.yaml", "--model_name", "{place}/base", "--dataset", SOUND]),
    "infer": (
        "infer",
        ["--mode", "text", "--prompt", "The river", "--max_new_tokens", "2", "--adapter", "{place}/adapter", "--device", "cpu"],
    ),
    "merge": ("merge", ["--adapter", "{place}/adapter", "--output", "{place}/merged", "--check", "none"]),
}
FILES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
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
    ("base model", "base/special_tokens_map.json", ("train",)),
    ("base model", "sharded/model.safetensors.index.json", ("sharded",)),
    ("base model", "base/chat_template.jinja", ("chat",)),
    ("base model", "base/model.safetensors", ("train", "infer", "merge")),
    ("checkpoint", "adapter/checkpoints/checkpoint-1/manifest.json", ("resume",)),
    ("checkpoint", "adapter/checkpoints/checkpoint-1/adapter_model.safetensors", ("resume",)),
)


def all_trials() -> Iterator[Trial]:
    """Yield every trial of the lists, in their order."""
    for kind, file, uses in FILES:
        for name, damage in damaged_files(file):
            yield from (Trial(kind, f"{use}: {file}: {name}", use, [], damage) for use in uses)
    for file, name, damage in damaged_data():
        words = ["--dataset", f"{{place}}/data/{file}", "--set", "data.eval_split=null"]
        yield from (Trial("data", f"{use}: {file}: {name}", use, words, damage) for use in ("data", "preview"))
    for name, (use, *words), damage in damaged_settings():
        yield Trial("settings and places", name, use, words, damage)
    for name, use, surroundings, damage in odd_surroundings():
        yield Trial("a process of its own", f"own: {use}: {name}", use, [], damage, surroundings)


def judge(trial: Trial, outcome: Outcome, sound: Outcome, place: Path) -> str | None:
    """Return what is wrong with the outcome, or None."""
    if (place / CANARY).exists():
        return "ran code of an input"
    if outcome.status < 0:
        return f"died of signal {-outcome.status} after {outcome.seconds:.0f} s of computing"
    if "Traceback (most recent call last)" in outcome.text:
        return "traceback: " + outcome.text.strip().splitlines()[-1][:150]
    if found := CONTROL.search(outcome.text.replace("\r\n", "\n")):
        return f"control character {found.group()!r}"
    if outcome.seconds > sound.seconds + SECONDS:
        return f"took {outcome.seconds:.0f} s"
    if outcome.bytes > sound.bytes + BYTES:
        return f"took {(outcome.bytes - sound.bytes) / BYTES:.1f} GiB more"
    if outcome.status == 0:
        return None if trial.surroundings or reason_to_accept(trial) else "accepted"
    if (trial.surroundings is None or trial.surroundings.can_be_heard) and not any(
        line.startswith("error: ") for line in outcome.text.splitlines()
    ):
        return f"status {outcome.status} without an error line: {outcome.text[-150:]!r}"
    return None


def reason_to_accept(trial: Trial) -> str | None:
    return next((reason for pattern, reason in ACCEPTED.items() if re.search(pattern, trial.name)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="of trials, drawn from all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="PATTERN", help="trials whose name this regular expression finds")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="trials at once (default: the cores, %(default)s)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    found = [trial for trial in all_trials() if re.search(arguments.only, trial.name)]
    random.Random(arguments.seed).shuffle(found)
    own = [trial for trial in found if trial.surroundings][: max(150, arguments.number // 10)]
    trials = own + [trial for trial in found if not trial.surroundings]
    trials = trials[: arguments.number]
    begun = time.monotonic()
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as folder:
        top = Path(folder)
        top.chmod(0o755)
        os.environ["HF_DATASETS_CACHE"] = str(top / "cache")
        (top / "sound").mkdir()
        make_sound_files(top / "sound")
        results = try_all(trials, top, max(1, arguments.workers))
    print_tables(trials, results)
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{len(trials)} trials in {minutes:.1f} minutes, {arguments.workers} at once, seed {arguments.seed}")
    sys.exit(any(problem for _, problem in results.values()))


def try_all(trials: list[Trial], top: Path, workers: int) -> dict[int, tuple[int, str | None]]:
    """Try all, dealt out to some processes; return the status and the problem of each by its number."""
    uses = {(trial.use, trial.surroundings is not None) for trial in trials}
    plain = {pair: Trial("", "", pair[0], [], lambda _: None, Surroundings() if pair[1] else None) for pair in sorted(uses)}
    sound = {pair: _try(trial, top, 120.0)[0] for pair, trial in plain.items()}
    for (use, _), outcome in sound.items():
        if outcome.status:
            raise SystemExit(f"{use} fails on the sound input: {outcome.text}")
    children = {}
    for worker in range(workers):
        if (pid := os.fork()) == 0:
            try:
                _try_each(range(worker, len(trials), workers), trials, top, sound)
            finally:
                os._exit(0)
        children[pid] = worker
    try:
        for _ in range(workers):
            children.pop(os.wait()[0])
    finally:
        for pid in children:
            os.kill(pid, signal.SIGTERM)
    lines = [line for path in sorted(top.glob("results-*")) for line in path.read_text(encoding="utf-8").splitlines()]
    return {number: (status, problem) for number, status, problem in map(json.loads, lines)}


def _try_each(numbers: range, trials: list[Trial], top: Path, sound: dict[tuple[str, bool], Outcome]) -> None:
    with (top / f"results-{os.getpid()}").open("w", encoding="utf-8") as file:
        for number in numbers:
            trial = trials[number]
            usual = sound[trial.use, trial.surroundings is not None]
            outcome, problem = _try(trial, top, 5 * (usual.seconds + SECONDS), usual)
            if problem:
                print(f"WRONG {trial.name!r}: {problem}", flush=True)
            print(json.dumps([number, outcome.status, problem]), file=file, flush=True)
            print(f"\r{number + 1} of {len(trials)}", end="", file=sys.stderr)


def print_tables(trials: list[Trial], results: dict[int, tuple[int, str | None]]) -> None:
    """Print what was tried, accepted and wrong by kind, and why what was accepted is right."""
    tried, wrong, accepted, reasons = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for number, trial in enumerate(trials):
        status, problem = results.get(number, (1, "its worker died"))
        tried[trial.kind] += 1
        wrong[trial.kind] += problem is not None
        accepted[trial.kind] += status == 0
        if status == 0 and problem is None:
            reasons["the surroundings do not matter" if trial.surroundings else str(reason_to_accept(trial))] += 1
    print("\n| damaged | tried | accepted, with a reason | wrong |\n|---|---|---|---|")
    for kind in tried:
        print(f"| {kind} | {tried[kind]} | {accepted[kind]} | {wrong[kind]} |")
    print("\n| accepted, because | trials |\n|---|---|")
    for reason, count in reasons.most_common():
        print(f"| {reason} | {count} |")


def _try(trial: Trial, top: Path, seconds: float, sound: Outcome | None = None) -> tuple[Outcome, str | None]:
    place = top / f"trial-{os.getpid()}"
    shutil.copytree(top / "sound", place, symlinks=True)
    try:
        # run.json and adapter_config.json name the folder of the base model
        for path in (place / "adapter").glob("*.json"):
            path.write_text(path.read_text(encoding="utf-8").replace(str(top / "sound"), str(place)), encoding="utf-8")
        _damage(trial, place)
        outcome = run(trial, place, seconds, 4 * BYTES)
        return outcome, judge(trial, outcome, sound, place) if sound else None
    finally:
        for path in place.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(place)


def _damage(trial: Trial, place: Path) -> None:
    """Damage the files in a child: the memory that this takes would count as that of the trials."""
    if (pid := os.fork()) == 0:
        try:
            trial.damage(place)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, f"{trial.name}: the damage failed"


if __name__ == "__main__":
    main()
