"""Is the result of the toolkit that of the textbook recipe, and of the other tools? Measured on a real model, in six parts.

    python benchmarks/quality.py A C --model DIR --train FILE --test FILE      step by step, and adapters exchanged: a CPU will do
    python benchmarks/quality.py B D F --model DIR ... --minutes 8             held-out losses by seed: on a GPU
    python benchmarks/quality.py E --model DIR                                 200 made-up facts, asked back
    python benchmarks/quality.py --page docs/quality.md                        write the page from the results

A part consists of pieces, such as a seed with all systems that are compared with one another. Each piece that is done is kept in
RESULTS/quality_PART.json with its card, date, versions and command; the next call goes on with the pieces that are missing, and
begins none that would not end within --minutes. The model is a folder of Hugging Face's format; quality_model.py makes the one of
the page, SmolLM2-135M-Instruct. Everything runs with the embedded model on a CPU too, and then means nothing.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from runs import ROOT, absolute, existing, versions_of

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "unsloth")
RESULTS = ROOT / "benchmarks" / "results"
Piece = tuple[str, Callable[[], dict[str, Any]]]  # its name, and what measures it


def pieces_of(part: str, options: argparse.Namespace) -> Iterator[Piece]:
    """Yield the pieces of a part in the order in which they are measured."""
    import quality_facts
    import quality_runs
    import quality_steps

    if part == "A":
        for dtype in options.dtypes:
            yield f"{dtype}{place()}", partial(quality_steps.step_by_step, options, dtype)
    elif part == "C":
        if place():  # an adapter without run.json is computed in bfloat16 there
            sys.exit("error: part C compares in fp32, on a CPU: run A C with CUDA_VISIBLE_DEVICES= (empty)")
        yield "float32", partial(quality_steps.exchange, options, load(options.results, "A").get("float32"), "float32")
    elif part == "E":
        yield f"{options.facts} facts", partial(quality_facts.learn_facts, options)
    else:
        if part == "D":
            yield "base models", partial(quality_runs.measure_bases, options)
        by_seed = {"B": quality_runs.compare_systems, "D": quality_runs.compare_variants, "F": quality_runs.compare_with_full}
        for seed in options.seeds:
            yield f"seed {seed}", partial(by_seed[part], options, seed)
        if part == "F" and options.tokenizer:
            yield "3B", partial(quality_runs.measure_large, options)


def place() -> str:
    """Return what the names of pieces say of the machine, where results depend on it."""
    import torch

    return " on a GPU" if torch.cuda.is_available() else ""


def load(results: Path, part: str) -> dict[str, Any]:
    """Return the pieces of a part that are done."""
    path = results / f"quality_{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def store(results: Path, part: str, done: dict[str, Any]) -> None:
    """Write the pieces of a part, whole or not at all; a list of numbers takes one line."""
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"quality_{part}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(format_json(done) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def format_json(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each field, and one for each list or object without fields of their own."""
    if isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values()):
        rows = [f"{indent}  {json.dumps(key)}: {format_json(item, indent + '  ')}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"{indent}  {format_json(item, indent + '  ')}" for item in value) + f"\n{indent}]"
    return json.dumps(value)


def circumstances(model: Path) -> dict[str, str]:
    """Return hardware, date, versions and command of a measurement, and which weights the model has."""
    import torch

    from qlora_kit.model.fingerprint import weights_fingerprint

    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name(0)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
        hardware = f"{torch.get_num_threads()} thread(s) of {name}"
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/quality.py", *words])
    weights = f"{model.name}, weights {(weights_fingerprint(model) or 'unknown')[:12]}"
    facts = {"hardware": hardware, "date": datetime.now(UTC).date().isoformat(), "versions": versions_of(PACKAGES)}
    return facts | {"command": command, "model": weights}


def measure(parts: list[str], options: argparse.Namespace) -> bool:
    """Measure the missing pieces of some parts; return whether all are done."""
    end = time.monotonic() + 60 * options.minutes
    for part in parts:
        longest = 0.0
        for name, run in pieces_of(part, options):
            done = load(options.results, part)
            if name in done:
                continue
            if time.monotonic() + longest > end:
                print(f"part {part}: stopped before {name}; call again to go on", flush=True)
                return False
            print(f"part {part}: {name} ...", flush=True)
            started = time.monotonic()
            measured = run()
            longest = max(longest, time.monotonic() - started)
            facts = circumstances(options.model) | {"seconds": round(time.monotonic() - started)}
            store(options.results, part, load(options.results, part) | {name: facts | measured})
            print(f"part {part}: {name}: {time.monotonic() - started:.0f} s", flush=True)
    return True


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*"ABCDEF", []], metavar="PART", help="A to F")
    parser.add_argument("--model", type=existing, default=ROOT / "assets" / "tiny-qwen2", metavar="DIR", help="base model")
    articles = ROOT / "samples" / "articles.txt"
    parser.add_argument(
        "--train", type=existing, default=articles, metavar="FILE", help="text to train on (Wikitext-2's validation)"
    )
    parser.add_argument("--test", type=existing, default=articles, metavar="FILE", help="text held out (Wikitext-2's test)")
    parser.add_argument("--results", type=absolute, default=RESULTS, metavar="DIR", help="of the JSON files (benchmarks/results)")
    parser.add_argument(
        "--work", type=absolute, default=ROOT / "build" / "quality", metavar="DIR", help="of adapters (build/quality)"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no piece that would not end within them (60)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="S", help="of B, D and F (1 to 5)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="of A (float32)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of B, D, E and F (bfloat16)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of A (50)")
    parser.add_argument("--length", type=int, help="tokens of a block (A and E: 256; B, D, F: 512)")
    parser.add_argument("--rows", type=int, default=16, help="blocks of an optimizer step of B, D, F (16; E: at most 4)")
    parser.add_argument("--blocks", type=int, help="blocks to train on in B, D, F (all of the text)")
    parser.add_argument("--eval-blocks", type=int, default=128, help="blocks to evaluate on in B, D, F (128)")
    parser.add_argument("--other", type=existing, metavar="FILE", help="other text of D (source code of Python's own library)")
    parser.add_argument("--facts", type=int, default=200, help="of E (200)")
    parser.add_argument("--epochs", type=float, default=60.0, help="of E (60)")
    parser.add_argument(
        "--tokenizer", type=existing, metavar="DIR", help="Qwen2.5's, for F at 3B's shape, which runs with it alone"
    )
    parser.add_argument("--page", type=absolute, metavar="FILE", help="write this page from the results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from qlora_kit.cli import prepare_libraries

    prepare_libraries()
    complete = measure(options.parts, options)
    if options.page:
        from quality_page import write_page

        write_page(options.page, {part: load(options.results, part) for part in "ABCDEF"})
    sys.exit(0 if complete else 3)


if __name__ == "__main__":
    main()
