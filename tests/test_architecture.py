"""Check which part of the tree may import which, how high the parts are stacked, and what the tree may hold."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "qlora_kit"
LOBBY = {"errors", "config", "config_file", "secrets", "shipped", "untrusted", "limited_worker", "wrapping", "cli"}
# The rooms of the kit, from the highest to the lowest: each may import the lobby, and of the rooms only those named.
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
SCRIPTS = {
    "train_qlora": {*ROOMS, "quantization_utils"} - {"merge", "doctor"},
    "inference_example": {*ROOMS, "quantization_utils"} - {"training", "merge", "doctor"},
    "quantization_utils": {"adapter", "model"},
    "__main__": set(),  # of the kit: `qlora VERB`, which imports the command of a verb by its name
}
FOLDERS = {
    "finetuning_lessons": {"data", "model", "planning"},
    "benchmarks": {*ROOMS, *SCRIPTS},
    "assets": set(),
}
MAY_IMPORT = {**ROOMS, **SCRIPTS, **FOLDERS, **{name: set() for name in LOBBY}}
# A mistake in a config must be answered before these are imported, which takes seconds.
HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes", "matplotlib"}
LIGHT_ROOMS = ("planning", "output", "data")
LIGHT_FILES = ("train_qlora", "inference_example", "qlora_kit.merge.command", "qlora_kit.doctor.command")


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if not any(part.startswith(".") for part in path.parts))


def imports_of(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, anywhere in it; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def part_of(module: str) -> str:
    """Return the room, lobby file, script or folder that a module belongs to: "data" of "qlora_kit.data.files"."""
    return module.removeprefix("qlora_kit.").partition(".")[0]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [*ROOT.glob("*.py"), *(path for folder in ("qlora_kit", *FOLDERS) for path in sources(ROOT / folder))]
IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def floors() -> dict[str, int]:
    """Return the floor of each part, one above the highest part that it imports; raises CycleError on a circle."""
    below: dict[str, set[str]] = {}
    for module, imported in IMPORTS.items():
        below.setdefault(part_of(module), set()).update(map(part_of, imported))
    below = {part: imported & below.keys() - {part} for part, imported in below.items()}
    floor: dict[str, int] = {}
    for part in TopologicalSorter(below).static_order():
        floor[part] = 1 + max((floor[other] for other in below[part]), default=0)
    return floor


def test_imports_inside_functions_are_seen(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import a.b\ndef f():\n    from c import d\n    if f:\n        import e as g\n")
    assert imports_of(file) == {"a.b", "c", "c.d", "e"}


def test_each_part_imports_only_what_the_table_allows():
    wrong = []
    for module, imported in IMPORTS.items():
        part = part_of(module)
        others = {*map(part_of, imported)} & MAY_IMPORT.keys() - LOBBY - {part}
        wrong += [(module, other) for other in others - MAY_IMPORT.get(part, set())]
    assert wrong == []


def test_no_circle_and_at_most_8_floors():
    assert {part: floor for part, floor in floors().items() if floor > 8 and part != "benchmarks"} == {}


def test_no_file_of_the_kit_imports_one_that_imports_it():
    files = {module_name(path) for path in FILES if path.name != "__init__.py"}
    TopologicalSorter({module: IMPORTS[module] & files - {module} for module in files}).prepare()  # raises CycleError


def test_the_tree_consists_of_the_parts_of_the_table():
    assert {part_of(module) for module in IMPORTS} == {*MAY_IMPORT, "qlora_kit"}
    assert {path.name for path in KIT.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)


def test_imports_are_absolute():
    assert [module for module, imported in IMPORTS.items() if any(name.startswith(".") for name in imported)] == []


def test_light_modules_import_no_torch_not_even_through_others():
    rooms = [module_name(path) for room in LIGHT_ROOMS for path in sources(KIT / room)]
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
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(KIT)}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}


def test_only_the_run_and_its_report_receive_all_facts_of_a_run():
    """Run holds config, machine, plan and team: passed on, it would be the bag that every function reaches into."""
    paths = [*ROOT.glob("*.py"), *sources(KIT)]
    assert {path.stem for path in paths if "qlora_kit.training.report.Run" in imports_of(path)} == {"train_qlora"}
