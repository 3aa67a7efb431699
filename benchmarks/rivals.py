"""One timed training run of another system on the job of train_speed.py: the alternatives to train_qlora.py.

    python benchmarks/rivals.py plain --model DIR --train FILE                            HF Trainer, peft, bitsandbytes
    python benchmarks/rivals.py trl --micro-batch 16 --model DIR --train FILE             TRL's SFTTrainer
    python benchmarks/rivals.py unsloth --checkpointing own --model DIR --train FILE      Unsloth

The last line of standard output is a JSON object. train_speed.py runs this file once per row, because these systems patch each
other's code and cannot be measured in one process. The job: NF4 with double quantization, LoRA of rank 16 and alpha 32 on all
seven projections, blocks of 512 tokens, 16 of them per optimizer step, paged 8-bit Adam, bfloat16, no evaluation, no saving.
Everything else is each system's default.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from runs import SEQUENCES, existing

BLOCK_TOKENS = 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEMS = {
    "plain": ("transformers", "peft", "bitsandbytes"),
    "trl": ("trl",),
    "unsloth": ("unsloth", "trl"),
}  # and their packages
CHECKPOINTING = {"off": False, "plain": True, "own": "unsloth"}  # values of --checkpointing, and Unsloth's names for them


@dataclass(frozen=True)
class Rival:
    """A system and its settings."""

    system: str
    micro_batch: int
    checkpointing: str = "plain"
    dropout: float = 0.05
    cap_gib: float | None = None  # cap of torch's allocator, to imitate a smaller card

    @property
    def accumulation(self) -> int:
        return SEQUENCES // self.micro_batch

    @property
    def name(self) -> str:
        parts = [f"{self.system} {self.micro_batch} x {self.accumulation}"]
        if self.checkpointing == "off":
            parts.append("no checkpointing")
        elif self.system == "unsloth":
            parts.append(f"{self.checkpointing} checkpointing")
        return ", ".join([*parts, *(["dropout 0"] if self.dropout == 0 else [])])

    def flags(self) -> list[str]:
        flags = [self.system, "--micro-batch", self.micro_batch, "--checkpointing", self.checkpointing, "--dropout", self.dropout]
        return [str(word) for word in (*flags, *(["--cap", self.cap_gib] if self.cap_gib else []))]


def train(rival: Rival, checkpoint: Path, text: Path, steps: int) -> dict[str, Any]:
    """Train for `steps` optimizer steps; return the speed of each, and the peaks of torch's allocator over the whole process."""
    if rival.system == "unsloth":
        import unsloth  # noqa: F401  must come first: it patches the libraries imported below
    import torch

    if rival.cap_gib:
        torch.cuda.set_per_process_memory_fraction(rival.cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    rows = read_blocks(text, checkpoint, steps * SEQUENCES)
    build = {"plain": plain_trainer, "trl": trl_trainer, "unsloth": unsloth_trainer}[rival.system]
    with tempfile.TemporaryDirectory() as output:
        trainer = build(rival, checkpoint, rows, trainer_settings(rival, steps) | {"output_dir": output})
        ends = add_clock(trainer)
        trainer.train()
    return {
        "tokens_per_second": [SEQUENCES * BLOCK_TOKENS / (end - start) for start, end in pairwise(ends)],
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def add_clock(trainer: Any) -> list[float]:
    """Return a list that training fills with its start time and the time at which the GPU finished each optimizer step."""
    import torch
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **rest):
            torch.cuda.synchronize()
            times.append(time.perf_counter())

        on_train_begin = on_step_end

    trainer.add_callback(Clock())
    return times


def read_blocks(text: Path, checkpoint: Path, count: int) -> Any:
    """Return the first `count` blocks of a text as a datasets.Dataset, with every token as a label and no padding."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    if len(ids) < count * BLOCK_TOKENS:
        sys.exit(f"error: {text} fills {len(ids) // BLOCK_TOKENS} of {count} blocks; use more text")
    blocks = [ids[start : start + BLOCK_TOKENS] for start in range(0, count * BLOCK_TOKENS, BLOCK_TOKENS)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks, "attention_mask": [[1] * BLOCK_TOKENS] * count})


def trainer_settings(rival: Rival, steps: int) -> dict[str, Any]:
    """Return the arguments that the trainers of transformers and of TRL share."""
    return {
        "max_steps": steps,
        "per_device_train_batch_size": rival.micro_batch,
        "gradient_accumulation_steps": rival.accumulation,
        "learning_rate": 2e-4,
        "max_grad_norm": 0.3,
        "optim": "paged_adamw_8bit",
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def four_bit_model(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0 if torch.cuda.is_available() else "cpu"}
    )


def lora(rival: Rival) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=rival.dropout, target_modules=TARGETS, task_type="CAUSAL_LM")


def plain_trainer(rival: Rival, checkpoint: Path, rows: Any, settings: dict[str, Any]) -> Any:
    """Create the textbook recipe: transformers' Trainer on a model from peft's prepare_model_for_kbit_training."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments, default_data_collator

    recompute = rival.checkpointing != "off"
    model = prepare_model_for_kbit_training(four_bit_model(checkpoint), use_gradient_checkpointing=recompute)
    return Trainer(
        model=get_peft_model(model, lora(rival)),
        args=TrainingArguments(**settings, gradient_checkpointing=recompute),
        train_dataset=rows,
        data_collator=default_data_collator,
    )


def trl_trainer(rival: Rival, checkpoint: Path, rows: Any, settings: dict[str, Any]) -> Any:
    """Create TRL's SFTTrainer, which adds the adapter and gradient checkpointing itself."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    recompute = rival.checkpointing != "off"
    return SFTTrainer(
        model=four_bit_model(checkpoint),
        args=SFTConfig(**settings, max_length=BLOCK_TOKENS, packing=False, gradient_checkpointing=recompute),
        train_dataset=rows.select_columns(["input_ids"]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        peft_config=lora(rival),
    )


def unsloth_trainer(rival: Rival, checkpoint: Path, rows: Any, settings: dict[str, Any]) -> Any:
    """Create Unsloth's patched SFTTrainer. Gradient checkpointing is a setting of its model, so SFTConfig does not set it."""
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=BLOCK_TOKENS, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=rival.dropout,
        target_modules=TARGETS,
        use_gradient_checkpointing=CHECKPOINTING[rival.checkpointing],
    )
    prepared = {"skip_prepare_dataset": True}
    arguments = SFTConfig(**settings, max_length=BLOCK_TOKENS, packing=False, dataset_kwargs=prepared)
    return SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def prepare_environment(rival: Rival) -> None:
    """Forbid look-ups on the Hub and statistics; must run before the libraries are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    if rival.cap_gib:  # Unsloth sizes its loss by the GPU's free memory and ignores the allocator's cap
        os.environ["UNSLOTH_FUSED_LINEAR_FLASH_MIN_ROWS"] = "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--micro-batch", type=int, default=1, choices=(1, 2, 4, 8, 16), help="sequences in a forward pass")
    parser.add_argument("--checkpointing", default="plain", choices=CHECKPOINTING, help="of activations; own: Unsloth's")
    parser.add_argument("--dropout", type=float, default=0.05, help="of LoRA; Unsloth's fast path is at 0")
    parser.add_argument("--cap", type=float, metavar="GIB", help="limit of torch's allocator")
    parser.add_argument("--model", type=existing, required=True, metavar="DIR", help="checkpoint with its tokenizer")
    parser.add_argument("--train", type=existing, required=True, metavar="FILE", help="text to train on")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps (default: 8)")
    chosen = parser.parse_args()
    rival = Rival(chosen.system, chosen.micro_batch, chosen.checkpointing, chosen.dropout, chosen.cap)
    if rival.checkpointing == "own" and rival.system != "unsloth":
        parser.error("--checkpointing own: only Unsloth has one")
    prepare_environment(rival)
    print(json.dumps(train(rival, chosen.model, chosen.train, chosen.steps)), flush=True)


if __name__ == "__main__":
    main()
