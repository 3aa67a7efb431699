"""Measure the speed of data preparation: this toolkit, TRL and a plain `datasets.map` on the same file.

    python benchmarks/data_speed.py --tokenizer DIR                       makes two files: chats, and running text
    python benchmarks/data_speed.py --tokenizer DIR --file chats.jsonl    takes a .jsonl of prompt and completion, or a .txt

The task is to turn a file into blocks of 512 tokens for a Trainer.

    toolkit            reads, renders, masks, tokenizes, checks, packs and stores
    toolkit, cached    the same with the tokens in its cache
    trl                constructs an SFTTrainer with the embedded model: packs chats by best fit, wraps text, trains completions
    datasets.map       calls the tokenizer row by row, and neither masks nor packs

Each run has a process of its own and an empty cache. The clock starts after libraries, tokenizer and model are loaded. The
fastest of --repeats runs counts, because other processes can only slow a run down. MB are 10**6 bytes of the file. The made files
consist of random sentences of samples/articles.txt, in chats of 20 to 300 words. A system that fails or is not installed has a
row that says so.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runs import installed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny-qwen2"
BLOCK_TOKENS = 512
PACKAGES = ("tokenizers", "transformers", "datasets", "trl")
SYSTEMS = ("toolkit", "toolkit, cached", "trl, 1 process", "trl, a process a core", "datasets.map")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=MODEL, metavar="DIR", help="default: that of the embedded model")
    parser.add_argument("--file", type=Path, help="a .jsonl of prompt and completion, or a .txt; default: make one of each")
    parser.add_argument("--megabytes", type=float, default=10, help="size of a made file")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return print(json.dumps(measure(arguments.one, arguments.tokenizer, arguments.file)))
    found = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    print(f"{len(os.sched_getaffinity(0))} cores; Python {sys.version.split()[0]}, {found}; {datetime.now(UTC):%Y-%m-%d}\n")
    print("| data | system | seconds | MB/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = [arguments.file] if arguments.file else make_files(Path(folder), arguments.megabytes)
        for file in files:
            for system in SYSTEMS:
                print(table_row(system, arguments.tokenizer, file, arguments.repeats), flush=True)


def make_files(folder: Path, megabytes: float) -> list[Path]:
    """Make a .jsonl of chats and a .txt of one document, and return their paths."""
    sentences = re.findall(r"[^.\n]+ ?\.", (ROOT / "samples" / "articles.txt").read_text(encoding="utf-8"))
    rng = random.Random(0)

    def make_text(fewest: int, most: int) -> str:
        words, text = rng.randint(fewest, most), ""
        while text.count(" ") < words:
            text += rng.choice(sentences)
        return text.strip()

    chats, text = folder / "chats.jsonl", folder / "text.txt"
    with chats.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(json.dumps({"prompt": make_text(5, 100), "completion": make_text(15, 200)}) + "\n")
    with text.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(make_text(50, 150) + "\n")
    return [chats, text]


def table_row(system: str, tokenizer: Path, file: Path, repeats: int) -> str:
    """Measure a system and return its line of the table."""
    row = f"| {'chats' if file.suffix == '.jsonl' else 'text'} | {system} |"
    if system.startswith("trl") and find_spec("trl") is None:
        return f"{row} not installed | |"
    try:
        seconds = min(run_alone(system, tokenizer, file) for _ in range(repeats))
    except subprocess.CalledProcessError as error:
        return f"{row} failed: {(error.stderr.strip() or 'no message').splitlines()[-1][:100]} | |"
    return f"{row} {seconds:.2f} | {file.stat().st_size / 1e6 / seconds:.2f} |"


def run_alone(system: str, tokenizer: Path, file: Path) -> float:
    """Return the seconds that a system takes in a process of its own with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--tokenizer", str(tokenizer), "--file", str(file), "--one", system]
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(system: str, tokenizer_folder: Path, file: Path) -> float:
    """Return the seconds that a system takes from the file to blocks, in this process."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if system.startswith("trl"):
        return run_trl(tokenizer, file, 1 if "1 process" in system else len(os.sched_getaffinity(0)))
    if system == "datasets.map":
        return run_datasets_map(tokenizer, file)
    if system == "toolkit, cached":
        run_toolkit(tokenizer, file)
    return run_toolkit(tokenizer, file)


def run_toolkit(tokenizer: "PreTrainedTokenizerBase", file: Path) -> float:
    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401  the clocks of the other systems do not count this import either

    from qlora_kit.config import Config, DataSettings
    from qlora_kit.data.dataset import load_blocks

    data = DataSettings(dataset=str(file), subset=None, eval_split=None, max_length=BLOCK_TOKENS)
    start = time.perf_counter()
    load_blocks(Config(data=data), tokenizer)
    return time.perf_counter() - start


def run_trl(tokenizer: "PreTrainedTokenizerBase", file: Path, processes: int) -> float:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    chats = file.suffix == ".jsonl"
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=BLOCK_TOKENS, packing=True, packing_strategy="bfd" if chats else "wrapped",
        dataset_num_proc=processes, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip

    def to_chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }

    start = time.perf_counter()
    rows = load_dataset("json" if chats else "text", data_files=str(file), split="train")
    if chats:
        rows = rows.map(to_chat, num_proc=processes)
    SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    return time.perf_counter() - start


def run_datasets_map(tokenizer: "PreTrainedTokenizerBase", file: Path) -> float:
    from datasets import load_dataset

    def chat(row: dict[str, str]) -> dict[str, list[int]]:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return {"input_ids": tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]}

    def text(row: dict[str, str]) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(row["text"])["input_ids"]}

    chats = file.suffix == ".jsonl"
    start = time.perf_counter()
    load_dataset("json" if chats else "text", data_files=str(file), split="train").map(chat if chats else text)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
