"""Merge an adapter into its base model: a folder that transformers loads without peft and without bitsandbytes.

    python -m qlora_kit.merge --adapter output_tiny --output merged
    python -m qlora_kit.merge --adapter output_tiny --output merged --base dequantized

Onto the original 16-bit weights, or with --base dequantized onto what training saw: the weights packed to 4 bits and unpacked
again. One tensor is in memory at a time. Then the perplexity of the merged model is compared with that of base + adapter;
exit status 1 says that they differ by more than they may.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import cli
from qlora_kit.adapter.folder import AdapterSource, fetch_base, read_adapter
from qlora_kit.adapter.lora_pairs import read_pairs
from qlora_kit.config import GIB, ModelSettings
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.merge.folder import check_disk, check_output, copy_small_files, record_check, staged, write_mark
from qlora_kit.model import hub
from qlora_kit.model.hub import TOKENIZER_FILES, fetch_model, is_local, read_context
from qlora_kit.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.merge.weights import Merge, Packing
    from qlora_kit.model.load import DeviceMap

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.OneLineParser(__doc__, prog="python -m qlora_kit.merge")
    parser.add_argument("--adapter", type=cli.nonempty, required=True, metavar="DIR", help="folder that train_qlora.py wrote")
    parser.add_argument(
        "--output", type=cli.nonempty, required=True, metavar="DIR", help="folder for the merged model: new, or empty"
    )
    parser.add_argument(
        "--base",
        choices=["original", "dequantized"],
        default="original",
        help="weights to add the update to: the model's own, or those that training saw (default: %(default)s)",
    )
    parser.add_argument(
        "--max_shard_size",
        default="4GB",
        metavar="SIZE",
        help="of a file, such as 500MB; smaller ones of the base are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        type=cli.nonempty,
        metavar="FILE",
        help="text or records to compare on, or none (default: the run's evaluation data, else samples/articles.txt)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base model")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="for packing and for the check")
    parser.add_argument(
        "--device_map",
        choices=["auto", "one"],
        default="auto",
        help="for the check; auto: over several GPUs where the first cannot hold a model; one: onto the first in any case",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the merge that the output folder holds")
    return parser.parse_args(argv)


def parse_size(text: str) -> int:
    """Bytes.

    Raises:
        UserError: no size.
    """
    number = text.rstrip("".join(map(chr, range(65, 123))) + " ")
    try:
        size = int(float(number) * UNITS[text[len(number) :].strip().upper()])
        if size < 1:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--max_shard_size: {text!r}: should be a number with its unit, such as 4GB or 500MiB") from None
    return size


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    limit = parse_size(arguments.max_shard_size)
    source = read_adapter(arguments.adapter, arguments.trust_remote_code)
    for note in source.notes:
        print(note, file=sys.stderr)
    key = f"--adapter {arguments.adapter}"
    if arguments.base == "dequantized" and not source.quantization.load_in_4bit:
        raise UserError(f"--base dequantized: {source.folder} was trained on a 16-bit base; use --base original")
    pairs = read_pairs(source.folder, key)
    output = check_output(arguments.output, arguments.overwrite, source)
    cli.prepare_libraries()
    hub.prepare(source.model.name)
    base = fetch_base(source, fetch_model)

    from qlora_kit.merge.check import check_blocks
    from qlora_kit.merge.weights import plan_merge

    loading = how_loaded(source, arguments.device)
    merge = plan_merge(base, source.model, pairs, loading if arguments.base == "dequantized" else None, key)
    check_disk(output, merge.nbytes)
    tokenizer = _load_tokenizer(source, base)
    checked = None if arguments.check == "none" else check_blocks(source, arguments.check, tokenizer, read_context(base))
    device_maps = place_models(source, base, loading, arguments.device_map) if checked else []
    say_what_is_merged(source, arguments.base, len(pairs))
    write_merge(output, merge, limit, base, source, tokenizer, arguments.base)
    if checked:
        check_merge(output, source, base, loading, arguments.base, device_maps, *checked)


def _load_tokenizer(source: AdapterSource, base: Path) -> "PreTrainedTokenizerBase":
    """The adapter's, with the chat template it was trained with; the base model's where it brings none."""
    brings_one = any((source.folder / name).is_file() for name in TOKENIZER_FILES)
    folder = source.folder if brings_one else base
    return load_tokenizer(ModelSettings(name=str(folder), trust_remote_code=source.model.trust_remote_code))


def how_loaded(source: AdapterSource, device: str) -> "Packing":
    """How the base model was loaded for training, on the device that is here."""
    from qlora_kit.merge.weights import Packing
    from qlora_kit.model.device import choose_device, usable_dtype

    device = choose_device(device, "--device")
    dtype, _ = usable_dtype(source.quantization.compute_dtype, device, insisted=False)
    return Packing(source.quantization, dtype, device)


def place_models(source: AdapterSource, base: Path, loading: "Packing", wanted: str) -> "list[DeviceMap]":
    """Where the check loads base + adapter, and then the merged model, which is not packed.

    Raises:
        UserError: there is no room for one of them; nothing has been written yet.
    """
    from qlora_kit.model.gpu_placement import choose_device_map

    found = []
    for packed in (source.quantization.load_in_4bit, False):
        quantization = source.quantization.model_copy(update={"load_in_4bit": packed})
        try:
            device_map, note = choose_device_map(base, source.model, quantization, loading.dtype, loading.device, wanted)
        except UserError as error:
            raise UserError(*(f"{problem}; or do not check: --check none" for problem in error.lines)) from None
        if note:
            print(note, file=sys.stderr)
        found.append(device_map)
    return found


def say_what_is_merged(source: AdapterSource, base: str, matrices: int) -> None:
    quantization = source.quantization
    packed = f"{quantization.quant_type.upper()}{' with double quantization' if quantization.use_double_quant else ''}"
    onto = "its original weights" if base == "original" else f"its weights as {packed} leaves them"
    print(f"Merging {matrices} matrices of {source.folder} into {source.model.name}, onto {onto}", file=sys.stderr)
    if not source.complete:
        assumed = packed if quantization.load_in_4bit else "16 bits"
        print(f"{source.folder} has no run.json: taking its base model to have been in {assumed} in training", file=sys.stderr)


def write_merge(
    output: Path, merge: "Merge", limit: int, base: Path, source: AdapterSource, tokenizer: "PreTrainedTokenizerBase", onto: str
) -> None:
    """Everything of the merged model, whole or not at all.

    Raises:
        UserError: a merged matrix holds values that are no numbers.
        Failed: the disk refuses.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from qlora_kit.merge.write import write_weights

    console, started = Console(stderr=True), time.monotonic()
    columns = (BarColumn(bar_width=None), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with staged(output) as folder:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=merge.nbytes)
            files = write_weights(merge.tensors, merge.tensor, folder, limit, lambda count: progress.advance(task, count))
        copy_small_files(folder, base, source, tokenizer)
        write_mark(folder, source, onto, len(merge.recipes))
    seconds = time.monotonic() - started
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    print(f"Merged: {output} ({merge.nbytes / GIB:.2f} GiB in {count}, {seconds:.0f} s)", flush=True)


# The check


def check_merge(
    output: Path,
    source: AdapterSource,
    base: Path,
    loading: "Packing",
    onto: str,
    device_maps: "list[DeviceMap]",
    blocks: Any,
    what: str,
) -> None:
    """Compare the merged model with base + adapter, print both and write the result into the folder.

    Args:
        device_maps: of base + adapter, and of the merged model.

    Raises:
        Failed: they differ by more than they may, or the GPU is too small for the comparison.
    """
    from qlora_kit.merge.check import compare, measure_adapter, measure_merged
    from qlora_kit.model.device import is_out_of_memory

    name = str(base) if is_local(source.model.name) else source.model.name
    print("Checking: base + adapter, then the merged model", file=sys.stderr)
    try:
        adapter = measure_adapter(source, name, loading, device_maps[0], blocks)
        merged = measure_merged(output, loading, device_maps[1], source.model.trust_remote_code, blocks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise Failed(
            f"the GPU's memory is full: {output} is whole and not checked; check with --overwrite --device cpu"
        ) from None
    result = compare(adapter, merged, same_weights=onto == "dequantized" or not source.quantization.load_in_4bit)
    print(f"Perplexity on {what}:", *result.lines(), sep="\n", flush=True)
    record_check(output, result, what)
    if not result.passed:
        hint = "" if result.same_weights else ", or take the weights it was trained on: --base dequantized"
        raise Failed(f"the merged model differs from base + adapter by more than it may; {output} is kept: do not trust it{hint}")


def run() -> None:
    """Run the command as a process: SIGTERM removes what was begun."""
    signal.signal(signal.SIGTERM, _terminate)
    cli.run(main)


def _terminate(*_: Any) -> None:
    raise Stopped(143, "stopped")
