"""Load the tokenizer; find what begins, ends and pads a text; compute fingerprints. Imports no torch by itself."""

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.hub import is_local
from qlora_kit.model.small_files import LARGEST_TEMPLATE, check_small_files
from qlora_kit.untrusted import read_regular_file, user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_ENDS = ("endoftext", "endofdocument", "eos", "eostoken", "/s", "eod", "endofsentence")  # as _letters writes names


def load_tokenizer(model: ModelSettings, chat_template: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the base model's tokenizer, without the model's weights.

    Args:
        chat_template: a file with the template that it takes instead of its own; None keeps that.

    Raises:
        UserError: it cannot be loaded, or could not be saved with an adapter; or the file holds no template.
    """
    from transformers import AutoTokenizer

    template = read_chat_template(chat_template)
    if is_local(model.name):  # from the Hub, fetch_tokenizer has checked them
        check_small_files(user_path(model.name, "model.name"), "model.name", model.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.expanduser(model.name), revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # every tokenizer has its own; those in Rust raise bare ones
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        problem = f"has a tokenizer that cannot be loaded ({reason})"
        raise UserError("model.name", model.name, problem, "copy or download it again") from error
    _check_templates(tokenizer, model.name)
    if template:
        tokenizer.chat_template = template
    return tokenizer


def read_chat_template(file: str | None) -> str | None:
    """Return the chat template in a file; None for None. Imports no transformers.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or empty, or is no Jinja template.
    """
    if file is None:
        return None
    key, remedy = "data.chat_template", "use a Jinja file, or null for the tokenizer's own template"
    try:
        text = read_regular_file(user_path(file, key), LARGEST_TEMPLATE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(key, file, f"is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise UserError(key, file, f"cannot be read ({error.strerror})", remedy) from None
    except ValueError as error:
        raise UserError(key, file, f"cannot be read ({error})", remedy) from None
    if not text.strip():
        raise UserError(key, file, "is empty", remedy)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols", _Generation], optimized=False).compile(text)  # runs nothing of it
    except Exception as error:
        line = getattr(error, "lineno", None)
        reason = (f"line {line}: " if line else "") + (" ".join(str(error).split())[:200] or type(error).__name__)
        raise UserError(key, file, f"is no Jinja template ({reason})", "correct it") from None
    return text.replace("\r\n", "\n")


class _Generation(Extension):
    """The block `{% generation %}` of transformers, which marks answers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_templates(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Check that chat templates are texts, and that the names of several are no paths: each is saved to a file of its name."""
    templates: Any = tokenizer.chat_template or ""
    for template, text in templates.items() if isinstance(templates, dict) else [("default", templates)]:
        problem = None
        if not isinstance(text, str) or len(text) > LARGEST_TEMPLATE:
            problem = f"has a chat template that is no text, or one of more than {LARGEST_TEMPLATE:,} characters"
        elif not isinstance(template, str) or not re.fullmatch(r"[\w-][\w.-]{0,99}", template):
            problem = f"has a chat template with the name {str(template)[:100]!r}, which is no file name"
        if problem:
            raise UserError("model.name", name, problem, "use letters and digits in the model's tokenizer_config.json")


def find_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before each text, such as `<s>` or `[CLS]`, and behind it, such as `[SEP]`."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(inside) + 1):
        if whole[at : at + len(inside)] == inside:
            return whole[:at], whole[at + len(inside) :]
    return [], []


def find_text_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the id of the token that ends a text; None if there is none.

    In this order: the token that the tokenizer puts behind a text; the end-of-sequence token if its name is one of TEXT_ENDS;
    the first of TEXT_ENDS among the added tokens; the end-of-sequence token. In chat models the last often ends a turn only:
    `<|im_end|>` in Qwen's, where `<|endoftext|>` ends a text, and `<|eot_id|>` in Llama 3's, where `<|end_of_text|>` does.
    """
    _, behind = find_frame(tokenizer)
    if behind:
        return behind[0]
    ends = [name for name in tokenizer.get_added_vocab() if _letters(name) in TEXT_ENDS]
    if not ends or _letters(tokenizer.eos_token or "") in TEXT_ENDS:
        return tokenizer.eos_token_id
    return tokenizer.get_added_vocab()[min(ends, key=lambda name: TEXT_ENDS.index(_letters(name)))]


def _letters(name: str) -> str:
    """Return the letters of a token's name: `endoftext` of `<|end_of_text|>`, `/s` of `</s>`."""
    return re.sub(r"[^a-z/]", "", name.lower())


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the token that follows each document, as find_text_end finds it.

    Raises:
        UserError: no token ends a text.
    """
    separator = find_text_end(tokenizer)
    if separator is None:
        problem = "has a tokenizer without an end-of-sequence token, so that documents cannot be separated"
        raise UserError("model.name", tokenizer.name_or_path, problem, "use another model")
    return separator


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return a token to pad with; any will do, since padding is neither attended to nor trained."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return vocabulary_fingerprint(tokenizer)
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def template_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the SHA-256 of the chat template; None if there is none."""
    template = tokenizer.chat_template
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 of all tokens and their ids."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
