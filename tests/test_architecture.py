"""Which part may import which, and what the tree may hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_qlora", "inference_example", "quantization_utils"}
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "tests"]
SOURCES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in folder.rglob("*.py"))])
# A mistake in a config must be answered at once: these are read before torch is.
LIGHT = (
    "config", "settings", "memory", "plan", "formats", "sources", "readers", "documents", "encoding", "storage", "packing",
    "tokenizer", "hub", "cli", "report", "dataset", "checkpoint", "checkpoints", "lock", "processes",
    "merge", "merging.pairs", "merging.folder",
    "doctor", "examination", "installation",
    "redaction", "adapter", "fingerprint", "prompts", "generation", "answers",
)  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "matplotlib"}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def packages_of(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)}


def kit() -> list[Path]:
    return [path for path in SOURCES if path.is_relative_to(ROOT / "qlora_kit")]


def test_imports_inside_functions_are_seen(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import a.b\ndef f():\n    from c import d\n    if f:\n        import e as g\n")
    assert imports_of(file) == {"a.b", "c", "c.d", "e"}


def test_the_three_scripts_and_nothing_else_stand_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


@pytest.mark.parametrize("path", kit(), ids=lambda path: path.stem)
def test_qlora_kit_imports_no_script(path):
    assert packages_of(path) & SCRIPTS == set()


def test_the_two_commands_import_neither_each_other_nor_are_imported_by_the_third():
    for script in SCRIPTS:
        assert packages_of(ROOT / f"{script}.py") & {"train_qlora", "inference_example"} == set(), script


def test_nothing_imports_benchmarks_or_lessons():
    for path in SOURCES:
        own = path.relative_to(ROOT).parts[0]
        assert packages_of(path) & ({"benchmarks", "finetuning_lessons"} - {own}) == set(), path


@pytest.mark.parametrize("path", sorted((ROOT / "finetuning_lessons").glob("*.py")), ids=lambda path: path.stem)
def test_lessons_stand_on_their_own(path):
    """They show how it works, in few lines: of the kit they take what records become, what memory it takes, and how a command
    behaves."""
    names = imports_of(path)
    assert {name.partition(".")[0] for name in names} & SCRIPTS == set()
    allowed = ("cli", "config", "settings", "formats", "encoding", "preview", "memory", "hub")
    parts = {".".join(name.split(".")[:2]) for name in names if name.startswith("qlora_kit.")}
    assert parts <= {f"qlora_kit.{name}" for name in allowed}


def test_imports_are_absolute():
    for path in SOURCES:
        assert not any(name.startswith(".") for name in imports_of(path)), path


@pytest.mark.parametrize("name", LIGHT)
def test_these_modules_import_no_torch_not_even_through_others(name):
    code = f"import sys, qlora_kit.{name}; print(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_no_module_has_a_name_that_says_nothing():
    assert {path.stem for path in kit()} & {"utils", "helpers", "common", "misc"} == set()


def test_no_file_is_longer_than_300_lines():
    long = {str(path): count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 300}
    assert long == {}
