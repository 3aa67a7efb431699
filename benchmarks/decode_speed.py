"""Decoding speed with a 4-bit base and an adapter: the toolkit, transformers with peft, and Unsloth, in one go on one GPU.

    python benchmarks/decode_speed.py --tokenizer DIR --json decode.json
    python benchmarks/decode_speed.py --tokenizer DIR --systems toolkit

A random checkpoint of Qwen2.5-3B's true shape with a random adapter of rank 16 on all seven projections; greedy decoding of 128
new tokens without stop tokens, after one warm-up answer. Each system runs in a separate process and measures

    load            seconds from the first import to a model and tokenizer that can answer
    first token     milliseconds to the first token of a 512-token prompt
    1 prompt        tokens per second for a prompt of 64 tokens, without the first token
    16 prompts      the same for 16 such prompts in one batch, tokens of all prompts
    peak            GiB that torch's allocator reserved at most

Each number is the median of --repeats answers. The row of a system that is not installed or fails states the reason. The exit
status is 1 if the toolkit failed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runs import ROOT, NoMeasurement, checkpoint_parser, in_own_process, random_checkpoint, require_gpu, run_limited, versions_of

NEW_TOKENS, BATCH, SHORT, LONG = 128, 16, 64, 512
SYSTEMS = {"toolkit": "torch", "transformers + peft": "peft", "transformers, base alone": "transformers", "unsloth": "unsloth"}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "unsloth")
COLUMNS = ("load", "first token", "1 prompt", "16 prompts", "peak")


def main() -> None:
    if "--one" in sys.argv:  # the separate process of one system
        system, checkpoint, adapter, repeats = sys.argv[sys.argv.index("--one") + 1 :][:4]
        return print(json.dumps(measure(system, Path(checkpoint), Path(adapter), int(repeats))))
    arguments = parse_arguments()
    gpu = require_gpu()
    print(f"| system | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    rows: dict[str, Any] = {}
    with (
        random_checkpoint("3B", arguments.tokenizer, arguments.checkpoints) as checkpoint,
        tempfile.TemporaryDirectory() as folder,
    ):
        adapter = Path(folder, "adapter")
        in_own_process(make_adapter, checkpoint, adapter)
        for system in arguments.systems:
            rows[system] = row_of(system, checkpoint, adapter, arguments)
            print(line_of(system, rows[system], rows.get("toolkit")), flush=True)
    facts = {"hardware": gpu, "versions": versions_of(PACKAGES), "date": datetime.now(UTC).date().isoformat()}
    print("\n" + "; ".join(facts.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    sys.exit("toolkit" in rows and "error" in rows["toolkit"])


def parse_arguments() -> argparse.Namespace:
    parser = checkpoint_parser(__doc__)
    names = ", ".join(repr(name) for name in SYSTEMS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME", help=f"of {names}")
    parser.add_argument("--repeats", type=int, default=3, help="answers of each kind (default: 3)")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="of one system at most (default: 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    return parser.parse_args()


def row_of(system: str, checkpoint: Path, adapter: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    if find_spec(SYSTEMS[system]) is None:
        return {"error": f"not installed ({SYSTEMS[system]})"}
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--one",
        system,
        str(checkpoint),
        str(adapter),
        str(arguments.repeats),
    ]
    with tempfile.TemporaryDirectory() as work:  # Unsloth writes the code it generates to the working folder
        try:
            written = run_limited(command, Path(work), arguments.timeout)
        except NoMeasurement as failure:
            print(failure.tail, file=sys.stderr, flush=True)
            return {"error": str(failure)}
    lines = [line for line in written.splitlines() if line.startswith('{"')]
    return json.loads(lines[-1]) if lines else {"error": "ended without a result"}


def line_of(system: str, row: dict[str, Any], toolkit: dict[str, Any] | None) -> str:
    """Return a row of the table; each speed is followed by the toolkit's speed divided by it."""
    if "error" in row:
        return f"| {system} | {row['error'].replace('|', '/')} |{' - |' * (len(COLUMNS) - 1)}"
    cells = [f"{row['load']:.1f} s", f"{row['first token']:.0f} ms"]
    for name in ("1 prompt", "16 prompts"):
        times = f" ({toolkit[name] / row[name]:.1f} x)" if toolkit and name in toolkit else ""
        cells.append(f"{row[name]:,.0f} tokens/s{times}")
    return f"| {system} | {' | '.join(cells)} | {row['peak']:.2f} GiB |"


def make_adapter(checkpoint: Path, folder: Path) -> None:
    """Write a random PEFT adapter whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint)),
            LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"),
        )
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    weights = {name: 0.01 * torch.randn(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)


# Below: what runs in the separate process of one system.


def measure(system: str, checkpoint: Path, adapter: Path, repeats: int) -> dict[str, float]:
    """Load a system and time its answers."""
    started = time.perf_counter()
    answer = {"toolkit": toolkit, "unsloth": unsloth}.get(system, plain)(checkpoint, adapter, system)
    result = {"load": time.perf_counter() - started}
    import torch

    ids = torch.randint(150_000, (BATCH, LONG), generator=torch.Generator().manual_seed(0)).tolist()
    short = [row[:SHORT] for row in ids]

    def seconds(prompts: list[list[int]], count: int) -> float:
        answer(prompts, count)  # warm-up: kernels, graphs, caches
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            began = time.perf_counter()
            answer(prompts, count)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    result["first token"] = 1e3 * seconds(ids[:1], 1)
    for name, prompts in (("1 prompt", short[:1]), ("16 prompts", short)):
        result[name] = len(prompts) * (NEW_TOKENS - 1) / (seconds(prompts, NEW_TOKENS) - seconds(prompts, 1))
    result["peak"] = torch.cuda.max_memory_reserved() / 2**30
    return result


def toolkit(checkpoint: Path, adapter: Path, system: str) -> Callable[[list[list[int]], int], None]:
    sys.path.insert(0, str(ROOT))
    import inference_example
    from qlora_kit import cli
    from qlora_kit.config import GenerationSettings

    cli.prepare_libraries()
    generator = inference_example.load_generator(adapter)

    def answer(prompts: list[list[int]], count: int) -> None:
        settings = GenerationSettings(max_new_tokens=count, temperature=0, repetition_penalty=1)
        for _ in generator.engine.steps(prompts, settings, 0, [-1]):
            pass

    return answer


def plain(checkpoint: Path, adapter: Path, system: str) -> Callable[[list[list[int]], int], None]:
    from peft import PeftModel
    from rivals import four_bit_model
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(checkpoint)  # the other systems load it too
    model = four_bit_model(checkpoint)
    return by_generate(PeftModel.from_pretrained(model, adapter).eval() if "peft" in system else model.eval())


def unsloth(checkpoint: Path, adapter: Path, system: str) -> Callable[[list[list[int]], int], None]:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(adapter), max_seq_length=1024, load_in_4bit=True, dtype=torch.bfloat16)
    FastLanguageModel.for_inference(model)
    return by_generate(model)


def by_generate(model: Any) -> Callable[[list[list[int]], int], None]:
    import torch

    def answer(prompts: list[list[int]], count: int) -> None:
        ids = torch.tensor(prompts, device="cuda")
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                temperature=None, top_p=None, top_k=None, pad_token_id=0,
            )  # fmt: skip

    return answer


if __name__ == "__main__":
    main()
