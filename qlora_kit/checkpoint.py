"""The output folder of a run: may it be written, what does it hold, where to go on from, and how results are put into it.

A file that marks a run as finished (the adapter's weights) is moved into place last, so that it is whole or absent.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.cli import Failed
from qlora_kit.config import UserError, load_config
from qlora_kit.fingerprint import weights_fingerprint
from qlora_kit.generation import find_stop_ids
from qlora_kit.hub import is_local, model_folder, read_json
from qlora_kit.report import CURVES, LOG, METRICS, RunReport, command_line, now, versions
from qlora_kit.settings import Config
from qlora_kit.tokenizer import separator_id, tokenizer_fingerprint, vocabulary_fingerprint

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.perplexity import Perplexity

CONFIG, PASSPORT, CHECKPOINTS = "config.yaml", "run.json", "checkpoints"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
OUTPUT_FILES = (*ADAPTER_FILES, LOG, METRICS, CURVES, CONFIG, PASSPORT)  # --overwrite removes these and the checkpoints
# Settings that a resumed run may change: they decide neither what is trained, nor on what, nor in which order.
MAY_CHANGE = (
    "data.max_eval_samples", "training.output_dir", "training.num_epochs", "training.max_steps",
    "training.gradient_checkpointing", "training.logging_steps", "training.eval_steps", "training.save_steps",
    "training.save_total_limit", "training.early_stopping_patience", "training.report_to",
)  # fmt: skip


def check_output_dir(name: str, overwrite: bool, resume: bool) -> Path:
    """The output folder, when a run may write there. Creates and removes nothing.

    Raises:
        UserError: it cannot be written, or holds a run that was neither to be resumed nor overwritten.
    """
    folder = Path(name).expanduser()
    key = f"training.output_dir: {name}"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{key}: {existing} is a file, not a folder; name another --output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{key}: cannot be written; change its permissions or name another --output_dir")
    finished, unfinished = (folder / ADAPTER_FILES[0]).exists(), any(folder.glob(f"{CHECKPOINTS}/checkpoint-*"))
    if not resume and not overwrite and (finished or unfinished):
        what = "a finished adapter" if finished else "an unfinished run"
        raise UserError(
            f"{key}: already holds {what}; continue it with --resume, replace it with --overwrite, or name another --output_dir"
        )
    return folder


def find_checkpoint(folder: Path, config: Config, wanted: str) -> Path:
    """The checkpoint to go on from: the one named, or the newest of the output folder.

    Raises:
        UserError: there is none, or the settings are not those of the run that wrote it.
    """
    candidates = [Path(wanted).expanduser()] if wanted else list(folder.glob(f"{CHECKPOINTS}/checkpoint-*"))
    complete = [path for path in candidates if (path / "trainer_state.json").is_file() and (path / ADAPTER_FILES[0]).is_file()]
    if not complete:
        raise UserError(
            f"--resume: no checkpoint in {wanted or folder / CHECKPOINTS}; start without --resume, or name a checkpoint folder"
        )
    newest = max(complete, key=_step)
    if newest.absolute().parents[1] != folder.absolute() or not (folder / CONFIG).is_file():
        raise UserError(f"--resume {newest}: is no checkpoint of a run in {folder}; name the folder of its run as --output_dir")
    _check_same_run(folder, config)
    return newest


def _step(checkpoint: Path) -> int:
    return int(read_json(checkpoint / "trainer_state.json", "--resume")["global_step"])


def _check_same_run(folder: Path, config: Config) -> None:
    """Refuse to resume when a setting changed that decides what is trained, on what, or in which order.

    Raises:
        UserError: one problem for each such key.
    """
    before = load_config(folder / CONFIG).model_dump()
    problems = []
    for section, values in config.model_dump().items():
        for key, value in values.items():
            dotted, old = f"{section}.{key}", before[section][key]
            fixed = section not in ("performance", "generation") or dotted == "performance.fused_lora"
            if value != old and fixed and dotted not in MAY_CHANGE:
                problems.append(
                    f"{dotted}: {value}: the run to resume has {old}; set it back, or start anew in another --output_dir"
                )
    if problems:
        raise UserError(*problems)


def open_output(folder: Path, report: RunReport, checkpoint: Path | None, overwrite: bool) -> None:
    """Begin writing: the resolved config and the log. Only now, with model and data ready, does --overwrite remove anything."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite and checkpoint is None:
        for name in OUTPUT_FILES:  # so that no file of the earlier run can be taken for one of the new run
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / CONFIG).write_text(report.config.to_yaml(), encoding="utf-8")
    resumed_step = _step(checkpoint) if checkpoint else None
    report.log.open(folder, resumed_step)


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the PEFT adapter and the tokenizer beside their place, then move them in, the weights last.

    Raises:
        Failed: the last update made the adapter infinite or NaN.
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
        raise Failed("the adapter holds values that are no numbers, so it was not written: try a lower --learning_rate")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        write_adapter(model, Path(staging))
        tokenizer.save_pretrained(staging)
        Path(staging, "README.md").unlink(missing_ok=True)  # peft's model card is a form to fill in
        for file in sorted(Path(staging).iterdir(), key=lambda path: path.name == ADAPTER_FILES[0]):
            os.replace(file, folder / file.name)


def write_adapter(model: "PeftModel", folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors; no room on the GPU is taken for it.

    peft copies tensors that share memory, as those of fast/adapters.py do, where they lie: it is given copies. Without
    save_embedding_layers=False it asks the Hub for the base model's vocabulary.
    """
    weights = {name: parameter.data.cpu() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)


def write_passport(folder: Path, passport: dict[str, Any]) -> None:
    """Write run.json in one step, so that a reader never meets half of it."""
    staged = folder / ".run.json"
    staged.write_text(json.dumps(passport, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, folder / PASSPORT)


def build_passport(
    report: RunReport, tokenizer: "PreTrainedTokenizerBase", steps: int, before: "Perplexity | None", after: "Perplexity | None"
) -> dict[str, Any]:
    """Where an adapter comes from and how to load it: inference_example.py goes by this."""
    config, name = report.config, report.config.model.name
    template, base = tokenizer.chat_template, model_folder(config.model)
    return {
        "base_model": {
            "name": name,
            "revision": config.model.revision,
            "folder": str(Path(name).resolve()) if is_local(name) else None,
        },
        "base_commit": base.name if base and not is_local(name) else None,
        "base_weights_sha256": weights_fingerprint(base) if base else None,
        "trust_remote_code": config.model.trust_remote_code,
        "quantization": config.quantization.model_dump() | {"compute_dtype": report.machine.dtype_name},
        "prompt_style": report.data["prompt_style"],
        "separator_id": separator_id(tokenizer),
        "stop_ids": find_stop_ids(tokenizer, report.data["prompt_style"]),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "vocabulary_sha256": vocabulary_fingerprint(tokenizer),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        "data": report.data,
        "seed": config.training.seed,
        "optimizer_steps": steps,
        "perplexity": {"base": asdict(before), "adapter": asdict(after), "definition": report.definition(after)}
        if before and after
        else None,
        "micro_batch": report.micro_batch,
        "memory_gib": {"predicted_peak": report.predicted_gib, **report.machine.memory_gib()},
        "versions": versions(),
        "hardware": report.machine.description,
        "command": command_line(),
        "started": report.started,
        "finished": now(),
        "seconds": round(report.seconds(), 1),
    }
