"""Does 4-bit training work on this machine? Each part of it is tried, and what fails is named with what mends it.

    python -m qlora_kit.doctor                  a table: pass, fail or skipped, and what was measured
    python -m qlora_kit.doctor --device cpu     leave the GPU out
    python -m qlora_kit.doctor --json           the same as one JSON object

Exit status: 0 nothing failed, 1 something did, 2 a wrong flag.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from qlora_kit import cli
from qlora_kit.config import Config
from qlora_kit.doctor.run_checks import Check, Problem, Result, examine

SECONDS = 120.0  # that a check may take: the first one that imports torch from a slow disk needs them
COMPILE_SECONDS = 300.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.OneLineParser(__doc__, prog="python -m qlora_kit.doctor")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="what to compute on (default: the GPU where there is one)")
    return parser.parse_args(argv)


def all_checks(wanted: str) -> list[Check]:
    """Every check, those first whose failure explains others.

    Args:
        wanted: auto, cuda or cpu.
    """
    from qlora_kit.doctor import machine_checks as at

    output = Path(Config().training.output_dir)
    try:
        packages = [
            Check(name, at.package_version, (requirement,), at.INSTALL, SECONDS)
            for name, requirement in at.read_requirements().items()
        ]
    except (Problem, ImportError):  # the check says it again, with its fix
        packages = [Check("packages", at.requirements_file, (), at.INSTALL, SECONDS)]
    return [
        Check("Python", at.python_version, (), "install Python 3.11 or newer", SECONDS),
        *packages,
        Check("GPU", at.gpu, (wanted,), "nvidia-smi: it names what the driver lacks", SECONDS),
        *(
            Check(name, compute, (function, wanted), fix, seconds)
            for name, function, fix, seconds in (
                ("4-bit product", "four_bit_product", "python -m bitsandbytes: it names the library that is missing", SECONDS),
                ("8-bit Adam", "eight_bit_adam", "python -m bitsandbytes: it names the library that is missing", SECONDS),
                ("bfloat16", "bfloat16", "set quantization.compute_dtype to float16, or float32 on a CPU", SECONDS),
                ("attention", "attention", at.INSTALL, SECONDS),
            )
        ),
        Check("C compiler", at.c_compiler, (wanted,), "sudo apt install gcc python3-dev", SECONDS),
        *(
            Check(name, compute, (function, wanted), f"train without: --set performance.{key}=false", COMPILE_SECONDS)
            for name, function, key in (
                ("Triton kernel", "triton_kernel", "fused_lora"),
                ("torch.compile", "compiled_function", "compile"),
                ("CUDA graph", "captured_graph", "cuda_graphs"),
            )
        ),
        Check("host memory", at.host_memory, (), at.INSTALL, SECONDS),
        Check("disk speed", at.disk_speed, (output,), "name a folder on another disk: --output_dir DIR", SECONDS),
        Check("disk space", at.free_space, (output,), "name a folder on another disk: --output_dir DIR", SECONDS),
        Check("Hub", at.hub_answers, (), "HF_HUB_OFFLINE=1 works without it", SECONDS),
        Check("default model", at.default_model, (), "hf download " + Config().model.name, SECONDS),
        Check("Hub cache", at.room_for_model, (wanted,), "export HF_HOME=a folder on a disk with more room", SECONDS),
    ]


def compute(name: str, wanted: str) -> str:
    """A check of compute_checks.py. torch is imported here, in the process beside: where it cannot be, the check has failed."""

    from qlora_kit.doctor import compute_checks

    return getattr(compute_checks, name)(wanted)


def show_table(results: Iterable[Result]) -> list[Result]:
    """A row for each check as it ends, in colour on a terminal."""
    from rich.text import Text

    console, shown = cli.results_console(highlight=False), []
    for result in results:
        shown.append(result)
        colour = {"pass": "green", "fail": "bold red", "skipped": "yellow"}[result.status]
        console.print(Text.assemble((f"{result.status:<9}", colour), f"{result.name:<14} {result.measured}"), soft_wrap=True)
        if result.fix:
            console.print(Text(f"{'':<9}{'':<15}fix: {result.fix}", style="bold"), soft_wrap=True)
    counts = [f"{sum(result.status == status for result in shown)} {word}" for status, word in
              (("pass", "passed"), ("fail", "failed"), ("skipped", "skipped"))]  # fmt: skip
    console.print(Text("\n" + ", ".join(counts)), soft_wrap=True)
    return shown


def as_json(wanted: str, results: list[Result]) -> str:
    return json.dumps(
        {
            "passed": not any(result.status == "fail" for result in results),
            "device": wanted,
            "checks": [asdict(result) | {"seconds": round(result.seconds, 3)} for result in results],
        },
        indent=2,
    )


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    wanted = arguments.device or "auto"
    with closing(examine(all_checks(wanted))) as results:
        ended = list(results) if arguments.json else show_table(results)
    if arguments.json:
        print(as_json(wanted, ended))
    if any(result.status == "fail" for result in ended):
        sys.stdout.flush()
        sys.exit(1)
