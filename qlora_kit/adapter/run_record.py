"""run.json of an adapter's folder, as far as a reader uses it: each value by its type. Anyone may have written the file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_kit.adapter.settings import Index, Name
from qlora_kit.config import QuantizationSettings
from qlora_kit.errors import UserError
from qlora_kit.output.folder import PROVENANCE
from qlora_kit.untrusted import read_json

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Style = Literal["text", "chat", "instruction"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class BaseRecord(_Record):
    """The base model: its name as it was given, and the folder that this was, if it was one."""

    name: Name
    folder: Name | None = None
    revision: Name | None = None


class DataRecord(_Record):
    """The packing of the data: whether records shared blocks; None where that did not arise."""

    packed: bool | None = None


class RunRecord(_Record):
    """The keys of run.json that say how to load and prompt the adapter."""

    base_model: BaseRecord
    base_commit: Name | None = None
    base_weights_sha256: Digest | None = None
    adapter_sha256: Digest | None = None
    tokenizer_sha256: Digest | None = None
    vocabulary_sha256: Digest | None = None
    trust_remote_code: bool
    quantization: QuantizationSettings
    prompt_style: Style
    stop_ids: Annotated[list[Index], Field(min_length=1, max_length=1000)] | None = None
    data: DataRecord = DataRecord()


def read_record(run: Path, folder: Path) -> RunRecord:
    """Return what run.json says.

    Args:
        run: the folder that holds it.
        folder: the adapter's.

    Raises:
        UserError: it is damaged.
    """
    stated: Any = read_json(run / PROVENANCE, "--adapter")
    try:
        return RunRecord.model_validate(stated, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        problem = f"has a damaged {PROVENANCE} ({reason})"
        raise UserError("--adapter", folder, problem, "copy it again, or delete it to load a plain adapter") from None
