"""README's commands parse with the real parsers, its paths exist, and its figures follow from the code."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import inference_example
import train_qlora
from qlora_kit.config import load_config
from qlora_kit.memory import GIB, KNOWN_CONFIGS, estimate_memory, read_shape

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
        case ["python", "train_qlora.py", *flags]:
            arguments = train_qlora.parse_arguments(flags)
            written_by_a_run = arguments.config.parts[0].startswith("output_")
            load_config(ROOT / "config.yaml" if written_by_a_run else arguments.config, train_qlora.overrides(arguments))
        case ["python", "inference_example.py", *flags]:
            arguments = inference_example.parse_arguments(flags)
            inference_example.sampling_settings(arguments, load_config(ROOT / "config.yaml"))
            inference_example.read_prompt(arguments) if arguments.prompt != "-" else None
        case ["make", target]:
            assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0
        case ["pip" | "pytest" | "python3" | "source", *_]:
            assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))
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
    modules = [path.name for path in ROOT.glob("*.py")] + [path.name for path in ROOT.glob("qlora_kit/*.py")]
    assert [name for name in modules if name != "__init__.py" and f"`{name}`" not in layout] == []


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


def test_memory_table_follows_from_the_shape():
    rows = dict(re.findall(r"^\| ([^|]+?) \| (\d\.\d\d) \|$", README, re.MULTILINE))
    parts = estimate_memory(QWEN, load_config(ROOT / "config.yaml"))
    grouped = {
        "4-bit projections": parts["projection weights"],
        "embedding (tied with the head) and norms, bfloat16": parts["embedding and norms"],
        "adapters, gradients, optimizer state": sum(parts[k] for k in ("adapters (fp32)", "gradients (fp32)", "optimizer state")),
        "activations with recomputation": parts["activations"],
        "loss, a chunk of logits at a time": parts["loss or a layer"],
        "evaluation beside the captured graph": parts["evaluation beside the graph"],
        "libraries": parts["libraries"],
    }
    assert {name: float(value) for name, value in rows.items()} == {name: round(v / GIB, 2) for name, v in grouped.items()}
