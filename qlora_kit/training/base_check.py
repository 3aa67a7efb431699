"""Check a base model before its weights are downloaded or read: does it fit tokenizer, LoRA and 4 bits?"""

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from qlora_kit.adapter.targets import add_lora, check_names
from qlora_kit.config import GIB, Config
from qlora_kit.model.hub import read_model_config
from qlora_kit.model.load import check_context, check_packed
from qlora_kit.model.packed_base import read_packed
from qlora_kit.model.projections import count_packed
from qlora_kit.model.skeleton import build_skeleton, pack_skeleton
from qlora_kit.model.vocabulary import check_vocabulary

LARGE = 2**30  # bytes of weights that stay in 16 bits, worth a line before they are loaded


def check_base(config: Config, lora_config: LoraConfig, tokenizer: PreTrainedTokenizerBase, fast: bool) -> str | None:
    """Check all that config.json tells of a base model, on a model without weights; returns a note, if there is one.

    Args:
        fast: whether the run takes the fast path, whose models peft wraps without a word.

    Raises:
        UserError: the model has too few embeddings or positions, no target for LoRA, nothing to pack, or peft refuses it.
    """
    name, note = config.model.name, None
    skeleton = build_skeleton(config.model)
    check_vocabulary(tokenizer, skeleton, name)
    check_context(skeleton, config.data.max_length)
    if fast:
        check_names(skeleton, lora_config)
    if config.quantization.load_in_4bit and not read_packed(read_model_config(config.model), name):
        pack_skeleton(skeleton)
        check_packed(skeleton, name)
        packing = count_packed(skeleton)
        size = 2 * packing.unpacked.total()
        if size > LARGE:
            count = f"{packing.unpacked.total():,} of {packing.weights:,} projection weights"
            note = f"{name}: {count} cannot be packed and take {size / GIB:.1f} GiB in 16 bits: {packing.kinds}"
    if not fast:
        add_lora(skeleton, lora_config)
    return note
