"""Predicted beside measured GPU memory of real runs of train_qlora.py, and of the textbook recipe that it replaces.

    python benchmarks/memory_plan.py --tokenizer DIR --train FILE --eval FILE

Makes a random checkpoint of Qwen2.5-3B's true shape (memory and speed do not depend on the weights' values; the loss does,
so none is reported), trains on it for a few optimizer steps under an allocator capped at 8 GiB, and prints a Markdown table.
`plain` is the Hugging Face Trainer with peft's prepare_model_for_kbit_training, on the same blocks and settings.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
CASES: dict[str, list[str]] = {
    "config.yaml": [],
    "no CUDA graph": ["--set", "performance.cuda_graphs=false"],
    "micro-batch 4": ["--set", "performance.micro_batch=4"],
    "no recomputation": ["--set", "training.gradient_checkpointing=false"],
    "rank 64": ["--rank", "64"],
    "1,024 tokens, rank 64": ["--rank", "64", "--max_length", "1024"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the Qwen2.5 tokenizer")
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--eval", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="which rows to measure (default: all)")
    parser.add_argument("--plain", type=Path, metavar="CHECKPOINT", help=argparse.SUPPRESS)  # how this script calls itself
    arguments = parser.parse_args()
    if arguments.plain:
        return print(json.dumps(run_plain(arguments.plain, arguments.train)))
    with tempfile.TemporaryDirectory() as work:
        checkpoint = Path(work, "qwen2.5-3b-random")
        make_checkpoint(checkpoint, arguments.tokenizer)
        print("| run | predicted GiB | peak reserved GiB | error | peak allocated GiB | tokens/s |\n|---|---|---|---|---|---|")
        for name in arguments.cases:
            print(toolkit_row(name, CASES[name], checkpoint, Path(work, "output"), arguments), flush=True)
        command = [sys.executable, __file__, "--plain", checkpoint, "--tokenizer", arguments.tokenizer]
        command += ["--train", arguments.train, "--eval", arguments.eval]
        plain = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"| plain | - | {plain['reserved']:.2f} | - | {plain['allocated']:.2f} | {plain['tokens_per_second']:,.0f} |")


def make_checkpoint(folder: Path, tokenizer: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    sys.path.insert(0, str(ROOT))
    from qlora_kit.memory import KNOWN_CONFIGS

    shape = KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def toolkit_row(name: str, flags: list[str], checkpoint: Path, output: Path, arguments: argparse.Namespace) -> str:
    settings = {
        "data.eval_split": arguments.eval,
        "data.max_eval_samples": 16,
        "performance.vram_limit_gib": 8,
        "training.logging_steps": 2,
        "training.eval_steps": STEPS,
    }
    command = [sys.executable, ROOT / "train_qlora.py", "--model_name", checkpoint, "--dataset", arguments.train, "--overwrite"]
    command += ["--output_dir", output, "--max_steps", str(STEPS), *flags]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    memory = json.loads((output / "run.json").read_text())["memory_gib"]
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    speed = max(entry.get("tokens_per_second", 0.0) for entry in entries)
    predicted, measured = memory["predicted_peak"], memory["peak_reserved"]
    error = 100 * (predicted / measured - 1)
    return f"| {name} | {predicted:.2f} | {measured:.2f} | {error:+.1f} % | {memory['peak_allocated']:.2f} | {speed:,.0f} |"


def run_plain(checkpoint: Path, text: Path) -> dict[str, float]:
    import time

    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(model), lora)
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8"))["input_ids"]
    blocks = [torch.tensor(ids[start : start + 512]) for start in range(0, len(ids) - 512, 512)]
    trainer_arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=1, gradient_accumulation_steps=16, bf16=True,
        optim="paged_adamw_8bit", gradient_checkpointing=True, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    trainer = Trainer(model=model, args=trainer_arguments, train_dataset=rows)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return {
        "reserved": torch.cuda.max_memory_reserved() / 2**30,
        "allocated": torch.cuda.max_memory_allocated() / 2**30,
        "tokens_per_second": STEPS * 16 * 512 / seconds,
    }


if __name__ == "__main__":
    main()
