"""Load the tokenizer; find its separator, its padding and its fingerprint. Imports no torch by itself."""

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model: ModelSettings) -> "PreTrainedTokenizerBase":
    """Load the base model's tokenizer, without the model's weights.

    Raises:
        UserError: it cannot be loaded, or could not be saved with an adapter.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.expanduser(model.name), revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        problem = f"has a tokenizer that cannot be loaded ({' '.join(str(error).split())[:300]})"
        raise UserError("model.name", model.name, problem, "copy or download it again") from error
    _check_template_names(tokenizer, model.name)
    return tokenizer


def _check_template_names(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Check that the names of several chat templates are no paths: each template is saved to a file of its name."""
    templates: Any = tokenizer.chat_template
    for template in templates if isinstance(templates, dict) else ():
        if not re.fullmatch(r"[\w-][\w.-]{0,99}", template):
            problem = f"has a chat template with the name {template[:100]!r}, which is no file name"
            remedy = "use letters and digits in the model's tokenizer_config.json"
            raise UserError("model.name", name, problem, remedy)


def token_id(token: str, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id of a token, or None if the vocabulary lacks it; get_vocab would take a tenth of a second."""
    found: Any = tokenizer.convert_tokens_to_ids(token)  # None or the unknown token's id if the vocabulary lacks it
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that follows each document: Qwen's and GPT-2's `<|endoftext|>`, else the end-of-sequence token.

    The end-of-sequence token of Qwen's chat models, `<|im_end|>`, ends a turn and not a text.

    Raises:
        UserError: the tokenizer has neither.
    """
    separator = token_id("<|endoftext|>", tokenizer)
    if separator is not None:
        return separator
    if tokenizer.eos_token_id is None:
        problem = "has a tokenizer without an end-of-sequence token, so that documents cannot be separated"
        raise UserError("model.name", tokenizer.name_or_path, problem, "use another model")
    return int(tokenizer.eos_token_id)


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return a token to pad with; any will do, since padding is neither attended to nor trained."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return vocabulary_fingerprint(tokenizer)
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of all tokens and their ids."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
