"""How fast data is prepared: this toolkit beside TRL and a plain `datasets.map` row by row, on the same file.

    python benchmarks/data_speed.py --tokenizer DIR                       two files are made: chats, and running text
    python benchmarks/data_speed.py --tokenizer DIR --file chats.jsonl    a file of records with prompt and completion, or a .txt

The job: from the file to what a Trainer takes, blocks of 512 tokens. The toolkit reads, renders, masks, tokenizes, checks, packs
and stores; a second row shows it with the tokens in its cache. TRL's SFTTrainer is constructed with the embedded model (packing
by best fit for chats, wrapped for text; completions trained), with one process and with one a core. The plain loop calls the
tokenizer for one row after the other and neither masks nor packs. Each row runs in a process of its own with an empty cache;
libraries, tokenizer and model are loaded before the clock starts, and the fastest of --repeats runs counts, because what else
the machine does can only slow one down. MB are 10**6 bytes of the file. Made files hold sentences of
samples/articles.txt drawn at random, chats of 20 to 300 words. A system that is not installed, or fails, is a row that says so.
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
from typing import Any

from runs import installed

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny-qwen2"
BLOCK_TOKENS = 512
PACKAGES = ("tokenizers", "transformers", "datasets", "trl")
SYSTEMS = ("toolkit", "toolkit, cached", "trl, 1 process", "trl, a process a core", "datasets.map")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=MODEL, metavar="DIR", help="default: the embedded model's")
    parser.add_argument("--file", type=Path, help="a .jsonl of prompt and completion, or a .txt; default: one of each is made")
    parser.add_argument("--megabytes", type=float, default=10, help="size of a file that is made")
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
    """A .jsonl of chats and a .txt of one document."""
    sentences = re.findall(r"[^.\n]+ ?\.", (ROOT / "samples" / "articles.txt").read_text(encoding="utf-8"))
    draw = random.Random(0)

    def words(few: int, many: int) -> str:
        wanted, text = draw.randint(few, many), ""
        while text.count(" ") < wanted:
            text += draw.choice(sentences)
        return text.strip()

    chats, text = folder / "chats.jsonl", folder / "text.txt"
    with chats.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(json.dumps({"prompt": words(5, 100), "completion": words(15, 200)}) + "\n")
    with text.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            file.write(words(50, 150) + "\n")
    return [chats, text]


def table_row(system: str, tokenizer: Path, file: Path, repeats: int) -> str:
    """One line of the table."""
    row = f"| {'chats' if file.suffix == '.jsonl' else 'text'} | {system} |"
    if system.startswith("trl") and find_spec("trl") is None:
        return f"{row} not installed | |"
    try:
        seconds = min(run_alone(system, tokenizer, file) for _ in range(repeats))
    except subprocess.CalledProcessError as error:
        return f"{row} failed: {(error.stderr.strip() or 'no message').splitlines()[-1][:100]} | |"
    return f"{row} {seconds:.2f} | {file.stat().st_size / 1e6 / seconds:.2f} |"


def run_alone(system: str, tokenizer: Path, file: Path) -> float:
    """Seconds, measured in a process of its own with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--tokenizer", str(tokenizer), "--file", str(file), "--one", system]
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(system: str, tokenizer_folder: Path, file: Path) -> float:
    """Seconds from the file to blocks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    prepare = {"toolkit": toolkit, "trl": trl, "datasets.map": row_by_row}[system.partition(",")[0]]
    if system.startswith("trl"):
        return prepare(tokenizer, file, 1 if "1 process" in system else len(os.sched_getaffinity(0)))
    if system == "toolkit, cached":
        prepare(tokenizer, file)
    return prepare(tokenizer, file)


def toolkit(tokenizer: Any, file: Path) -> float:
    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401  not needed, but the others' clocks do not count it either

    from qlora_kit.config import Config, DataSettings
    from qlora_kit.data.dataset import load_blocks

    data = DataSettings(dataset=str(file), subset=None, eval_split=None, max_length=BLOCK_TOKENS)
    start = time.perf_counter()
    load_blocks(Config(data=data), tokenizer)
    return time.perf_counter() - start


def trl(tokenizer: Any, file: Path, processes: int) -> float:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    chats = file.suffix == ".jsonl"
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_length=BLOCK_TOKENS, packing=True, packing_strategy="bfd" if chats else "wrapped",
        dataset_num_proc=processes, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip

    def as_chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }

    start = time.perf_counter()
    rows = load_dataset("json" if chats else "text", data_files=str(file), split="train")
    if chats:
        rows = rows.map(as_chat, num_proc=processes)
    SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    return time.perf_counter() - start


def row_by_row(tokenizer: Any, file: Path) -> float:
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
