"""Every setting: section, type, range, default.

These defaults are the only ones: a test checks that config.yaml, which explains each key, states the same. config_file.py reads
files and the command line, and reports mistakes.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MIB, GIB = 2**20, 2**30  # bytes
SAMPLE_TOKENS = 64  # of an answer to training.sample_prompts


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads `on` and `yes` as booleans, and Python counts True as 1
        raise ValueError("should be a number, not true or false")
    return value


def _target_modules(value: Any) -> Any:
    if value == "all-linear":
        return value
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError("should be a list of module names, such as [q_proj, v_proj], or all-linear")
    if len(set(value)) < len(value):
        raise ValueError("names a module twice")
    return value


def _true_false_or(word: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        for allowed in (True, False, word):
            if value == allowed:  # 1 and 0 count as true and false
                return allowed
        raise ValueError(f"should be true, false or {word}")

    return check


def _micro_batch(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        count = int(_not_bool(value))
        if count != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        count = 0
    if not 1 <= count <= MOST_SEQUENCES:
        raise ValueError(f"should be auto or a whole number from 1 to {MOST_SEQUENCES}")
    return count


def _eval_split(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value and not _is_number(value)):
        return value
    if isinstance(value, bool) or not _is_number(value) or not 0 < float(value) < 1:
        raise ValueError("should be a split's name, a file, a fraction between 0 and 1, or null")
    return float(value)


def _dataset(value: Any) -> Any:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("should be a Hub name, a file, a folder, or a list of them")
    return value


def _temperature(value: float) -> float:
    if value != 0 and not 0.001 <= value <= 100:  # logits divided by a smaller number overflow
        raise ValueError("should be 0, which always takes the likeliest token, or from 0.001 to 100")
    return value


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


# The upper ends are far above any use, and low enough that arithmetic with them stays exact, quick and finite.
MOST, MOST_SEQUENCES, MOST_TOKENS = 10**9, 2**16, 2**24
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=MOST)]
Sequences = Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=MOST_SEQUENCES)]
Integer = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, le=MOST)]
Positive = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=MOST, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=MOST, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Switch = Annotated[Literal[True, False, "auto"], BeforeValidator(_true_false_or("auto"))]


class Section(BaseModel):
    """A group of settings: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    name: Name = "Qwen/Qwen2.5-3B-Instruct"
    revision: Name | None = None
    trust_remote_code: bool = False


class QuantizationSettings(Section):
    load_in_4bit: bool = True
    quant_type: Literal["nf4", "fp4"] = "nf4"
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    use_double_quant: bool = True


class LoraSettings(Section):
    rank: Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=2**16)] = 16
    alpha: Positive = 32.0
    dropout: Fraction = 0.05
    target_modules: Annotated[list[str] | str, BeforeValidator(_target_modules)] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


class DataSettings(Section):
    dataset: Annotated[list[str] | str, BeforeValidator(_dataset)] = "Salesforce/wikitext"
    subset: Name | None = "wikitext-2-raw-v1"
    format: Literal["auto", "text", "alpaca", "sharegpt", "messages", "completion", "instruction"] = "auto"
    text_field: Name = "text"
    train_on: Literal["assistant", "last", "all"] = "assistant"
    chat_template: Name | None = None
    max_length: Annotated[int, BeforeValidator(_not_bool), Field(ge=8, le=MOST_TOKENS)] = 512
    too_long: Literal["cut", "drop"] = "cut"
    packing: Switch = "auto"
    train_split: Name = "train"
    eval_split: Annotated[str | float | None, BeforeValidator(_eval_split)] = "validation"
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = 256

    @property
    def names(self) -> list[str]:
        """Return `dataset` as a list."""
        return self.dataset if isinstance(self.dataset, list) else [self.dataset]


class TrainingSettings(Section):
    output_dir: Name = "./output_qlora_qwen_3b"
    num_epochs: Positive = 3.0
    max_steps: Count | None = None
    batch_size: Sequences = 1
    gradient_accumulation_steps: Sequences = 16
    learning_rate: Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=1e30)] = 2.0e-4  # more overflows in fp32
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 0.3
    max_skipped_steps: Integer = 0
    gradient_checkpointing: Switch = "auto"
    optim: Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch"] = "paged_adamw_8bit"
    logging_steps: Count = 10
    eval_steps: Count = 100
    save_steps: Count = 100
    save_total_limit: Count | None = 2
    keep_best: bool = False
    early_stopping_patience: Count | None = None
    sample_prompts: list[Name] | None = None
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    seed: Annotated[int, BeforeValidator(_not_bool), Field(ge=0, lt=2**32)] = 42  # numpy accepts no larger seed

    def warmup_steps(self, steps: int) -> int:
        """Return how many of a run's steps the learning rate rises, if the schedule has a warm-up."""
        return math.ceil(self.warmup_ratio * steps)

    @property
    def optimizer_bytes(self) -> float:
        """Return the bytes of optimizer state per trained parameter: two moments of 8 or of 32 bits."""
        return 2.0 if "8bit" in self.optim else 8.0

    @property
    def keeps_best_adapter(self) -> bool:
        """Return whether the run ends with the adapter of the best evaluation."""
        return self.keep_best or self.early_stopping_patience is not None


class PerformanceSettings(Section):
    micro_batch: Annotated[int | Literal["auto"], BeforeValidator(_micro_batch)] = "auto"
    fused_lora: bool = True
    compile: Switch = "auto"
    cuda_graphs: Switch = "auto"
    offload_embedding: bool = False
    fsdp: Annotated[Literal[True, False, "offload"], BeforeValidator(_true_false_or("offload"))] = False
    vram_limit_gib: Positive | None = None


class GenerationSettings(Section):
    max_new_tokens: Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=MOST_TOKENS)] = 128
    temperature: Annotated[NonNegative, AfterValidator(_temperature)] = 0.7
    top_p: Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=1)] = 0.9
    top_k: Integer = 50
    repetition_penalty: Annotated[Positive, Field(ge=0.01, le=100)] = 1.1


class Config(Section):
    """Every setting of a run."""

    model: ModelSettings = ModelSettings()
    quantization: QuantizationSettings = QuantizationSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()
    performance: PerformanceSettings = PerformanceSettings()
    generation: GenerationSettings = GenerationSettings()

    @property
    def effective_batch(self) -> int:
        """Return the number of sequences per optimizer step."""
        return self.training.batch_size * self.training.gradient_accumulation_steps

    def steps_per_epoch(self, blocks: int) -> int:
        """Return the optimizer steps of one pass over `blocks` sequences; the last step may take fewer than the others."""
        return math.ceil(blocks / self.effective_batch)

    def total_steps(self, blocks: int) -> int:
        """Return the optimizer steps of the whole run on `blocks` sequences."""
        return self.training.max_steps or math.ceil(self.training.num_epochs * self.steps_per_epoch(blocks))

    def to_yaml(self) -> str:
        """Return the config as a YAML file that load_config reads back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
