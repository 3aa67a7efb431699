"""Find the files that come with the toolkit, and say how its commands are started.

config.yaml, configs/, samples/ and assets/ lie at the top of the repository; an installed package has them in qlora_kit/files.
What a name of them does not find in the working folder is looked up there.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

KIT = Path(__file__).resolve().parent
HOME = KIT / "files" if (KIT / "files").is_dir() else KIT.parent
REQUIREMENTS = HOME / "requirements.txt"
INSTALL = f"pip install -r {shlex.quote(str(REQUIREMENTS if HOME != Path.cwd() else REQUIREMENTS.name))}"
NAMES = ("config.yaml", "configs", "samples", "assets")
KEYS = ("model.name", "data.dataset", "data.eval_split", "data.chat_template")  # whose values may be such names
DISPATCHERS = ("qlora", "python -m qlora_kit")
VERBS = {"train_qlora.py": "train", "inference_example.py": "chat"}


def locate(name: str) -> str:
    """Return the path of a shipped file or folder if nothing in the working folder has its name; any other name as it is.

    A path into the files of another installation, which the record of a run may hold, leads to those of this one.
    """
    own = name.rpartition("/qlora_kit/files/")[2]
    parts = PurePosixPath(own).parts
    is_ours = bool(parts) and parts[0] in NAMES and ".." not in parts
    return str(HOME / own) if is_ours and not os.path.exists(name) and os.path.exists(HOME / own) else name


def locate_all(value: Any) -> Any:
    """Return the value of a config key of KEYS, a name or a list of names, with shipped ones as `locate` returns them."""
    if isinstance(value, list):
        return [locate_all(one) for one in value]
    return locate(value) if isinstance(value, str) else value


def locate_config(path: Path) -> Path:
    """Return the path of a file of settings; `tiny` is configs/tiny.yaml, unless there is a file named so."""
    names = [str(path)] if path.suffix or len(path.parts) != 1 else [str(path), f"configs/{path}.yaml"]
    return next((Path(found) for found in map(locate, names) if os.path.isfile(found)), path)


def describe_shipped(names: Iterable[object]) -> str | None:
    """Return a line that lists the toolkit's own files among absolute names; None where there is none."""
    paths = [Path(name) for name in names if isinstance(name, str | Path)]
    own = [str(path.relative_to(HOME)) for path in paths if path.is_absolute() and path.is_relative_to(HOME)]
    return f"From the toolkit's own files in {HOME}: {', '.join(own)}" if own else None


def is_dispatched() -> bool:
    """Return whether this process was started as `qlora VERB`, which __main__.py writes into sys.argv[0]."""
    return sys.argv[0].rpartition(" ")[0] in DISPATCHERS


def spell_command(script: str) -> str:
    """Return how the user starts a script: `python train_qlora.py`, or `qlora train` where this process was started so."""
    return f"{sys.argv[0].rpartition(' ')[0]} {VERBS[script]}" if is_dispatched() else f"python {script}"
