"""Check the settings and tokenizer files of a model's or an adapter's folder before a library opens them.

The libraries read whatever lies under these names, whole: a pipe would let them wait for ever, a device would fill the memory.
"""

from pathlib import Path
from typing import Any

from qlora_kit.errors import UserError
from qlora_kit.planning.model_config import check_model_config
from qlora_kit.untrusted import parse_json, read_regular_file, regular_size

LARGEST_TEMPLATE = 2**20  # bytes
LARGEST_VOCABULARY = 2**26  # bytes; Gemma's tokenizer.json, the largest known, has half of it
MOST_OBJECTS = 2**22  # of a vocabulary: each takes about 100 bytes in memory, and two in the file
SETTINGS = (
    "added_tokens.json", "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
VOCABULARIES = ("merges.txt", "spiece.model", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")


def check_small_files(folder: Path, key: str, name: object) -> None:
    """Check the files that decide how a model reads and writes text, as far as they are there.

    Args:
        key: the flag or config key that led to the folder.
        name: what it holds, for the message.

    Raises:
        UserError: one is no regular file, is too large, or holds no JSON object where it should, or a setting is of
            another type or out of range.
    """
    for file in (*SETTINGS, *VOCABULARIES, *TEMPLATES):
        for path in folder.glob(file):
            try:
                content = _check(path, file)
                if file in SETTINGS:
                    check_model_config(content, path.name)
            except UserError as error:
                raise error.under(key, name) from None
            except (OSError, ValueError) as error:
                problem = f"has a {path.name} that cannot be used ({error})"
                raise UserError(key, name, problem, "copy or download it again") from None


def _check(path: Path, file: str) -> Any:
    if file in TEMPLATES:
        return read_regular_file(path, LARGEST_TEMPLATE)
    if file in SETTINGS:
        content = parse_json(read_regular_file(path))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    if regular_size(path) > LARGEST_VOCABULARY:
        raise ValueError(f"more than {LARGEST_VOCABULARY:,} bytes")
    if path.suffix == ".json":
        text = read_regular_file(path, LARGEST_VOCABULARY)
        if text.count(b"{") + text.count(b"[") > MOST_OBJECTS:
            raise ValueError(f"more than {MOST_OBJECTS:,} lists and objects")
    return None
