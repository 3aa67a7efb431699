"""QLoRA in one command.

    qlora train --config tiny                train an adapter: this model runs on a laptop in about a minute
    qlora chat --adapter output_tiny         talk to it
    qlora plan --gpu "RTX 4060"              will a run fit, and how long will it take?
    qlora preview --config instruct          which tokens are trained
    qlora doctor                             does everything work on this machine?
    qlora merge --adapter output_tiny --output merged_tiny
                                             a folder that transformers loads without peft
    qlora lessons                            lists the lessons of the course
    qlora lessons layers                     one of them

qlora VERB --help lists its flags. The verbs are other names for train_qlora.py, inference_example.py, python -m qlora_kit.merge
and so on. Configs, samples and the laptop model come with the package: `tiny` is configs/tiny.yaml.
"""

import ast
import os
import sys
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from qlora_kit.errors import UserError, closest, did_you_mean

# A verb's module, its function, and the flags that it stands for. A module is imported when it is needed: --help answers at once.
VERBS = {
    "train": ("train_qlora", "main", []),
    "chat": ("inference_example", "main", []),
    "plan": ("train_qlora", "main", ["--plan"]),
    "preview": ("train_qlora", "main", ["--preview"]),
    "doctor": ("qlora_kit.doctor.command", "main", []),
    "merge": ("qlora_kit.merge.command", "run", []),
    "lessons": ("finetuning_lessons", "main", []),
}
SYNONYMS = {"fit": "train", "finetune": "train", "talk": "chat", "run": "chat", "generate": "chat", "check": "doctor"}
HELP = ("-h", "--help", "help")


def main() -> None:
    """Run the command of a verb."""
    verb, *words = sys.argv[1:] or [""]
    if verb in HELP:
        return _show((__doc__ or "").strip())
    try:
        _check(verb, VERBS, "verb", SYNONYMS.get(verb))
        module, function, flags = VERBS[verb]
        if verb == "lessons":
            lessons = find_lessons()
            if not words or words[0] in HELP:
                return _show("\n".join(f"{name:<24}{title}" for name, title in lessons.items()))
            lesson, *words = words
            _check(lesson, lessons, "lesson")
            module = f"{module}.{lesson}"
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    dispatcher = "qlora" if Path(sys.argv[0]).stem == "qlora" else "python -m qlora_kit"
    sys.argv = [f"{dispatcher} {verb}", *flags, *words]  # how shipped.py knows that it was started so

    from qlora_kit import cli  # which names a package that is missing

    command = getattr(import_module(module), function)
    command() if function == "run" else cli.run(partial(command, None))


def _check(name: str, known: Iterable[str], kind: str, meant: str | None = None) -> None:
    """Check that a name is a known one.

    Args:
        meant: the known one that people call so.

    Raises:
        UserError: it is missing or unknown.
    """
    if name not in known:
        problem = f"is no {kind}" + did_you_mean(meant or closest(name, known)) if name else f"needs a {kind}"
        raise UserError("qlora", name or None, problem, f"use {', '.join(known)}, or --help")


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_lessons() -> dict[str, str]:
    """Return the first line of each lesson by its name; imports none."""
    package = find_spec("finetuning_lessons")
    assert package and package.submodule_search_locations
    found = {}
    for path in sorted(Path(package.submodule_search_locations[0]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


if __name__ == "__main__":
    main()
