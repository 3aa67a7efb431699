"""The command `qlora`, what an installed package finds of the shipped files, and what is in it."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import train_qlora
from qlora_kit import __main__ as dispatcher
from qlora_kit import shipped
from qlora_kit.config_file import load_config
from qlora_kit.errors import UserError
from qlora_kit.training.processes import ALONE
from qlora_kit.training.resume import command_again

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed_files() -> dict[str, Path]:
    """Return what pyproject.toml puts into the wheel: its path there, and its file."""
    packed = {f"{name}.py": ROOT / f"{name}.py" for name in SETTINGS["py-modules"]}
    for package in SETTINGS["packages"]:
        folder, inside = ROOT / SETTINGS["package-dir"].get(package, package.replace(".", "/")), package.replace(".", "/")
        for pattern in ("*.py", *SETTINGS["package-data"].get(package, [])):
            paths = folder.glob(pattern) if ".." not in pattern else [folder / pattern]
            packed |= {os.path.normpath(f"{inside}/{os.path.relpath(path, folder)}"): path for path in paths}
    return packed


def test_the_package_has_all_code_and_every_shipped_file_and_puts_none_beside_the_modules():
    packed = packed_files()
    code = {path.resolve() for folder in ("qlora_kit", "finetuning_lessons") for path in (ROOT / folder).rglob("*.py")}
    needed = code | {path.resolve() for path in [*ROOT.glob("*.py"), *ROOT.glob("configs/*.yaml"), *ROOT.glob("samples/*.*")]}
    needed |= set((ROOT / "finetuning_lessons" / "results").glob("*.json"))
    needed |= {ROOT / "config.yaml", ROOT / "requirements.txt", ROOT / "assets" / "tiny-qwen2" / "model.safetensors"}
    assert needed <= {path.resolve() for path in packed.values()}
    assert {name for name in packed if "/" not in name} == {f"{name}.py" for name in SETTINGS["py-modules"]}
    assert {name.partition("/")[0] for name in packed if "/" in name} == {"qlora_kit", "finetuning_lessons"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("samples/articles.txt", f"{ROOT}/samples/articles.txt"),
        ("./assets/tiny-qwen2", f"{ROOT}/assets/tiny-qwen2"),
        ("/gone/qlora_kit/files/samples/notes.csv", f"{ROOT}/samples/notes.csv"),
        ("samples/../pyproject.toml", None),
        ("tests", None),  # of the repository, but no file that is shipped
        ("samples/none.txt", None),
        ("", None),
        ("samples/\0", None),
        ("samples/" + "x" * 5000, None),
    ],
)
def test_a_shipped_file_is_found_from_any_folder_and_nothing_else(elsewhere, name, found):
    assert shipped.locate(name) == (found or name)


def test_what_the_working_folder_has_comes_first(elsewhere):
    (elsewhere / "samples").mkdir()
    (elsewhere / "samples" / "notes.csv").write_text("mine")
    (elsewhere / "tiny").write_text("model:\n  name: mine\n")
    assert shipped.locate("samples/notes.csv") == "samples/notes.csv"
    assert load_config(Path("tiny")).model.name == "mine"


def test_the_laptop_settings_work_in_an_empty_folder(elsewhere):
    config = load_config(Path("tiny"), {"data.eval_split": "samples/notes.csv"})
    assert config.model.name == f"{ROOT}/assets/tiny-qwen2"
    assert (config.data.dataset, config.data.eval_split) == (f"{ROOT}/samples/articles.txt", f"{ROOT}/samples/notes.csv")
    said = shipped.describe_shipped([*config.data.names, config.data.eval_split, 0.1, None, "/etc/hosts"])
    assert said == f"From the toolkit's own files in {ROOT}: samples/articles.txt, samples/notes.csv"


def test_a_config_that_is_nowhere_is_one_line(elsewhere):
    with pytest.raises(UserError, match="--config: tinny: does not exist"):
        load_config(Path("tinny"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "qlora: needs a verb. Use train, chat,"),
        (["trian"], "qlora: trian: is no verb (did you mean train?). Use train,"),
        (["talk", "--x"], "(did you mean chat?)"),
        (["lessons", "layer"], "qlora: layer: is no lesson (did you mean layers?). Use attention,"),
    ],
)
def test_a_wrong_verb_is_one_line(words, error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qlora", *words])
    with pytest.raises(SystemExit) as left:
        dispatcher.main()
    printed = capsys.readouterr().err
    assert left.value.code == 2 and error in printed and printed.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["lessons"]])
def test_help_and_the_list_of_lessons_name_what_there_is(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qlora", *words])
    dispatcher.main()
    printed = capsys.readouterr().out
    assert all(f"qlora {verb}" in printed for verb in dispatcher.VERBS) if words == ["--help"] else "layers   " in printed


@pytest.mark.parametrize(
    ("started", "prefix"), [("/usr/bin/qlora", "qlora"), ("/x/qlora_kit/__main__.py", "python -m qlora_kit")]
)
def test_a_verb_is_its_command_and_messages_name_it_so(started, prefix, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started, "plan", "--gpu", "RTX 4060"])
    with pytest.raises(SystemExit) as left:
        dispatcher.main()
    assert left.value.code == 0 and "Fits" in capsys.readouterr().out
    assert sys.argv == [f"{prefix} plan", "--plan", "--gpu", "RTX 4060"]
    assert shipped.spell_command("inference_example.py") == f"{prefix} chat"
    assert command_again([f"{prefix} train", "--rank", "8"], None, ALONE, "--resume") == f"{prefix} train --rank 8 --resume"


def test_the_scripts_are_named_by_those_who_start_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my folder/train_qlora.py"])
    assert shipped.spell_command("train_qlora.py") == "python train_qlora.py"
    assert train_qlora.parse_arguments([]).config == Path("config.yaml")


@pytest.mark.slow
def test_the_wheel_alone_trains_and_answers_in_an_empty_folder(tmp_path):
    """Build it, install it beside this environment's packages, and run the verbs of a first day."""
    source, wheels, place = tmp_path / "source", tmp_path / "wheels", tmp_path / "empty"
    source.mkdir(), place.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set(packed_files())
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", tmp_path / "venv", "install", "-q", "--no-deps", wheel], check=True)

    def qlora(*words: str) -> str:
        command = [tmp_path / "venv" / "bin" / "qlora", *words]
        return subprocess.run(command, cwd=place, capture_output=True, text=True, check=True, timeout=300).stdout

    qlora("train", "--config", "tiny", "--max_steps", "2")
    assert qlora("chat", "--adapter", "output_tiny", "--prompt", "The river", "--max_new_tokens", "5").strip()
    assert "picture" in qlora("lessons", "layers")
    assert json.loads((place / "output_tiny" / "run.json").read_text())["command"].startswith("qlora train")
    assert {path.name for path in site.iterdir()} & {"config.yaml", "configs", "samples", "assets", "tests"} == set()
