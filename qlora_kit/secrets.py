"""Keep tokens and passwords out of configs and logs.

The Hub's libraries read their token from HF_TOKEN or from what `hf auth login` stored; wandb reads WANDB_API_KEY. So a config,
which is saved and shared with the adapter, needs no secret.
"""

import re
from collections.abc import Iterator
from typing import Any

from qlora_kit.errors import Problem

# Names that other tools give to keys for secrets.
NAME = re.compile(
    r"^token$|(?:^|_)(?:(?:hf|hub|huggingface|auth|access|api|wandb|bearer)_?(?:token|key)|passwords?|passwd|secrets?|credentials?)$"
)
# The Hub's tokens of users and of organizations, and a password in a URL.
VALUE = re.compile(r"(?P<kept>\b(?:hf_|api_org_))[A-Za-z0-9]{30,}|(?P<scheme>\w://)[^/\s:@'\"]+:[^/\s@]+(?=@)")


def is_secret(key: str, value: Any) -> bool:
    """Return whether a key has a secret's name, or a string anywhere in its value looks like a secret."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    return bool(NAME.search(name)) or any(VALUE.search(text) for text in _strings(value))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a value, looking into each object once: through YAML's aliases a list may hold itself."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list | dict) and id(item) not in seen:
            seen.add(id(item))
            waiting += item if isinstance(item, list) else [*item, *item.values()]


def secret_problem(key: str, place: str) -> Problem:
    """Return the problem of a secret in a config, without the secret."""
    variable = "WANDB_API_KEY" if "wandb" in key.lower() else "HF_TOKEN"
    problem = "holds an access token or password, which would be saved with the adapter"
    return Problem(redact(key), None, problem, f"remove it, and set the environment variable {variable} instead", place)


def redact(text: str) -> str:
    """Return the text with *** for everything that looks like a secret."""
    return VALUE.sub(lambda match: f"{match['kept'] or match['scheme']}***", text)
