"""Merge an adapter into its base model: a folder that transformers loads without peft and without bitsandbytes.

    python -m qlora_kit.merge --adapter output_tiny --output merged
    python -m qlora_kit.merge --adapter output_tiny --output merged --base dequantized

The update is added to the original 16-bit weights, or with --base dequantized to the weights that training saw: packed to 4 bits
and unpacked again. One tensor is in memory at a time. Then the perplexity of the merged model is compared with that of base +
adapter; exit status 1 means that they differ by more than they may.
"""

import argparse
import re
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qlora_kit import cli
from qlora_kit.adapter.folder import AdapterSource, check_base, fetch_base, load_checked_tokenizer, read_adapter
from qlora_kit.adapter.lora_pairs import read_pairs
from qlora_kit.config import GIB
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.merge.folder import Base, record_check, write_small_files
from qlora_kit.merge.place import SMALL_FILES_BYTES, check_output, disk_errors, open_output, put_in_place
from qlora_kit.model import hub
from qlora_kit.output.folder import require_space
from qlora_kit.secrets import redact
from qlora_kit.wrapping import say

if TYPE_CHECKING:
    from qlora_kit.merge.check import Comparison
    from qlora_kit.merge.weights import MergePlan

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MergeResult:
    """A merged model.

    Attributes:
        folder: loads with transformers alone.
        files: names of its safetensors files.
        nbytes: bytes of its weights.
        seconds: time that writing took.
        check: comparison with base + adapter, with `passed` and `lines()`; None if there was none.
    """

    folder: Path
    files: list[str]
    nbytes: int
    seconds: float
    check: "Comparison | None"


def merge(
    adapter: str | Path,
    output: str | Path,
    base: Base = "original",
    *,
    check: bool | str | Path = True,
    device: str = "auto",
    device_map: str = "auto",
    max_shard_size: str = "4GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Merge an adapter into its base model and compare the result with base + adapter.

        result = merge("output_tiny", "merged")
        result.check.passed

    Args:
        adapter: the folder that train_qlora.py wrote, a checkpoint of it, or any plain LoRA adapter of peft.
        output: folder for the merged model: new, or empty.
        base: the weights to add the update to: `original` are the model's own, `dequantized` those that training saw.
        check: a file of text or records to compare on; True takes the run's evaluation data, else samples/articles.txt; False
            compares nothing.
        device: auto, cuda or cpu, for packing and for the check.
        device_map: for the check; auto takes several GPUs if the first has no room, one always takes the first.
        max_shard_size: of a file; the base's own files are kept if none is larger.
        overwrite: replace the merged model that `output` holds.
        trust_remote_code: run Python code that comes with the base model.

    Raises:
        UserError: an argument is wrong, the adapter cannot be merged or was trained on other base weights, or there is no room
            on the disk or the GPUs; nothing was written.
        Failed: the disk refuses, or the GPU's memory is full during the check.
    """
    shard_bytes = parse_size(max_shard_size)
    source = read_adapter(str(adapter), trust_remote_code)
    for note in source.notes:
        say(redact(note))
    check_base_choice(base, source)
    pairs = read_pairs(source)
    folder = check_output(str(output), overwrite, source)
    hub.prepare(source.model.name)
    base_folder = fetch_base(source, hub.fetch_model)
    check_base(source)

    from qlora_kit.merge import check as checks
    from qlora_kit.merge import weights

    packing = weights.training_packing(source, device)
    plan = weights.plan_merge(base_folder, source, pairs, packing if base == "dequantized" else None)
    require_space("--output", folder, plan.nbytes + SMALL_FILES_BYTES)
    tokenizer = load_checked_tokenizer(source)
    if check:
        name = None if check is True else str(check)
        blocks, data = checks.load_check_blocks(source, name, tokenizer, hub.read_context(base_folder))
        device_maps = checks.choose_device_maps(source, base_folder, packing, device_map)
    say(redact(_describe(source, base, len(pairs))))
    started = time.monotonic()
    with open_output(folder, overwrite, plan.nbytes) as staging:
        with disk_errors(folder, plan.nbytes):
            files = _write_weights(plan, staging, shard_bytes)
            write_small_files(staging, base_folder, source, tokenizer, base, len(plan.recipes))
            put_in_place(staging, folder)
        result = MergeResult(folder, files, plan.nbytes, time.monotonic() - started, None)
        if not check:
            return result
        say(redact(f"{folder} is written. Checking: base + adapter, then the merged model"))
        losses = checks.compare_models(folder, source, packing, device_maps, blocks)
        same_weights = base == "dequantized" or not source.quantization.load_in_4bit
        comparison = checks.compare_losses(*losses, same_weights, data)
        with disk_errors(folder, plan.nbytes):
            record_check(folder, comparison.as_json())
    return replace(result, check=comparison)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 4GB; raises UserError if it is no size."""
    found = re.fullmatch(r"(\d{0,9}\.?\d{1,9}) *([KMG]I?B)", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise UserError("--max_shard_size", text, "is no size", "use a number with its unit, such as 4GB or 500MiB")
    return size


def check_base_choice(base: str, source: AdapterSource) -> None:
    """Check that the adapter can be merged onto these weights; raises UserError if not."""
    if base not in get_args(Base):
        raise UserError("--base", base, "names no weights", f"use {' or '.join(get_args(Base))}")
    if base == "dequantized" and not source.quantization.load_in_4bit:
        problem = f"needs a 4-bit base, and {source.folder} was trained on a 16-bit one"
        raise UserError("--base", base, problem, "use --base original")


def _describe(source: AdapterSource, base: Base, matrices: int) -> str:
    quantization = source.quantization
    packed = f"{quantization.quant_type.upper()}{' with double quantization' if quantization.use_double_quant else ''}"
    onto = "its original weights" if base == "original" else f"its weights after {packed}"
    line = f"Merging {matrices} matrices of {source.folder} into {source.model.name}, onto {onto}"
    if source.provenance:
        return line
    assumed = packed if quantization.load_in_4bit else "16 bits"
    return f"{line}\n{source.folder} has no run.json: assuming that its base model was in {assumed} in training"


def _write_weights(plan: "MergePlan", folder: Path, shard_bytes: int) -> list[str]:
    """Merge and write all tensors, with a progress bar on a terminal; return the names of the files."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from qlora_kit.merge.write import write_weights

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=None), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=plan.nbytes)
        return write_weights(plan.tensors, plan.merge_tensor, folder, shard_bytes, lambda count: progress.advance(task, count))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.OneLineParser(__doc__, prog="python -m qlora_kit.merge")
    parser.add_argument("--adapter", type=cli.nonempty, required=True, metavar="DIR", help="folder that train_qlora.py wrote")
    parser.add_argument(
        "--output", type=cli.nonempty, required=True, metavar="DIR", help="folder for the merged model: new, or empty"
    )
    parser.add_argument(
        "--base",
        choices=get_args(Base),
        default="original",
        help="weights to add the update to: the model's own, or those that training saw (default: %(default)s)",
    )
    parser.add_argument(
        "--max_shard_size",
        default="4GB",
        metavar="SIZE",
        help="of a file, such as 500MB; the base's own files are kept if none is larger (default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        type=cli.nonempty,
        metavar="FILE",
        help="text or records to compare on, or none (default: the run's evaluation data, else samples/articles.txt)",
    )
    cli.add_loading_flags(parser, "for packing and the check; ")
    parser.add_argument("--overwrite", action="store_true", help="replace the merge that the output folder holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    cli.prepare_libraries()
    check = {None: True, "none": False}.get(arguments.check, arguments.check)
    result = merge(**vars(arguments) | {"check": check})  # each flag is one of its arguments
    count = f"{len(result.files)} file{'s' if len(result.files) > 1 else ''}"
    print(f"Merged: {redact(str(result.folder))} ({result.nbytes / GIB:.2f} GiB in {count}, {result.seconds:.0f} s)")
    if result.check:
        print(*result.check.lines(), sep="\n", flush=True)
        if not result.check.passed:
            hint = "" if result.check.same_weights else ", or merge onto the weights it was trained on: --base dequantized"
            difference = "the merged model differs from base + adapter by more than it may"
            raise Failed(f"{difference}; {result.folder} is kept: do not trust it{hint}")


def run() -> None:
    """Run the command as a process: SIGTERM and SIGHUP, unless nohup ignores it, remove the unfinished output."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    cli.run(main)


def _terminate(number: int, *_: Any) -> None:
    raise Stopped(128 + number, "stopped")
