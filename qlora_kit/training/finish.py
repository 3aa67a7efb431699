"""Write what a run leaves at its end."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qlora_kit.adapter.save import save_adapter
from qlora_kit.output.model_card import write_model_card
from qlora_kit.output.new_run import move_in, staging
from qlora_kit.output.provenance import write_provenance
from qlora_kit.training.report import RunReport, RunResult, build_provenance


def save_result(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    report: RunReport,
    result: RunResult,
    ending: dict[str, Any],
    folder: Path,
) -> None:
    """Write adapter, tokenizer, model card and run.json beside the files of the folder, then move them in together.

    Args:
        ending: what the trainer says of its end, for run.json.

    Raises:
        Failed: the adapter contains NaN or infinity, or the disk is full or broken.
    """
    with staging(folder) as new:
        save_adapter(model, tokenizer, new)
        provenance = build_provenance(report, tokenizer, result, **ending)
        write_model_card(new, provenance, folder)
        write_provenance(new, provenance)
    move_in(folder)
