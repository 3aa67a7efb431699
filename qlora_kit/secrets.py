"""Access tokens and passwords: kept out of configs, and out of what is printed or written.

The Hub's libraries read their token from HF_TOKEN or from what `hf auth login` stored; wandb reads WANDB_API_KEY. Neither needs a
key in a config, which is written beside the adapter and shared with it.
"""

import re
from collections.abc import Iterator
from typing import Any

# Names of keys that other tools give to secrets.
NAME = re.compile(
    r"^token$|(?:^|_)(?:(?:hf|hub|huggingface|auth|access|api|wandb|bearer)_?(?:token|key)|passwords?|passwd|secrets?|credentials?)$"
)
# The Hub's tokens of users and of organizations, and a password in an address.
VALUE = re.compile(r"(?P<kept>\b(?:hf_|api_org_))[A-Za-z0-9]{30,}|(?P<scheme>\w://)[^/\s:@'\"]+:[^/\s@]+(?=@)")


def is_secret(key: str, value: Any) -> bool:
    """Whether a key is called as a secret is, or its value looks like one; the value may be a list or a mapping."""
    called = NAME.search(key.rpartition(".")[2].lower().replace("-", "_"))
    return bool(called) or any(VALUE.search(text) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """The strings in a value, each part of it looked into once: YAML's aliases may hold a list in itself, or a billion of one."""
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, list | dict) and id(part) not in seen:
            seen.add(id(part))
            waiting += part if isinstance(part, list) else [*part, *part.values()]


def refusal(place: str, key: str) -> str:
    """The line for a secret in a config, which does not repeat it."""
    variable = "WANDB_API_KEY" if "wandb" in key.lower() else "HF_TOKEN"
    return (
        f"{place}: {redact(key)}: holds an access token or password, and settings are written beside the adapter; "
        f"take it out, and set the environment variable {variable} instead"
    )


def redact(text: str) -> str:
    """The same text with *** for what looks like a secret."""
    return VALUE.sub(lambda match: f"{match['kept'] or match['scheme']}***", text)
