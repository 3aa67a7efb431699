"""Hold what SECURITY.md promises. Malicious files are real: each test first shows that a careless reader would run theirs."""

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import train_qlora
from qlora_kit import cli
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.config import Config, ModelSettings
from qlora_kit.config_file import all_keys, load_config, override, parse_set
from qlora_kit.errors import UserError
from qlora_kit.model.hub import remote_code_warning
from qlora_kit.output.log import RunLog
from qlora_kit.output.provenance import command_line
from qlora_kit.secrets import is_secret, redact
from tests.tiny_run import TWO_LAYERS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "tests"]
SOURCES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in folder.rglob("*.py"))])
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"  # in parts, so that no scanner takes it for one
SMALL = [
    "--config", "configs/tiny.yaml", "--model_name", str(TWO_LAYERS), "--max_length", "32", "--batch_size", "2",
    "--max_steps", "2", "--set", "training.gradient_accumulation_steps=1", "--set", "data.max_train_samples=8",
    "--set", "data.max_eval_samples=2", "--set", "training.save_steps=2",
]  # fmt: skip


class Program:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path) -> Path:
    """Return the folder that exists once the program has run."""
    return tmp_path / "was-run"


@pytest.fixture
def program(marker) -> bytes:
    content = pickle.dumps(Program(marker), protocol=2)
    pickle.loads(content)
    assert marker.is_dir(), "the pickle runs nothing, and would prove nothing"
    marker.rmdir()
    return content


# Code that must not be in the tree


def dotted_name(node: ast.expr) -> str:
    return f"{dotted_name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def find_dangers(source: str) -> list[str]:
    """Return the calls and imports that read a file as a program, or run one through a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            roots = {name.partition(".")[0] for name in names}
            found += sorted(roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted_name(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen") or name.endswith("read_pickle"):
            found.append(name)
        if name.startswith("yaml.") and name.endswith(("load", "load_all")) and not name.startswith("yaml.safe_"):
            found.append(name)
        if name == "yaml.compose" and given.get("Loader") != "yaml.SafeLoader":
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(name)
        found += [word for word in ("shell", "allow_pickle", "trust_remote_code") if given.get(word) == "True"]
    return found


@pytest.mark.parametrize("bad", [
    "import pickle", "from pickle import loads", "eval(text)", "os.system(text)", "yaml.load(text)", "yaml.unsafe_load(text)",
    "yaml.full_load_all(text)", "yaml.compose(text)", "torch.load(path)", "torch.load(path, weights_only=False)",
    "subprocess.run(text, shell=True)", "np.load(path, allow_pickle=True)", "pd.read_pickle(path)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
])  # fmt: skip
def test_each_danger_is_seen(bad):
    assert len(find_dangers(bad)) == 1


@pytest.mark.parametrize("good", ["yaml.safe_load(text)", "torch.load(path, weights_only=True)", "model.eval()", "import json"])
def test_what_is_safe_is_let_through(good):
    assert find_dangers(good) == []


# data/ passes records that it has read to a process of its own and back; the benchmark writes pickles that must not be loaded.
OWN_PICKLES = {"qlora_kit/data/dataset.py", "qlora_kit/data/files.py", "benchmarks/odd_surroundings.py"}


def test_no_source_reads_a_file_as_a_program():
    assert len(SOURCES) > 50
    found = {str(path.relative_to(ROOT)): find_dangers(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: dangers for path, dangers in found.items() if dangers} == {path: ["pickle"] for path in OWN_PICKLES}


@pytest.mark.parametrize("module", ["transformers.trainer", "transformers.trainer_utils"])
def test_what_resuming_calls_in_the_libraries_loads_weights_only(module):
    """optimizer.pt, scheduler.pt, scaler.pt and rng_state.pth are read by the installed release, which may change."""
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    assert "torch.load" in text and "torch.load" not in find_dangers(text)


def test_peft_loads_weights_only_where_it_loads_a_pickle():
    from peft.utils import save_and_load

    assert inspect.signature(save_and_load.torch_load).parameters["weights_only"].default is True
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(save_and_load))) if isinstance(node, ast.Call)]
    given = [{word.arg for word in call.keywords} for call in calls if dotted_name(call.func) == "torch_load"]
    assert given and not any("weights_only" in words for words in given)


# Files that would run a program


@pytest.mark.parametrize("place", ["{value}", "lora:\n  rank: {value}\n"])
def test_a_config_cannot_call_a_function(tmp_path, marker, place):
    value = f"!!python/object/apply:os.mkdir ['{marker}']"
    yaml.unsafe_load(value)
    marker.rmdir()
    file = tmp_path / "config.yaml"
    file.write_text(place.format(value=value))
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(file)
    with pytest.raises(UserError, match="not valid YAML"):
        parse_set([f"lora.rank={value}"])
    assert not marker.exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)  # 9 to the power of 10 strings, each list nine times the one before


@pytest.mark.parametrize("text, words", [
    (BOMB + "lora:\n  rank: *j\n", ["lora.rank", "..."]), (BOMB + "lora: *j\n", ["lora", "..."]),
    (BOMB + "lora:\n  xyzzy: *j\n", ["lora.xyzzy", "..."]), ("lora:\n  rank: &a [*a]\n", ["lora.rank"]),
    ("lora:\n  rank: " + "[" * 2000, ["nested too deeply"]), (f"lora:\n  rank: {'x' * 100_000}\n", ["lora.rank", "..."]),
    ("base: &b {rank: 8}\n<<: *b\n", ["<<: is not a section"]), ("1: 2\n", ["1: is not a section"]),
])  # fmt: skip
def test_a_small_config_that_stands_for_a_huge_one_is_refused_at_once(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(file)
    assert all(word in str(refused.value) for word in words)
    assert all(len(problem) < 1500 and "\n" not in problem for problem in refused.value.lines)


@pytest.mark.parametrize("key, shown", [
    ("lora.a\nb", r"lora.a\nb"), ("lora.\x1b[2Jx", r"lora.\x1b[2Jx"), ("a\u2028b.c", r"a\u2028b.c"), ("\x9b2J.c", r"\x9b2J.c"),
])  # fmt: skip
def test_a_problem_is_one_line_that_a_terminal_obeys_nowhere(key, shown):
    with pytest.raises(UserError) as refused:
        override(Config(), {key: 1})
    (problem,) = refused.value.lines
    assert shown in problem and str(refused.value) == problem and problem.isprintable()


def model_folder(folder: Path, leave_out: str = "", **config) -> Path:
    """Copy the embedded model and change keys of its config.json."""
    shutil.copytree(ROOT / "assets" / "tiny-qwen2", folder, ignore=shutil.ignore_patterns("*.py", "*.md", leave_out))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def load(folder: Path, **named):
    import torch

    from quantization_utils import load_model_and_tokenizer

    return load_model_and_tokenizer(str(folder), None, device="cpu", dtype=torch.float32, **named)


def test_pickled_weights_are_not_opened_even_beside_a_safetensors_file(tmp_path, marker, program):
    folder = model_folder(tmp_path / "model", leave_out="model.safetensors")
    (folder / "decoy.safetensors").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(program)
    with pytest.raises(UserError, match=r"model\.name: .*model\.safetensors"):
        load(folder)
    assert not marker.exists()


def test_pickled_adapters_are_not_opened(tmp_path, marker, program):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "assets/tiny-qwen2"}')
    (tmp_path / "adapter_model.bin").write_bytes(program)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(str(tmp_path))
    assert not marker.exists()


def test_a_models_own_code_is_run_only_when_the_key_says_so(tmp_path, marker, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the library adds that folder
    unknown = model_folder(tmp_path / "unknown", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    known = model_folder(tmp_path / "known", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    for folder in (unknown, known):
        (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    with pytest.raises(UserError, match=r"model\.name: .*cannot be loaded"):
        load(unknown)
    load(known)  # by the library's class, past the folder's
    assert not marker.exists()
    with contextlib.suppress(Exception):
        load(unknown, trust_remote_code=True)
    assert marker.is_dir()


def test_remote_code_is_off_and_one_line_warns_of_it():
    assert Config().model.trust_remote_code is False
    named = remote_code_warning(ModelSettings(name="someone/model", trust_remote_code=True))
    assert named.startswith("warning: model.trust_remote_code: ") and "someone/model" in named and "model.revision" in named
    assert "model.revision" not in remote_code_warning(ModelSettings(name="someone/model", revision="0123abc"))
    assert "\n" not in named


def reseal(folder: Path) -> None:
    """Rewrite the manifest to match the files, as somebody who changed a file would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_cannot_run_a_program(tmp_path, marker, program, monkeypatch):
    """The run ends in one line, even if the manifest matches the malicious file."""
    monkeypatch.chdir(ROOT)
    settings = [*SMALL, "--set", "data.eval_split=null"]
    train_qlora.main([*settings, "--output_dir", str(tmp_path / "out")])
    pickles = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".pt", ".pth", ".bin")]
    for number, file in enumerate(pickles):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "out", copy)
        changed = copy / file.relative_to(tmp_path / "out")
        changed.write_bytes(program)
        for seal, words in ((False, f"{file.name} "), (True, "checkpoint-2: cannot be loaded .*--overwrite")):
            if seal:
                reseal(changed.parent)
            with pytest.raises(UserError, match=words) as error:
                train_qlora.main([*settings, "--output_dir", str(copy), "--max_steps", "3", "--resume"])
            assert len(error.value.lines) == 1
            assert not marker.exists(), file.name
    assert {file.name for file in pickles} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


# Secrets


@pytest.mark.parametrize("key, variable", [
    ("model.hf_token", "HF_TOKEN"), ("model.token", "HF_TOKEN"), ("training.hub_token", "HF_TOKEN"),
    ("model.use_auth_token", "HF_TOKEN"), ("training.wandb_api_key", "WANDB_API_KEY"), ("training.password", "HF_TOKEN"),
    ("hf_token", "HF_TOKEN"), ("data.access-token", "HF_TOKEN"),
])  # fmt: skip
def test_a_key_that_is_called_like_a_secret_is_refused_and_not_repeated(tmp_path, key, variable):
    with pytest.raises(UserError) as refused:
        override(Config(), {key: "swordfish"})
    (problem,) = refused.value.lines
    assert key in problem and f"environment variable {variable}" in problem and "swordfish" not in problem
    file = tmp_path / "c.yaml"
    section, _, name = key.rpartition(".")
    file.write_text(f"{section}:\n  {name}: swordfish\n" if section else f"{name}: swordfish\n")
    with pytest.raises(UserError) as refused:
        load_config(file)
    (problem,) = refused.value.lines
    assert problem.startswith(f"{file}:") and variable in problem and "swordfish" not in problem


@pytest.mark.parametrize("text", [
    f"model:\n  name: {TOKEN}\n", f"data:\n  dataset: [{TOKEN}]\n", f"data:\n  dataset: https://me:{TOKEN}@host/a.jsonl\n",
    f"model:\n  xyzzy: {TOKEN}\n", f"model: {TOKEN}\n", f"hub:\n  mine: {TOKEN}\n", f"model:\n  name: at {TOKEN}.\n",
])  # fmt: skip
def test_a_value_that_looks_like_a_secret_is_refused_under_any_key(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(file)
    (problem,) = refused.value.lines
    assert "environment variable HF_TOKEN" in problem and TOKEN not in problem and "\n" not in problem


@pytest.mark.parametrize("value", [
    "Qwen/Qwen2.5-3B-Instruct", "hf_models/my_finetuned_model_of_november_2026_v2", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
    "https://host:8080/me@home/data.jsonl", "./out_hf_1",
])  # fmt: skip
def test_names_commits_and_addresses_are_no_secrets(value):
    assert not is_secret("", value) and redact(value) == value
    assert override(Config(), {"model.name": value}).model.name == value


def test_no_key_of_ours_and_no_misspelling_of_one_is_taken_for_a_secret():
    for name in [*all_keys(), "generation.max_new_token", "generation.tokens", "generation.max_tokens", "data.key", "model.keys"]:
        assert not is_secret(name, 1), name


@pytest.mark.parametrize("arguments", [
    ["--set", f"model.hf_token={TOKEN}"], [f"--hf_token={TOKEN}"], ["--set", TOKEN], ["--model_name", TOKEN],
    ["--config", f"{TOKEN}.yaml"], ["--set", f"model.name=[{TOKEN}"], ["--set", f"lora.{TOKEN}=1"],
])  # fmt: skip
def test_the_command_does_not_repeat_a_token(capsys, monkeypatch, arguments):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: train_qlora.main(arguments))
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert TOKEN[3:] not in shown.out + shown.err
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_the_log_and_the_command_line_of_run_json_are_redacted(tmp_path, capsys, monkeypatch):
    log = RunLog()
    log.write(f"before the folder is there: {TOKEN}")
    log.open(tmp_path, None)
    log.write(f"https://me:swordfish@host/ and {TOKEN}")
    written = (tmp_path / "training_log.txt").read_text() + capsys.readouterr().err
    assert TOKEN not in written and "swordfish" not in written
    assert written.count("hf_***") == 4 and written.count("https://***@host/") == 2
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", "--dataset", TOKEN])
    assert command_line() == "python train_qlora.py --dataset hf_***"


# A whole run, with secrets in its environment and remote code allowed


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Run in a folder of its own, with the subfolders home, tmp and work; the output folder is work/out."""
    import matplotlib

    at = tmp_path_factory.mktemp("run")
    for name in ("home", "tmp", "work"):
        (at / name).mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "MPL"))}
    # What matplotlib looks up once and for all would take seconds to look up again.
    own = {"MPLCONFIGDIR": matplotlib.get_cachedir(), "HOME": str(at / "home"), "TMPDIR": str(at / "tmp"),
           "TORCHINDUCTOR_CACHE_DIR": str(at / "inductor"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN,
           "WANDB_API_KEY": "swordfish"}  # fmt: skip
    command = [
        sys.executable, "-B", str(ROOT / "train_qlora.py"), *SMALL, "--config", str(ROOT / "configs" / "tiny.yaml"),
        "--dataset", str(ROOT / "samples" / "articles.txt"),
        "--output_dir", "out", "--set", "model.trust_remote_code=true", "--set", "data.eval_split=0.1",
    ]  # fmt: skip
    return at, subprocess.run(command, cwd=at / "work", env=kept | own, capture_output=True, text=True, timeout=120)


def test_the_run_writes_where_it_was_told_and_to_its_caches(a_run):
    at, done = a_run
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (at / "work").iterdir()] == ["out"]
    assert list((at / "tmp").iterdir()) == []
    written = [path.relative_to(at / "home") for path in (at / "home").rglob("*") if path.is_file()]
    assert [str(path) for path in written if not path.is_relative_to(".cache/huggingface/datasets")] == []
    assert any("qlora_kit" in path.parts for path in written)


def test_the_run_repeats_no_secret_of_its_environment(a_run):
    at, done = a_run
    assert len(list((at / "work" / "out").rglob("*"))) > 10
    for content in (done.stdout.encode(), done.stderr.encode(), *(f.read_bytes() for f in at.rglob("*") if f.is_file())):
        assert TOKEN.encode() not in content and b"swordfish" not in content


def test_the_run_with_remote_code_warns_of_it_once_in_its_log(a_run):
    at, done = a_run
    log = (at / "work" / "out" / "training_log.txt").read_text()
    for text in (done.stderr, log):
        assert [line.partition(": Python")[0] for line in text.splitlines() if "trust_remote_code:" in line] == [
            "warning: model.trust_remote_code"
        ]


def test_no_library_prints_to_the_user(a_run):
    """The process is a new one: what the libraries print while they are imported would be seen."""
    lower = "".join(line for line in a_run[1].stderr.lower().splitlines() if "trust_remote_code:" not in line)
    for noise in ("warning", "deprecat", "traceback", "kernels-community", "huggingface/tokenizers", "site-packages"):
        assert noise not in lower


def test_weights_are_written_as_safetensors_alone(a_run):
    import torch

    at, _ = a_run
    names = {path.name for path in (at / "work" / "out").rglob("*")}
    assert "adapter_model.safetensors" in names
    assert names.isdisjoint({"pytorch_model.bin", "adapter_model.bin", "training_args.bin"})
    for path in (at / "work" / "out").rglob("*.pt*"):  # files that are not safetensors load without running anything
        from transformers.trainer_pt_utils import safe_globals

        with safe_globals():
            torch.load(path, weights_only=True)
