"""Check that 4-bit training works on this machine: every component is tried, and each failure comes with its fix.

    python -m qlora_kit.doctor                  a table: pass, fail or skipped, and the measurement
    python -m qlora_kit.doctor --device cpu     leave the GPU out
    python -m qlora_kit.doctor --json           the same as one JSON object

Exit status: 0 nothing failed, 1 something failed, 2 a wrong flag.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from qlora_kit import cli
from qlora_kit.config import Config
from qlora_kit.doctor import machine_checks
from qlora_kit.doctor.run_checks import Check, CheckFailed, Result, run_checks
from qlora_kit.shipped import INSTALL, spell_command
from qlora_kit.wrapping import fit, say

COMPILE_SECONDS = 300.0
BITSANDBYTES = "run python -m bitsandbytes: it names the missing library"
COLOURS = {"pass": "green", "fail": "bold red", "skipped": "yellow"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = cli.OneLineParser(__doc__, prog="python -m qlora_kit.doctor")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="the device to compute on (default: the GPU if there is one)")
    return parser.parse_args(argv)


def all_checks(device: str) -> list[Check]:
    """Return every check; those whose failure explains others come first.

    Args:
        device: auto, cuda or cpu.
    """
    output, model = Path(Config().training.output_dir), Config().model.name
    return [
        Check("Python", machine_checks.python_version, (), "install Python 3.11 or newer"),
        *_package_checks(),
        Check("GPU", machine_checks.gpu, (device,), "run nvidia-smi: it names the problem of the driver"),
        Check("4-bit product", compute, ("four_bit_product", device), BITSANDBYTES),
        Check("8-bit Adam", compute, ("eight_bit_adam", device), BITSANDBYTES),
        Check("bfloat16", compute, ("bfloat16", device), "set quantization.compute_dtype to float16, or to float32 on a CPU"),
        Check("attention", compute, ("attention", device), INSTALL),
        Check("C compiler", machine_checks.c_compiler, (device,), machine_checks.INSTALL_COMPILER),
        _fast_path_check("Triton kernel", "triton_kernel", device, "fused_lora"),
        _fast_path_check("torch.compile", "compiled_function", device, "compile"),
        _fast_path_check("CUDA graph", "captured_graph", device, "cuda_graphs"),
        Check("host memory", machine_checks.host_memory, (), INSTALL),
        Check("disk speed", machine_checks.disk_speed, (output,), machine_checks.OTHER_DISK),
        Check("disk space", machine_checks.free_space, (output,), machine_checks.OTHER_DISK),
        Check("Hub", machine_checks.hub_answers, (), "set HF_HUB_OFFLINE=1 to work without it"),
        Check("default model", machine_checks.default_model, (), f"hf download {model}"),
        Check("Hub cache", machine_checks.room_for_model, (device,), machine_checks.MOVE_CACHE),
    ]


def _package_checks() -> list[Check]:
    try:
        requirements = machine_checks.read_requirements()
    except (CheckFailed, ImportError):  # this check reads them too, and reports why it fails
        return [Check("packages", machine_checks.reinstall, ("torch",), INSTALL)]
    return [Check(name, machine_checks.package_version, (line,), INSTALL) for name, line in requirements.items()]


def _fast_path_check(name: str, function: str, device: str, switch: str) -> Check:
    return Check(name, compute, (function, device), f"train without it: --set performance.{switch}=false", COMPILE_SECONDS)


def compute(name: str, device: str) -> str:
    """Run a check of compute_checks.py and return its measurement.

    torch is imported here, in the process of the check: if the import fails, the check fails.
    """
    from qlora_kit.doctor import compute_checks

    return getattr(compute_checks, name)(device)


def print_table(results: Iterable[Result]) -> list[Result]:
    """Print a row for each result as it arrives, in colour on a terminal, and return the results."""
    console, printed = cli.results_console(highlight=False), []
    for result in results:
        printed.append(result)
        row = Text(fit(f"{result.status:<9}{result.name:<14} {result.measured}", sys.stdout))
        row.stylize(COLOURS[result.status], 0, len(result.status))
        console.print(row, soft_wrap=True)
        if result.fix:
            console.print(Text(fit(f"{'':<9}fix: {result.fix}", sys.stdout), style="bold"), soft_wrap=True)
    counts = Counter(result.status for result in printed)
    say(f"\n{counts['pass']} passed, {counts['fail']} failed, {counts['skipped']} skipped", sys.stdout)
    say(next_step(printed), sys.stdout)
    return printed


def next_step(results: list[Result]) -> str:
    """Return what to do after these results, with its command on a line of its own."""
    status = {result.name: result.status for result in results}
    if "fail" in status.values():
        return "Mend what failed, and run the doctor again."
    train = spell_command("train_qlora.py")
    if status.get("GPU") == "pass":
        return f"This machine can train on its GPU. What fits, and how long it takes:\n  {train} --plan"
    return f"This machine can train the laptop model:\n  {train} --config configs/tiny.yaml"


def format_json(device: str, results: list[Result]) -> str:
    """Return the results as one JSON object."""
    passed = not any(result.status == "fail" for result in results)
    checks = [asdict(result) | {"seconds": round(result.seconds, 3)} for result in results]
    return json.dumps({"passed": passed, "device": device, "checks": checks}, indent=2)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = parse_arguments(argv)
    device = arguments.device or "auto"
    with closing(run_checks(all_checks(device))) as arriving:
        results = list(arriving) if arguments.json else print_table(arriving)
    if arguments.json:
        print(format_json(device, results))
    if any(result.status == "fail" for result in results):
        sys.stdout.flush()
        sys.exit(1)
