"""Base model + adapter -> the engine that answers."""

from dataclasses import replace

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_kit.adapter.attach import attach_adapter, check_vocabulary, is_identity, load_base
from qlora_kit.adapter.fold import check_memory, fold
from qlora_kit.adapter.folder import AdapterSource, check_base, fetch_base
from qlora_kit.inference.generator import Engine, FixedAdapter
from qlora_kit.inference.library_engine import choose_engine
from qlora_kit.model.device import choose_device, usable_dtype
from qlora_kit.model.gpu_placement import choose_device_map
from qlora_kit.model.hub import fetch_model, read_config
from qlora_kit.model.load import set_padding
from qlora_kit.model.packed_base import adopt, read_packed
from qlora_kit.wrapping import say


def load_engine(
    source: AdapterSource,
    tokenizer: PreTrainedTokenizerBase,
    device: str = "auto",
    device_map: str = "auto",
    fixed: FixedAdapter | None = None,
) -> Engine:
    """Load the base model and the adapter, and return the fastest engine that can answer with them.

    Args:
        device: auto, cuda or cpu.
        device_map: auto spreads the model over several GPUs if the first has no room for it; one always takes the first.
        fixed: `--merged` folds the adapter into the weights, `--base_only` leaves it out.

    Raises:
        UserError: base model and adapter cannot be loaded or do not fit together, or there is no room for them.
    """
    device = choose_device(device, "--device")
    folder = fetch_base(source, fetch_model)
    if packed := read_packed(read_config(folder, source.model.name), source.model.name):
        own, line = adopt(source.quantization, packed, source.model.name)
        _say(line if own != source.quantization else None)
        source = replace(source, quantization=own)
    dtype, note = usable_dtype(source.quantization.compute_dtype, device, insisted=False)
    _say(note)
    check_base(source)
    if fixed == "--merged":
        check_memory(source.model, dtype, device)
    modules, note = choose_device_map(folder, source.model, source.quantization, dtype, device, device_map)
    _say(note)
    base = load_base(source, dtype, modules)
    set_padding(tokenizer, base)
    check_vocabulary(source, tokenizer, base)
    model = base if fixed == "--base_only" else _attach(base, source, device, merged=fixed == "--merged")
    engine, note = choose_engine(model, tokenizer.pad_token_id)
    _say(note)
    return engine


def _attach(model: PreTrainedModel, source: AdapterSource, device: str, merged: bool) -> PreTrainedModel | PeftModel:
    adapted = attach_adapter(model, source, device)
    if is_identity(adapted, source):
        _say(f"{source.folder} changes nothing: all its B are zero, so every answer is the base model's")
    return fold(adapted) if merged else adapted


def _say(note: str | None) -> None:
    if note:
        say(note)
