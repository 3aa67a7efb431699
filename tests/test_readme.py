"""README's commands parse with the real parsers, its paths exist, and its figures follow from the code."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import inference_example
import train_qlora
from finetuning_lessons.lesson import create_parser
from qlora_kit.config import GIB, Config
from qlora_kit.config_file import load_config, override
from qlora_kit.data.formats import READERS, recognise
from qlora_kit.errors import UserError
from qlora_kit.planning.fit import check_fit
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.plan import make_plan
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("*.py", "qlora_kit/**/*.py", "finetuning_lessons/*.py")
QWEN = read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    inline = re.findall(r"`((?:python|make|pytest) [^`]+)`", README)
    return [line for block in blocks for line in block.splitlines() if line.strip()] + inline


def test_there_are_commands_to_check():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", commands())
def test_command_is_one_that_works(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if "|" in words:
        words = words[words.index("|") + 1 :]
    match words:
        case ["python", "train_qlora.py", *flags] | ["torchrun", "--nproc_per_node=2", "train_qlora.py", *flags]:
            arguments = train_qlora.parse_arguments(flags)
            written_by_a_run = arguments.config.parts[0].startswith("output_")
            load_config(ROOT / "config.yaml" if written_by_a_run else arguments.config, train_qlora.overrides(arguments))
        case ["python", "inference_example.py", *flags]:
            arguments = inference_example.parse_arguments(flags)
            inference_example.sampling_settings(arguments, load_config(ROOT / "config.yaml"))
            inference_example.check_flags(arguments)
        case ["python", "-m", "qlora_kit.merge", *flags]:
            command.parse_size(command.parse_arguments(flags).max_shard_size)
        case ["python", "-m", "qlora_kit.doctor", *flags]:
            command.parse_arguments(flags)
        case ["python", "-m", module, *flags] if module.startswith("finetuning_lessons."):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
            create_parser(None, module.removeprefix("finetuning_lessons.")).parse_args(flags)
        case ["make", target]:
            assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0
        case ["pip" | "pytest" | "python3" | "source" | "jupyter", *_]:
            assert all((ROOT / word).exists() for word in words if word.endswith((".txt", ".ipynb")))
        case _:
            pytest.fail(f"no check knows this command: {command}")


def test_adapter_folders_are_ones_that_readme_trains():
    trained = set(re.findall(r"--output_dir (\S+)", README)) | {
        Path(load_config(path).training.output_dir).name for path in [ROOT / "config.yaml", *ROOT.glob("configs/*.yaml")]
    }
    used = set(re.findall(r"--adapter (\S+?)[`\n ]", README))
    assert used and used <= trained


def test_linked_and_listed_paths_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    listed = re.findall(r"^\| `([^`]+)` \|", README[README.index("## Layout") : README.index("## Tests")], re.MULTILINE)
    assert links and listed
    assert [path for path in links + listed if not (ROOT / path).exists()] == []


def test_every_module_is_in_the_layout():
    layout = README[README.index("## Layout") : README.index("## Tests")]
    fast = layout[layout.index("In `qlora_kit/fast/`") :]
    modules = [path for pattern in MODULES for path in ROOT.glob(pattern)]
    missing = [path for path in modules if f"`{path.name}`" not in (fast if path.parent.name == "fast" else layout)]
    assert [path for path in missing if path.name != "__init__.py"] == []


def test_the_layout_lists_no_module_that_is_gone():
    layout = README[README.index("## Layout") : README.index("## Tests")]
    there = {path.name for pattern in MODULES for path in ROOT.glob(pattern)}
    assert set(re.findall(r"`(\w+\.py)`", layout)) <= there


@pytest.mark.parametrize(
    "row", re.findall(r"^\| rank (\d+), ([^|]+) \| ([\d,]+) \| ([\d.]+) % \| (\d+) MiB \|", README, re.MULTILINE)
)
def test_parameter_table_follows_from_the_shape(row):
    rank, which, trainable, share, size = row
    targets = {"all": "all-linear", "att": ["q_proj", "k_proj", "v_proj", "o_proj"], "q a": ["q_proj", "v_proj"]}[which[:3]]
    expected = QWEN.lora_parameters(int(rank), targets)
    assert int(trainable.replace(",", "")) == expected
    assert float(share) == round(100 * expected / (QWEN.parameters() + expected), 2)
    assert int(size) == round(4 * expected / 2**20)


def shown(command: str) -> str:
    """What README shows below a command, with the lines that it broke for width joined again."""
    (text,) = re.findall(r"```text\n\$ python " + re.escape(command) + r"\n(.*?)\n```", README, re.DOTALL)
    return text.replace("\n    ", " ")


def test_the_plan_shown_is_the_one_printed(capsys):
    train_qlora.main(["--plan", "--set", "performance.vram_limit_gib=8"])
    assert shown("train_qlora.py --plan --set performance.vram_limit_gib=8") == capsys.readouterr().out.rstrip()


def test_the_preview_shown_is_the_one_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    train_qlora.main(["--config", "configs/instruct.yaml", "--preview"])
    printed = capsys.readouterr().out.rstrip().replace("\n    ", " ")
    assert shown("train_qlora.py --config configs/instruct.yaml --preview") == printed


def test_each_format_of_the_table_is_recognised_as_such():
    rows = re.findall(r"^\| `(\w+)` \| `(\{.+?\})`", README, re.MULTILINE)
    assert {kind: recognise(json.loads(record)) for kind, record in rows} == {kind: kind for kind, _ in rows}
    assert {kind for kind, _ in rows} == {*READERS, "instruction", "text"}


def test_the_refusal_shown_is_the_one_printed():
    config = override(load_config(ROOT / "config.yaml"), {"performance.vram_limit_gib": 2.2})
    with pytest.raises(UserError) as refused:
        check_fit(make_plan(config, QWEN, 2.2 * GIB), config, QWEN, 2.2 * GIB)
    assert shown("train_qlora.py --set performance.vram_limit_gib=2.2") == f"error: {refused.value}"


def peak(recomputed: int, **changes) -> float:
    """GiB at one sequence of 512 tokens unless changed."""
    config = override(Config(), {key.replace("__", "."): value for key, value in changes.items()})
    return sum(estimate_memory(QWEN, config, 1, recomputed).values()) / GIB


def test_what_each_remedy_saves_follows_from_the_formula():
    rows = re.findall(r"^\d\. `(.+?)`: .*?([\d.]+) GiB less", README, re.MULTILINE)
    expected = {
        "--set training.gradient_checkpointing=true": peak(0) - peak(36),
        "--set performance.offload_embedding=true": peak(36) - peak(36, performance__offload_embedding=True),
        "--max_length 256": peak(36) - peak(36, data__max_length=256),
        "--rank 8": peak(36) - peak(36, lora__rank=8),
    }
    assert {flags: float(gib) for flags, gib in rows} == {flags: round(gib, 2) for flags, gib in expected.items()}


def test_other_figures_of_memory_follow_from_the_formula():
    lean = load_config(ROOT / "configs" / "lean.yaml")
    assert f"{make_plan(lean, QWEN, 8 * GIB).peak / GIB:.2f} GiB predicted" in README
    assert f"would turn them to fp32, {2 * QWEN.embedding_parameters() / GIB:.2f} GiB more" in README.replace("\n", " ")
    bits = 8 * estimate_memory(QWEN, Config(), 1, 36)["projection weights"] / QWEN.projection_parameters()
    assert f"{bits:.3f} bits a weight" in README
