"""The base model's tokenizer without its weights, and what is asked of it beside tokens. Imports no torch by itself."""

import hashlib
import re
from typing import TYPE_CHECKING, Any

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelSettings) -> "PreTrainedTokenizerBase":
    """The base model's tokenizer, without its weights.

    Raises:
        UserError: it cannot be loaded, or could not be saved beside an adapter.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name: {model.name}: its tokenizer cannot be loaded ({reason}); copy or download it again"
        ) from error
    _check_template_names(tokenizer, model.name)
    return tokenizer


def _check_template_names(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Several chat templates are saved as a file each, under the name that each has: it must be no path."""
    templates: Any = tokenizer.chat_template
    for template in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w-][\w.-]{0,99}", template):
            raise UserError(
                f"model.name: {name}: a chat template of its tokenizer is called {template[:100]!r}, which names no file; "
                "call it by letters and digits in the model's tokenizer_config.json"
            )


def token_id(token: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id of a token, where the vocabulary has it; to list 150,000 tokens for that would take a tenth of a second."""
    found: Any = tokenizer.convert_tokens_to_ids(token)  # where there is none: that of unknown tokens, or None
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that stands after each document: Qwen's and GPT-2's `<|endoftext|>`, else the end-of-sequence token.

    Qwen's chat models name `<|im_end|>` as their end of sequence; that one ends a turn, not a text.
    """
    separator = token_id("<|endoftext|>", tokenizer)
    if separator is not None:
        return separator
    if tokenizer.eos_token_id is None:
        raise UserError(
            "model.name: its tokenizer has no end-of-sequence token, so documents cannot be separated; use another model"
        )
    return int(tokenizer.eos_token_id)


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any token will do: padding is neither seen nor trained."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(described.encode()).hexdigest()


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of which token has which id."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
