"""Check README and docs/: commands parse with the real parsers, paths exist, and figures follow from the code."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import inference_example
import qlora_kit.doctor.command
import qlora_kit.merge.command
import train_qlora
from finetuning_lessons.lesson import create_parser
from finetuning_lessons.seeds import add_flag
from qlora_kit import __main__ as dispatcher
from qlora_kit.config import GIB, Config, GenerationSettings
from qlora_kit.config_file import load_config, override
from qlora_kit.data.formats import READERS, recognise_format
from qlora_kit.errors import UserError
from qlora_kit.model.hub import is_local
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.plan import make_plan
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOW_IT_WORKS = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if ".zh-TW" not in page.name)
QWEN = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])


def commands() -> list[str]:
    """Return the commands of all pages, in the order in which a reader meets them, each once."""
    found = re.findall(r"^ *```bash\n(.*?)^ *```|`((?:python|make|pytest|qlora) [^`]+)`", TEXT, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block, inline in found for line in (block or inline).splitlines()]
    return list(dict.fromkeys(filter(None, lines)))


def test_there_are_commands_to_check():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", commands())
def test_command_is_one_that_works(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if "|" in words:
        words = words[words.index("|") + 1 :]
    if words[0] == "qlora":
        words = as_script(words[1:])
    match words:
        case ["python", "train_qlora.py", *flags] | ["torchrun", "--nproc_per_node=2", "train_qlora.py", *flags]:
            config = read_settings(flags)
            named = [config.model.name, *config.data.names, config.data.chat_template or "."]
            assert all(Path(name).exists() for name in named if is_local(name))
        case ["python", "inference_example.py", *flags]:
            arguments = inference_example.parse_arguments(flags)
            inference_example.sampling_settings(arguments, GenerationSettings())
            inference_example.check_flags(arguments)
        case ["python", "-m", "qlora_kit.merge", *flags]:
            qlora_kit.merge.command.parse_arguments(flags)
        case ["python", "-m", "qlora_kit.doctor", *flags]:
            qlora_kit.doctor.command.parse_arguments(flags)
        case ["python", "-m", module, *flags] if module.startswith("finetuning_lessons."):
            parser = create_parser(None, module.removeprefix("finetuning_lessons."))
            if "add_flag(parser)" in (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"):
                add_flag(parser)
            parser.parse_args(flags)
        case ["python", script, *flags] if script.startswith("benchmarks/"):
            code = (ROOT / script).read_text(encoding="utf-8")
            assert [flag for flag in flags if flag.startswith("--") and f'"{flag}"' not in code] == []
        case ["make", target]:
            assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0
        case ["pip" | "pytest" | "python3" | "source" | "jupyter", *_]:
            assert all((ROOT / word).exists() for word in words if word.endswith((".txt", ".ipynb")))
        case _:
            pytest.fail(f"no check knows this command: {command}")


def as_script(words: list[str]) -> list[str]:
    """Return the command that `qlora WORDS` stands for."""
    module, _, flags = dispatcher.VERBS[words[0]]
    if words[0] == "lessons":
        return ["python", "-m", f"finetuning_lessons.{words[1]}", *words[2:]] if words[1:] else ["pip"]
    script = [f"{module}.py"] if module in ("train_qlora", "inference_example") else ["-m", module.removesuffix(".command")]
    return ["python", *script, *flags, *words[1:]]


def read_settings(flags: list[str]) -> Config:
    """Return the settings of a command of train_qlora.py; a run that an earlier command made stands for config.yaml."""
    arguments = train_qlora.parse_arguments(flags)
    written_by_a_run = arguments.config.parts[0].startswith("output_")
    return load_config(ROOT / "config.yaml" if written_by_a_run else arguments.config, train_qlora.overrides(arguments))


def runs_on_a_laptop(words: list[str]) -> bool:
    """Return whether a command needs neither a GPU nor a network, nor what those need."""
    if words[0] == "qlora":
        return words[1:] == ["lessons"] or runs_on_a_laptop(as_script(words[1:]))
    if "train_qlora.py" in words:
        flags = words[words.index("train_qlora.py") + 1 :]
        return "--plan" in flags or "output_tiny/config.yaml" in flags or read_settings(flags).model.name == "assets/tiny-qwen2"
    return any(word.startswith(("output_", "out_")) for word in words) or words[:3] == ["python", "-m", "qlora_kit.doctor"]


@pytest.mark.slow
def test_the_commands_for_a_laptop_run_in_their_order(tmp_path):
    """Run them in a copy of the repository, training for two steps; then a card's program. test_lessons.py has the lessons."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def run(words: list[str], joined: str = "") -> None:
        is_python = words[0] == "python" and not joined
        shell = ["bash", "-o", "pipefail", "-c", joined or shlex.join(words)]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if is_python:  # in a process that has the libraries already
            result = forked.run(words[1:], cwd=tmp_path, timeout=600)
        else:
            result = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=environment)
        assert result.returncode == 0, f"{joined or words}\n{result.stdout[-1000:]}{result.stderr[-3000:]}"

    for command in commands():
        words = shlex.split(command)
        if not runs_on_a_laptop(words[words.index("|") + 1 :] if "|" in words else words):
            continue
        words = ["python", "-m", "qlora_kit", *words[1:]] if words[0] == "qlora" else words
        if {"train_qlora.py", "train"} & set(words) and not {"--plan", "--preview"} & set(words):
            words += ["--max_steps", "4" if "--resume" in words else "2"]
        run(words, joined=command if "|" in words else "")
    (program,) = re.findall(r"```python\n(.*?)```", (tmp_path / "output_tiny" / "README.md").read_text(), re.DOTALL)
    run(["python", "-c", f"import os; os.chdir('output_tiny')\n{program}"])


def test_no_command_trains_into_a_folder_that_holds_a_run():
    used = []
    for command in map(shlex.split, commands()):
        if "train_qlora.py" in command and not {"--plan", "--preview", "--resume", "--overwrite"} & set(command):
            used.append(Path(read_settings(command[command.index("train_qlora.py") + 1 :]).training.output_dir))
    assert len(used) > 20 and [folder for folder in set(used) if used.count(folder) > 1] == []


def test_adapter_folders_are_ones_that_readme_trains():
    trained = set(re.findall(r"--output_dir (\S+)", TEXT)) | {
        Path(load_config(path).training.output_dir).name for path in [ROOT / "config.yaml", *ROOT.glob("configs/*.yaml")]
    }
    used = set(re.findall(r"--adapter (\S+?)[`\n ]", TEXT))
    assert used and used <= trained


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_paths_exist(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_layout_names_every_folder_and_script_and_nothing_that_is_gone():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folders = {f"{Path(name).parts[0]}/" for name in listed if "/" in name and not name.startswith(".")}
    rooms = {f"qlora_kit/{path.parent.name}/" for path in ROOT.glob("qlora_kit/*/__init__.py")}
    scripts = {path.name for path in ROOT.glob("*.py")}
    named = set(re.findall(r"`([\w./]+)`", README[README.index("## Layout") : README.index("## Tests")]))
    assert folders | rooms | scripts <= named
    assert [path for path in named if not (ROOT / path).exists()] == ["run.json"]


@pytest.mark.parametrize(
    "row", re.findall(r"^\| rank (\d+), ([^|]+) \| ([\d,]+) \| ([\d.]+) % \| (\d+) MiB \|", TEXT, re.MULTILINE)
)
def test_parameter_table_follows_from_the_shape(row):
    rank, which, trainable, share, size = row
    targets = {"all": "all-linear", "att": ["q_proj", "k_proj", "v_proj", "o_proj"], "q a": ["q_proj", "v_proj"]}[which[:3]]
    expected = QWEN.lora_parameters(int(rank), targets)
    assert int(trainable.replace(",", "")) == expected
    assert float(share) == round(100 * expected / (QWEN.parameters() + expected), 2)
    assert int(size) == round(4 * expected / 2**20)


def shown(command: str) -> str:
    """Return the output that a page shows below a command, with wrapped lines joined."""
    (text,) = re.findall(r"```text\n\$ python " + re.escape(command) + r"\n(.*?)\n```", TEXT, re.DOTALL)
    return text.replace("\n    ", " ")


def test_the_plan_shown_is_the_one_printed(capsys):
    train_qlora.main(["--plan", "--gpu", "RTX 4060"])
    assert shown('train_qlora.py --plan --gpu "RTX 4060"') == capsys.readouterr().out.rstrip()


@pytest.mark.parametrize(
    "row", re.findall(r"^\| ((?:RTX|T4|A100|H100)[^|]*) \| (.*) \|$", TEXT, re.MULTILINE), ids=lambda row: row[0]
)
def test_the_time_of_each_card_is_the_one_printed(row, capsys):
    card, cells = row
    train_qlora.main(["--plan", "--gpu", card])
    printed = capsys.readouterr().out
    split, memory, step, speed, run = cells.split(" | ")
    sequences, recomputed = split.split(", ")
    for part in (
        f": {sequences} sequences",
        f"{recomputed.removesuffix(' layers')} of 36 layers",
        f"Fits: {memory.split()[0]} of",
    ):
        assert part in printed
    assert f"{step} an optimizer step, {speed} tokens/s; about {run} for" in printed


def test_the_preview_shown_is_the_one_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    train_qlora.main(["--config", "configs/instruct.yaml", "--preview"])
    printed = capsys.readouterr().out.rstrip().replace("\n    ", " ")
    assert shown("train_qlora.py --config configs/instruct.yaml --preview") == printed


def test_each_format_of_the_table_is_recognised_as_such():
    rows = re.findall(r"^\| `(\w+)` \| `(\{.+?\})`", TEXT, re.MULTILINE)
    assert {kind: recognise_format(json.loads(record)) for kind, record in rows} == {kind: kind for kind, _ in rows}
    assert {kind for kind, _ in rows} == {*READERS, "instruction", "text"}


def test_the_mistakes_shown_are_the_ones_printed(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as refused:
        train_qlora.main(["--set", "lora.rnak=8", "--alpha", "high"])
    printed = "\n".join(f"error: {line}" for line in refused.value.lines)
    assert shown("train_qlora.py --set lora.rnak=8 --alpha high") == printed


def test_the_refusal_shown_is_the_one_printed(capsys):
    train_qlora.main(["--plan", "--gpu", "RTX 4060", "--set", "performance.vram_limit_gib=2.2"])
    line = shown("train_qlora.py --plan --set performance.vram_limit_gib=2.2").removeprefix("...\n")
    assert line.startswith("Does not fit") and f"{line}\n" in capsys.readouterr().out


def peak(recomputed: int, **changes) -> float:
    """Return the peak in GiB for one sequence of 512 tokens, with some settings changed."""
    config = override(Config(), {key.replace("__", "."): value for key, value in changes.items()})
    return sum(estimate_memory(QWEN, config, 1, recomputed).values()) / GIB


def test_what_each_remedy_saves_follows_from_the_formula():
    rows = re.findall(r"^\d\. `(.+?)`: .*?([\d.]+) GiB less", TEXT, re.MULTILINE)
    expected = {
        "--set training.gradient_checkpointing=true": peak(0) - peak(36),
        "--set performance.offload_embedding=true": peak(36) - peak(36, performance__offload_embedding=True),
        "--max_length 256": peak(36) - peak(36, data__max_length=256),
        "--rank 8": peak(36) - peak(36, lora__rank=8),
    }
    assert {flags: float(gib) for flags, gib in rows} == {flags: round(gib, 2) for flags, gib in expected.items()}


def test_other_figures_of_memory_follow_from_the_formula():
    lean = load_config(ROOT / "configs" / "lean.yaml")
    assert f"{make_plan(lean, QWEN, 8 * GIB).peak / GIB:.2f} GiB predicted" in TEXT
    assert f"would turn them to fp32, {2 * QWEN.embedding_parameters() / GIB:.2f} GiB more" in HOW_IT_WORKS.replace("\n", " ")
    bits = 8 * estimate_memory(QWEN, Config(), 1, 36)["projection weights"] / QWEN.projection_parameters()
    assert f"{bits:.3f} bits a weight" in HOW_IT_WORKS
