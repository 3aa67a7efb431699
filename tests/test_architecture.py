"""Check which room may import which, and what the tree may hold."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "qlora_kit"
SCRIPTS = {"train_qlora", "inference_example", "quantization_utils"}
LOBBY = {"errors", "config", "config_file", "secrets", "cli"}
# The rooms, from the highest to the lowest: each may import the lobby, and of the rooms only those named.
ROOMS = {
    "training": {"adapter", "data", "fast", "model", "output", "planning"},
    "inference": {"adapter", "data", "fast", "model"},
    "merge": {"adapter", "data", "model", "output", "planning"},
    "doctor": {"fast", "model", "planning"},
    "adapter": {"model", "output"},
    "fast": {"model", "planning"},
    "data": {"model", "output"},
    "model": {"planning"},
    "output": set(),
    "planning": set(),
}
LESSONS_MAY_IMPORT = {"planning", "data", "model"}
# A mistake in a config must be answered before these are imported, which takes seconds.
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "matplotlib"}
LIGHT_ROOMS = ("planning", "output", "data")
LIGHT_FILES = ("train_qlora", "inference_example", "qlora_kit.merge.command", "qlora_kit.doctor.command")


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if not any(part.startswith(".") for part in path.parts))


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


def kit_parts(path: Path) -> set[str]:
    """Rooms and files of the lobby that a file imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("qlora_kit.")}


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(path)}


def test_imports_inside_functions_are_seen(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import a.b\ndef f():\n    from c import d\n    if f:\n        import e as g\n")
    assert imports_of(file) == {"a.b", "c", "c.d", "e"}


def test_each_room_imports_only_what_the_table_allows():
    wrong = {
        str(path.relative_to(KIT)): extra
        for room, allowed in ROOMS.items()
        for path in sources(KIT / room)
        if (extra := kit_parts(path) - LOBBY - allowed - {room})
    }
    assert wrong == {}


def test_the_lobby_imports_no_room():
    assert {name: extra for name in LOBBY if (extra := kit_parts(KIT / f"{name}.py") - LOBBY)} == {}


def test_the_kit_consists_of_the_lobby_and_the_rooms():
    files = {path.stem for path in KIT.glob("*.py")} - {"__init__"}
    folders = {path.name for path in KIT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert (files, folders) == (LOBBY, set(ROOMS))


def test_the_three_scripts_and_nothing_else_stand_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


def test_scripts_are_imported_by_nothing_but_train_qlora_which_loads_its_model_through_quantization_utils():
    for path in sources(KIT):
        assert packages(path) & SCRIPTS == set(), path
    for script in SCRIPTS:
        assert packages(ROOT / f"{script}.py") & {"train_qlora", "inference_example"} == set(), script


def test_nothing_imports_benchmarks_or_lessons():
    outside = [*ROOT.glob("*.py"), *sources(KIT), *sources(ROOT / "assets")]
    for path in outside:
        assert packages(path) & {"benchmarks", "finetuning_lessons"} == set(), path
    for path in sources(ROOT / "finetuning_lessons"):
        assert "benchmarks" not in packages(path), path


def test_lessons_stand_on_their_own():
    for path in sources(ROOT / "finetuning_lessons"):
        assert packages(path) & SCRIPTS == set(), path
        assert kit_parts(path) - LOBBY <= LESSONS_MAY_IMPORT, path


def test_imports_are_absolute():
    for path in [*ROOT.glob("*.py"), *sources(KIT), *sources(ROOT / "finetuning_lessons"), *sources(ROOT / "benchmarks")]:
        assert not any(name.startswith(".") for name in imports_of(path)), path


def test_light_modules_import_no_torch_not_even_through_others():
    rooms = [".".join(path.relative_to(ROOT).with_suffix("").parts) for room in LIGHT_ROOMS for path in sources(KIT / room)]
    names = [*LIGHT_FILES, *(f"qlora_kit.{name}" for name in LOBBY), *rooms]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    assert not {HEAVY!r} & set(sys.modules), (name, {HEAVY!r} & set(sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_no_module_has_a_name_that_says_nothing():
    assert {path.stem for path in sources(KIT)} & {"utils", "helpers", "common", "misc"} == set()


def test_no_file_is_longer_than_400_lines():
    long = {str(path): count for path in sources(KIT) if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}
