"""Documents -> one stream of tokens -> blocks of equal length, each token a label at its own position.

Every document is followed by the separator token, which is trained like any other token, so that the model learns where a
text ends. The stream is cut into blocks; only the tail that fills no block is left out. Reading documents: sources.py.
Chat and instruction records, packing and streaming are not handled here.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config import UserError
from qlora_kit.settings import ModelConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 64


@dataclass(frozen=True)
class Blocks:
    """Token blocks of equal length, as a map-style data set for the Trainer."""

    ids: "np.ndarray"  # (blocks, block length), int32
    documents: int
    join_rule: str  # how rows became documents
    tail_tokens: int  # tokens at the end of the stream that filled no block

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        block = torch.from_numpy(self.ids[index].astype("int64"))
        return {"input_ids": block, "labels": block}  # the model shifts: position t is predicted from the ones before it

    @property
    def tokens(self) -> int:
        return int(self.ids.size)

    def take(self, count: int | None) -> "Blocks":
        return Blocks(self.ids[:count], self.documents, self.join_rule, self.tail_tokens)

    def fingerprint(self) -> str:
        """SHA-256 of the token ids: the same data, tokenizer and block length give the same value."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """The base model's tokenizer, without its weights.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model.name, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name: {model.name}: its tokenizer cannot be loaded ({reason}); copy or download it again"
        ) from error


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that stands after each document: Qwen's and GPT-2's `<|endoftext|>`, else the end-of-sequence token.

    Qwen's chat models name `<|im_end|>` as their end of sequence; that one ends a turn, not a text.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return vocabulary["<|endoftext|>"]
    if tokenizer.eos_token_id is None:
        raise UserError(
            "model.name: its tokenizer has no end-of-sequence token, so documents cannot be separated; use another model"
        )
    return int(tokenizer.eos_token_id)


def tokenize(documents: list[str], tokenizer: "PreTrainedTokenizerBase") -> "np.ndarray":
    """All documents as one stream of ids (int32), a separator after each; cached on disk by content.

    The Rust tokenizer spreads each batch over all cores.
    """
    import numpy as np
    from datasets import Dataset, config, utils

    separator = separator_id(tokenizer)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        return {"input_ids": [[*document, separator] for document in ids]}

    utils.enable_progress_bars() if _worth_a_bar(documents) else utils.disable_progress_bars()
    cache = Path(config.HF_DATASETS_CACHE, "qlora_kit", f"{_cache_key(documents, tokenizer, separator)}.arrow")
    cache.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_dict({"text": documents}).map(
        encode,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        remove_columns="text",
        cache_file_name=str(cache),
        new_fingerprint=cache.stem,  # known already: hashing the closure would be slow and may differ between runs
        desc="Tokenizing documents",
    )
    chunks = table.with_format("numpy").iter(batch_size=1024)
    return np.concatenate([np.asarray(row, dtype=np.int32) for chunk in chunks for row in chunk["input_ids"]])


def _worth_a_bar(documents: list[str]) -> bool:
    return sum(map(len, itertools.islice(documents, 10_000))) > 2_000_000


def _cache_key(documents: list[str], tokenizer: "PreTrainedTokenizerBase", separator: int) -> str:
    digest = hashlib.sha256(tokenizer_fingerprint(tokenizer).encode())
    digest.update(str(separator).encode())
    for document in documents:
        digest.update(len(document).to_bytes(8, "big"))
        digest.update(document.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(described.encode()).hexdigest()


def cut_into_blocks(stream: "np.ndarray", length: int, documents: int, join_rule: str, key: str) -> Blocks:
    """Cut a stream of ids into rows of `length`; what fills no row at the end is counted and left out.

    Raises:
        UserError: not even one block.
    """
    count = len(stream) // length
    if count == 0:
        shorter = f", or --max_length {len(stream)}" if len(stream) >= 8 else ""
        raise UserError(f"{key}: {len(stream)} tokens do not fill one block of data.max_length {length}; use more text{shorter}")
    ids = stream[: count * length].reshape(count, length)
    return Blocks(ids, documents, join_rule, tail_tokens=len(stream) - count * length)


def hold_out(documents: list[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Whole documents drawn by seed for evaluation; the rest, in their order, for training.

    A source with fewer than 10 documents is cut near its end instead, at a line's end.
    """
    if len(documents) < 10:
        text = "\n".join(documents)
        cut = text.rfind("\n", 0, round(len(text) * (1 - fraction))) + 1 or round(len(text) * (1 - fraction))
        return [text[:cut]], [text[cut:]]
    count = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    chosen = set(random.Random(seed).sample(range(len(documents)), count))
    train = [document for number, document in enumerate(documents) if number not in chosen]
    return train, [documents[number] for number in sorted(chosen)]
