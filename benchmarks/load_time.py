"""Time and memory to load a 4-bit base model, its tokenizer and an adapter: the toolkit, and transformers with peft.

    python benchmarks/load_time.py
    python benchmarks/load_time.py --checkpoint DIR --repeats 9

A random adapter of rank 16 on all seven projections, on the CPU. Each system loads in separate processes, in turns, from the
first import to a model that can answer:

    seconds         wall-clock time, which other programs lengthen
    CPU seconds     sum over all threads
    peak            GiB of resident memory at most, including file pages that the system may free

Each number is the median of --repeats processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from decode_speed import make_adapter
from runs import ROOT, existing, in_own_process, versions_of

SYSTEMS = ("toolkit", "transformers + peft")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def main() -> None:
    if "--one" in sys.argv:  # the separate process of one system
        system, checkpoint, adapter = sys.argv[sys.argv.index("--one") + 1 :][:3]
        return print(json.dumps(measure(system, checkpoint, adapter)))
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder, "adapter")
        in_own_process(make_adapter, arguments.checkpoint, adapter)
        (adapter / "config.yaml").write_text(
            "quantization:\n  compute_dtype: bfloat16\n", encoding="utf-8"
        )  # as plain() computes
        rounds = [[load(system, arguments.checkpoint, adapter) for system in SYSTEMS] for _ in range(arguments.repeats)]
    print("| system | seconds | CPU seconds | peak |\n|---|---|---|---|")
    for system, results in zip(SYSTEMS, zip(*rounds, strict=True), strict=True):
        wall, cpu, peak = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"| {system} | {wall:.2f} | {cpu:.2f} | {peak:.2f} GiB |")
    print(f"\n{os.cpu_count()} cores; {versions_of(PACKAGES)}; {datetime.now(UTC).date()}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=existing, default=ROOT / "assets" / "tiny-qwen2", metavar="DIR", help="base model (default: tiny)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="processes of each system (default: 5)")
    return parser.parse_args()


def load(system: str, checkpoint: Path, adapter: Path) -> list[float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--one", system, str(checkpoint), str(adapter)]
    # The toolkit sets OMP_WAIT_POLICY for itself; transformers with peft gets it too.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    written = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(written.splitlines()[-1])


# Below: what runs in the separate process of one system.


def measure(system: str, checkpoint: str, adapter: str) -> tuple[float, float, float]:
    import resource

    started, used = time.perf_counter(), time.process_time()
    (toolkit if system == "toolkit" else plain)(checkpoint, adapter)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    return time.perf_counter() - started, time.process_time() - used, peak


def toolkit(checkpoint: str, adapter: str) -> None:
    sys.path.insert(0, str(ROOT))
    import inference_example
    from qlora_kit import cli

    cli.prepare_libraries()
    inference_example.load_generator(adapter, device="cpu")


def plain(checkpoint: str, adapter: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    PeftModel.from_pretrained(model, adapter).eval()


if __name__ == "__main__":
    main()
