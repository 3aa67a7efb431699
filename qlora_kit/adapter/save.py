"""Write a PEFT adapter, with the tokenizer that it was trained with."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import Failed
from qlora_kit.output.folder import ADAPTER_FILES, TOKENIZER_BYTES, flush_tree, report_disk_errors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the PEFT adapter and the tokenizer into a folder that nobody reads yet, and flush them to the disk.

    Raises:
        Failed: the adapter contains NaN or infinity, or the disk is full or broken.
    """
    size = 4.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) + TOKENIZER_BYTES
    with report_disk_errors("the adapter", folder, size, "free some space, and continue with --resume"):
        write_adapter(model, folder)
        tokenizer.save_pretrained(folder)
        flush_tree(folder)


def write_adapter(model: "PeftModel", folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors; takes no GPU memory.

    peft copies tensors that share memory, as those of fast/flat_adapters.py do, on their device; it is given copies on the CPU.
    Without save_embedding_layers=False it asks the Hub for the base model's vocabulary.

    Raises:
        Failed: the adapter contains NaN or infinity.
    """
    weights = {name: parameter.data.cpu() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not all(value.isfinite().all() for value in weights.values()):
        raise Failed("the adapter contains NaN or infinity and was not written; train again with a lower --learning_rate")
    for settings in model.peft_config.values():
        if os.path.isdir(base := settings.base_model_name_or_path or ""):
            settings.base_model_name_or_path = os.path.abspath(base)  # peft finds it from any folder
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form
    weights_file, settings_file = (folder / name for name in ADAPTER_FILES)
    shutil.copymode(settings_file, weights_file)  # safetensors lets the owner alone read it
