"""An adapter's adapter_config.json: the keys of a LoRA, by name and type, and nothing else.

peft does what that file says. Some of its keys import modules that the file names, or change the base model; so only keys that a
LoRA needs are read, and peft never reads the file itself. Imports no torch.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qlora_kit.errors import CONTROL, UserError, abbreviate
from qlora_kit.output.folder import ADAPTER_FILES
from qlora_kit.untrusted import read_json

# Keys of peft that change what is computed. An adapter that sets one is refused: without it the adapter would be another.
CHANGES_THE_COMPUTATION = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Keys of peft that do not: how the matrices were initialized, and notes for other tools.
WITHOUT_EFFECT = (
    "auto_mapping", "corda_config", "eva_config", "lora_ga_config", "loftq_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config",
)  # fmt: skip
# How the matrices began, where that leaves the base model's weights as they are: peft need not repeat it.
KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
# The others change the base model's weights, which the adapter's folder does not contain, or need more than that folder.
STARTS = r"gaussian|eva|mica|orthogonal|olora|pissa(_niter_\d{1,2})?|corda|lora_ga|loftq"
LITERAL = re.compile(r"[\w.$^-]*")  # a pattern that ends at once, whatever it is matched with


def _check_word(word: str) -> str:
    if CONTROL.search(word):
        raise ValueError("holds a control character")
    return word


def _check_pattern(pattern: str) -> str:
    try:
        if not LITERAL.fullmatch(pattern):
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression ({error})") from None
    return pattern


Rank = Annotated[int, Field(ge=1, le=2**16)]
Alpha = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Word = Annotated[str, Field(max_length=4096), AfterValidator(_check_word)]  # the longest path of Linux
Name = Annotated[Word, Field(min_length=1)]
Pattern = Annotated[Word, AfterValidator(_check_pattern)]
Start = Annotated[str, Field(pattern=rf"(?i)^({STARTS})$")]
MANY = Field(max_length=100_000)
Words = Annotated[list[Word], MANY]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    peft_type: str = "LORA"
    task_type: Word | None = None
    base_model_name_or_path: Word | None = None
    revision: Word | None = None
    inference_mode: bool = False
    target_modules: Pattern | Words | None = None
    exclude_modules: Pattern | Words | None = None
    modules_to_save: Annotated[list[Pattern], MANY] | None = None
    fan_in_fan_out: bool = False

    @property
    def changing_start(self) -> str | None:
        """Return how the matrices began, where that changed the base model's weights."""
        return None

    def patterns(self) -> list[str]:
        """Return what peft matches with the names of modules, as regular expressions or as their ends."""
        found: list[str] = []
        for name in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "layers_pattern",
                     "target_parameters", "rank_pattern", "alpha_pattern"):  # fmt: skip
            stated = getattr(self, name, None) or ()
            found += [stated] if isinstance(stated, str) else stated
        return found


class LoraFile(_Settings):
    """The keys of a LoRA. See peft's LoraConfig for their meanings."""

    peft_type: Literal["LORA"] = "LORA"
    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Start | None = True
    rank_pattern: Annotated[dict[Pattern, Rank], MANY] = {}
    alpha_pattern: Annotated[dict[Pattern, Alpha], MANY] = {}
    layers_to_transform: Index | Annotated[list[Index], MANY] | None = None
    layers_pattern: Pattern | Annotated[list[Pattern], MANY] | None = None
    target_parameters: Words | None = None
    trainable_token_indices: list[Index] | dict[Word, list[Index]] | None = None
    ensure_weight_tying: bool = False

    @property
    def changing_start(self) -> str | None:
        return None if self.init_lora_weights in KEEPS_THE_BASE else str(self.init_lora_weights)


class IA3File(_Settings):
    """The keys of an IA3 adapter. See peft's IA3Config for their meanings."""

    peft_type: Literal["IA3"] = "IA3"
    feedforward_modules: Pattern | Words | None = None
    init_ia3_weights: bool = True


def read_settings(folder: Path) -> tuple[LoraFile | IA3File, list[str]]:
    """Return the settings of an adapter, and the names of keys that were left out.

    Raises:
        UserError: the file is damaged, a key changes the computation in a way that is not supported, or has a wrong type.
    """
    stated = read_json(folder / ADAPTER_FILES[1], "--adapter")
    extra = [name for name in CHANGES_THE_COMPUTATION if _is_set(stated.get(name))]
    kind = stated.get("peft_type", "LORA")
    if extra or kind not in ("LORA", "IA3"):
        name = extra[0] if extra else "peft_type"
        problem = f"sets {name} to {abbreviate(repr(stated[name]))} in {ADAPTER_FILES[1]}, which is not supported"
        raise UserError("--adapter", folder, problem, "use a LoRA adapter without it")
    model = LoraFile if kind == "LORA" else IA3File
    try:
        settings = model.model_validate({name: value for name, value in stated.items() if name in model.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:1]))
        problem = f"has {name} {abbreviate(repr(stated[name]))} in {ADAPTER_FILES[1]}: {first['msg']}"
        raise UserError("--adapter", folder, problem, "copy it again, or correct it") from None
    known = {*LoraFile.model_fields, *IA3File.model_fields, *CHANGES_THE_COMPUTATION, *WITHOUT_EFFECT}
    return settings, [name for name, value in stated.items() if name not in known and _is_set(value)]


def _is_set(value: Any) -> bool:
    """Return whether a key says something: peft writes null or false for those that are not used."""
    return value is not None and value is not False
