"""Write a PEFT adapter atomically."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import Failed
from qlora_kit.output.folder import ADAPTER_FILES, SAVING, TOKENIZER_BYTES, flush, report_disk_errors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the PEFT adapter and the tokenizer to a temporary folder, then move its files to `folder`, the weights last.

    Raises:
        Failed: the adapter contains NaN or infinity, or the disk is full or broken.
    """
    size = 4.0 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) + TOKENIZER_BYTES
    with report_disk_errors("the adapter", folder, size), tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as staging:
        write_adapter(model, Path(staging))
        tokenizer.save_pretrained(staging)
        for file in sorted(Path(staging).iterdir(), key=lambda path: path.name == ADAPTER_FILES[0]):
            flush(file)
            if file.is_dir():  # several chat templates are a folder, which os.replace cannot replace
                shutil.rmtree(folder / file.name, ignore_errors=True)
            os.replace(file, folder / file.name)
        flush(folder)


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
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form
