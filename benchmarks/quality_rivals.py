"""The other systems of quality.py: transformers' Trainer with peft, TRL, Unsloth, and full fine-tuning.

Each is built as its own documentation shows, with the settings of the job. What is changed: the order of the blocks, the matrices
that training starts from and, where a job asks for fp32, the dtype of the adapter, which TRL turns to bfloat16.
"""

import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quality_systems import Job, Result

EXACT = "plain, loss in fp64"


def build_trainer(job: "Job", rows: list[list[int]], start: Path | None) -> Any:
    """Return the Trainer of a system, ready to train on `rows` from first to last.

    Args:
        rows: blocks of token ids, all of them labels.
        start: a file with LoRA matrices to start from.
    """
    from torch.utils.data import SequentialSampler

    build = {"plain": plain, EXACT: plain, "full": full, "unsloth": unsloth_trainer}.get(job.system, trl_trainer)
    trainer = build(job, dataset(rows), arguments_of(job, len(rows)))
    if job.dtype == "float32" or job.system == "trl, adapter in fp32":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if start:
        load_matrices(trainer.model, start)
    trainer._get_train_sampler = lambda data=None: SequentialSampler(trainer.train_dataset if data is None else data)
    return trainer


def dataset(rows: list[list[int]]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * len(row) for row in rows]})


def arguments_of(job: "Job", blocks: int) -> dict[str, Any]:
    """Return the arguments that all of these trainers share."""
    import torch

    steps = -(-blocks // job.rows)
    return {
        "output_dir": str(Path(job.work) / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.rows // job.micro_batch,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.scheduler,
        "warmup_steps": -(-int(1e6 * job.warmup_ratio * steps) // 1_000_000),
        "max_grad_norm": job.clip,
        "weight_decay": 0.0,
        "optim": job.optimizer,
        "bf16": job.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": job.seed,
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def four_bit_model(job: "Job") -> Any:
    """Load the base model as the textbook does; in fp32 where the job asks for it."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora_kit.model.load import guard_cpu_kernels

    device = {"": 0 if torch.cuda.is_available() else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype), device_map=device, **packing(job))
    guard_cpu_kernels(model, job.model)  # bitsandbytes' CPU layout for evaluation has no gradient
    return model


def packing(job: "Job") -> dict[str, Any]:
    """Return the argument of from_pretrained that packs the projections as a job asks, if it does."""
    import torch
    from transformers import BitsAndBytesConfig

    if job.quantization is None:
        return {}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.quantization,
        bnb_4bit_use_double_quant=job.double,
        bnb_4bit_compute_dtype=getattr(torch, job.dtype),
    )
    return {"quantization_config": nf4}


def lora(job: "Job") -> Any:
    from peft import LoraConfig

    alpha = 2 * job.rank
    return LoraConfig(
        r=job.rank, lora_alpha=alpha, lora_dropout=job.dropout, target_modules=list(job.targets), task_type="CAUSAL_LM"
    )


def plain(job: "Job", data: Any, arguments: dict[str, Any]) -> Any:
    """Create the textbook recipe: peft on a model from prepare_model_for_kbit_training, transformers' Trainer."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments, default_data_collator

    model = prepare_model_for_kbit_training(four_bit_model(job), use_gradient_checkpointing=False)
    return Trainer(
        model=get_peft_model(model, lora(job)),
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=default_data_collator,
        compute_loss_func=exact_loss if job.system == EXACT else None,
    )


def exact_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Return the mean cross-entropy of the library's logits in fp64, of one micro-batch an optimizer step.

    On a CPU, torch's in fp32 loses digits over a large vocabulary.
    """
    import torch.nn.functional as F

    losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="sum")
    return losses / labels[:, 1:].numel()


def trl_trainer(job: "Job", data: Any, arguments: dict[str, Any]) -> Any:
    """Create TRL's SFTTrainer, which adds the adapter itself."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=four_bit_model(job),
        args=SFTConfig(**arguments, max_length=job.length, packing=False),
        train_dataset=data.select_columns(["input_ids"]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora(job),
    )


def unsloth_trainer(job: "Job", data: Any, arguments: dict[str, Any]) -> Any:
    """Create Unsloth's patched SFTTrainer; call it before anything imports transformers."""
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=job.length, load_in_4bit=True, dtype=getattr(torch, job.dtype)
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=2 * job.rank,
        lora_dropout=job.dropout,
        target_modules=list(job.targets),
        use_gradient_checkpointing=False,
        random_state=job.seed,
    )
    config = SFTConfig(**arguments, max_length=job.length, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)


def full(job: "Job", data: Any, arguments: dict[str, Any]) -> Any:
    """Create full fine-tuning: with dtype float32 fp32 weights under bfloat16 autocast, else bfloat16 weights and fp32 Adam."""
    import torch
    from bitsandbytes.optim import AdamW
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    device = {"": 0 if torch.cuda.is_available() else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.dtype), device_map=device)
    on_gpu = torch.cuda.is_available()
    optimizers = {}
    if job.dtype == "bfloat16" and on_gpu:
        optimizers["optimizers"] = (AdamW(model.parameters(), lr=job.learning_rate, weight_decay=0.0, optim_bits=32), None)
    arguments = arguments | {"optim": "adamw_torch", "bf16": on_gpu, "gradient_checkpointing": job.micro_batch < job.rows}
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=default_data_collator,
        **optimizers,
    )


def load_matrices(model: Any, start: Path) -> None:
    """Copy LoRA matrices from a file into a model.

    Raises:
        AssertionError: the model has others.
    """
    from quality_systems import lora_matrices
    from safetensors.torch import load_file

    stored, own = load_file(start), lora_matrices(model)
    assert set(stored) == set(own), f"other matrices: {sorted(set(stored) ^ set(own))[:2]}"
    for name, matrix in own.items():
        matrix.data.copy_(stored[name])


def watch(trainer: Any, rows: list[list[int]], result: "Result") -> list[float]:
    """Fill a result with the losses and gradient norms of a training run; returns the times at which its steps end.

    A micro-batch that does not hold the rows that are due raises AssertionError.
    """
    import torch
    from quality_systems import gradient_norm
    from transformers import TrainerCallback

    times: list[float] = []
    size = trainer.args.per_device_train_batch_size
    due = (rows[at : at + size] for at in range(0, len(rows), size))
    whole_step, losses = trainer.training_step, []

    def training_step(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        assert inputs["input_ids"].flatten().tolist() == [*chain(*next(due))], "other blocks, or another order"
        loss = whole_step(model, inputs, *rest, **named)
        losses.append(loss)
        return loss

    class Watch(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **rest: Any) -> None:
            self.note_time()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            result.gradient_norms.append(gradient_norm(model.parameters()))

        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            result.losses.append(sum(float(loss) for loss in losses))
            losses.clear()
            self.note_time()

        def note_time(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer.training_step = training_step
    trainer.add_callback(Watch())
    return times
