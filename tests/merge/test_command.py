"""Merge adapters: weights against peft's own merge, predictions against base + adapter, the folder against interruptions."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

import train_qlora
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.merge import command, merge
from qlora_kit.merge.check import MARGIN, ROUNDING, Comparison, compare_losses, compare_models, load_check_blocks
from qlora_kit.merge.folder import merge_stop_ids
from qlora_kit.merge.weights import training_packing
from qlora_kit.model.perplexity import Difference
from quantization_utils import create_bnb_config, load_model_and_tokenizer
from tests import forked

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
PAIR = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


def make_adapter(base: Path, folder: Path, quantization: dict | None = None, style: str = "text", **settings) -> Path:
    """Write an adapter of random matrices, with the run.json and the tokenizer that a run writes."""
    torch.manual_seed(1)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"} | settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    provenance = {
        "base_model": {"name": str(base), "revision": None, "folder": str(base)}, "trust_remote_code": False,
        "quantization": quantization or {"load_in_4bit": False}, "prompt_style": style, "separator_id": 6141,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(provenance))
    return folder


def run_merge(adapter: Path, output: Path, *arguments: str) -> dict[str, torch.Tensor]:
    command.main(["--adapter", str(adapter), "--output", str(output), "--check", "none", "--device", "cpu", *arguments])
    return {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def adapter(tiny_dir, tmp_path_factory) -> Path:
    return make_adapter(tiny_dir, tmp_path_factory.mktemp("merge") / "adapter")


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    run_merge(adapter, folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights that peft merges, in fp32 throughout."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("settings", [
    {},
    {"use_rslora": True},
    {
        "rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\.down_proj": 6},
        "alpha_pattern": {"v_proj": 32, "layers.3.self_attn.q_proj": 1},
    },
], ids=["plain", "rslora", "patterns"])  # fmt: skip
def test_matrices_are_those_of_pefts_own_merge_rounded_once(tiny_dir, tmp_path, settings):
    adapter = make_adapter(tiny_dir, tmp_path / "adapter", **settings)
    ours, base, reference = run_merge(adapter, tmp_path / "out"), stored(tiny_dir), merged_by_peft(tiny_dir, adapter)
    assert set(ours) == set(base)
    for name, tensor in ours.items():
        assert tensor.dtype == base[name].dtype == torch.bfloat16
        if any(f"{target}.weight" in name for target in PROJECTIONS):
            assert not torch.equal(tensor, base[name])
            # A sum halfway between two bfloat16 numbers may be rounded to either; rounding twice would change one in ten.
            assert (tensor != reference[name].bfloat16()).float().mean() < 1e-3
            torch.testing.assert_close(tensor.float(), reference[name], rtol=2**-8, atol=1e-7)
        else:
            assert torch.equal(tensor.view(torch.int16), base[name].view(torch.int16)), name


@pytest.mark.parametrize("kind, targets", [("llama", ["k_proj", "lm_head"]), ("gpt2", ["c_attn", "c_fc"])])
def test_other_architectures_merge_as_in_peft(other_models, tmp_path, kind, targets):
    """An untied head can be merged; GPT-2 stores its matrices transposed."""
    adapter = make_adapter(other_models[kind], tmp_path / "adapter", target_modules=targets, fan_in_fan_out=kind == "gpt2")
    run_merge(adapter, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reference = merged_by_peft(other_models[kind], adapter)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-6, atol=1e-7)


def in_fp32(base: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def loaded_for_training(base: Path, quant_type: str, double: bool):
    packing = create_bnb_config(quant_type, torch.float32, double)
    return load_model_and_tokenizer(str(base), packing, device="cpu", dtype=torch.float32)[0]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(0, 6000, (2, 48), generator=torch.Generator().manual_seed(0))
    return model.eval()(ids).logits


@pytest.mark.parametrize("kind, packing", [("tiny", ("nf4", True)), ("tiny", ("fp4", False)), ("gpt2", ("nf4", True))])
def test_on_the_dequantized_base_predictions_are_those_of_training(tiny_dir, other_models, tmp_path, kind, packing):
    """Matrices without an adapter were packed in training too. Compared in fp32, where rounding hides nothing."""
    base = in_fp32(tiny_dir, tmp_path / "base") if kind == "tiny" else other_models[kind]
    quantization = {"quant_type": packing[0], "use_double_quant": packing[1]}
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if kind == "gpt2" else {"target_modules": ["q_proj"]}
    adapter = make_adapter(base, tmp_path / "adapter", quantization, **targets)
    run_merge(adapter, tmp_path / "out", "--base", "dequantized")
    packed = loaded_for_training(base, *packing)
    expected = logits(PeftModel.from_pretrained(packed, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    original = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))
    assert (found - expected).abs().max() < 1e-3 * (original - expected).abs().max()


def test_in_16_bits_the_dequantized_base_agrees_within_rounding(tiny_dir, tmp_path):
    adapter = make_adapter(tiny_dir, tmp_path / "adapter", {"quant_type": "nf4"})
    run_merge(adapter, tmp_path / "out", "--base", "dequantized")
    packed = loaded_for_training(tiny_dir, "nf4", True)
    expected = logits(PeftModel.from_pretrained(packed, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (found - expected).std() / expected.std() < 0.01


def test_tied_embeddings_stay_tied(merged):
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in stored(merged)


@pytest.fixture(scope="module")
def in_pieces(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    AutoModelForCausalLM.from_pretrained(tiny_dir).save_pretrained(folder, max_shard_size="2MB")
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    return folder


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("size, largest", [("4GB", None), ("1.5MB", 2_400_000), ("0.5GiB", None)])
def test_shards_hold_the_same_weights_as_one_file(in_pieces, tiny_dir, adapter, merged, tmp_path, size, largest):
    settings = json.loads((adapter / "run.json").read_text())
    settings["base_model"] |= {"name": str(in_pieces), "folder": str(in_pieces)}
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(settings))
    ours, whole = run_merge(tmp_path / "adapter", tmp_path / "out", "--max_shard_size", size), stored(merged)
    assert set(ours) == set(whole) and all(torch.equal(ours[name], whole[name]) for name in whole)
    if largest is None:  # the base model's own files
        assert names_of(tmp_path / "out") == names_of(in_pieces) and len(names_of(in_pieces)) > 2
    else:  # the embedding is larger than the limit and has a file of its own
        assert names_of(tmp_path / "out") != names_of(in_pieces)
        assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < largest
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(merged)))


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny_dir) -> Path:
    """Return an adapter to a model of 280 MiB in one file, whose largest matrix takes 8 MiB."""
    base = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "num_attention_heads": 8}
    config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=2048, tie_word_embeddings=True, dtype="bfloat16")
    config.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, base / "model.safetensors")
    folder = base / "adapter"
    folder.mkdir()
    pairs = {}
    for layer in range(10):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
        pairs |= {f"{name}A.weight": torch.ones(2, 1024), f"{name}B.weight": torch.full((4096, 2), 0.5)}
    save_file(pairs, folder / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


MEASURE = """
import resource, sys
from pathlib import Path
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.adapter.lora_pairs import read_pairs
from qlora_kit.config import QuantizationSettings
from qlora_kit.merge.weights import Packing, plan_merge
from qlora_kit.merge.write import write_weights
import torch
base, folder, output = map(Path, sys.argv[1:4])
source = read_adapter(str(folder))
pairs = read_pairs(source)
for packing in (None, Packing(QuantizationSettings(), torch.float32, "cpu")):
    plan = plan_merge(base, source, pairs, packing)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_weights(plan.tensors, plan.merge_tensor, output, 4 * 10**9)
    print(plan.nbytes / 2**20, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts KiB")
def test_merging_holds_one_tensor_in_memory(large, tmp_path):
    """Merges onto the original weights, then onto dequantized ones. An 8 MiB matrix takes 16 in fp32, and packing copies it."""
    result = forked.run(["-c", MEASURE, str(large.parent), str(large), str(tmp_path)])
    for line in result.stdout.splitlines():
        total, grown = map(float, line.split())
        assert total > 250 and grown < 130
    assert len(result.stdout.splitlines()) == 2, result.stderr


def test_ctrl_c_while_writing_leaves_nothing(large, tmp_path):
    """A real signal is sent when the first bytes of the weights are on disk."""
    ended = threading.Event()

    def press():
        while not ended.wait(0.002):
            if any(file.stat().st_size > 2**24 for file in tmp_path.glob(".out.merging/*.safetensors")):
                return os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_merge(large, tmp_path / "out", "--base", "dequantized")
    finally:
        ended.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_nan_in_a_matrix_leaves_nothing(adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[PAIR.format("B")][3, 1] = math.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj"):
        run_merge(broken, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_a_base_whose_weights_were_replaced_is_refused(adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((own / "run.json").read_text()) | {"base_weights_sha256": "0" * 64}
    (own / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"was trained on other weights than those of .* in run\.json"):
        run_merge(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_keeps_the_former_merge_and_overwrite_replaces_it(adapter, merged, tmp_path):
    former = shutil.copytree(merged, tmp_path / "out")
    (former / ".git").mkdir()
    (former / "model.safetensors").rename(former / "model-of-then.safetensors")
    described = json.loads((former / "merge.json").read_text())
    described["files"].append("model-of-then.safetensors")
    (former / "merge.json").write_text(json.dumps(described))
    broken = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({name: tensor * math.inf for name, tensor in tensors.items()}, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match="contains NaN or infinity"):
        run_merge(broken, former, "--overwrite")
    assert (former / "model-of-then.safetensors").exists()
    run_merge(adapter, former, "--overwrite")
    assert {path.name for path in former.iterdir()} == {path.name for path in merged.iterdir()} | {".git"}
    assert stored(former).keys() == stored(merged).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_what_killed_merges_left_is_put_back_or_removed_by_the_next_and_said(adapter, merged, tmp_path, capsys):
    """Before the rename into place, between the two renames of a replacement, and after the second."""
    out, merging, former = tmp_path / "out", tmp_path / ".out.merging", tmp_path / ".out.former"
    merging.mkdir()
    (merging / "half").touch()
    (tmp_path / ".out.merging-999999999" / "x").mkdir(parents=True)  # as earlier versions named it
    shutil.copytree(merged, tmp_path / ".out.former-999999999")
    with pytest.raises(UserError, match="holds a merged model"):
        run_merge(adapter, out)
    assert stored(out).keys() == stored(merged).keys() and [path.name for path in tmp_path.iterdir()] == ["out"]
    said = capsys.readouterr().err
    assert f"Removing what a killed merge left in {merging}\n" in said and f"Putting back {out}, which" in said
    shutil.copytree(merged, former)
    (former / "own.gguf").touch()
    run_merge(adapter, out, "--overwrite")
    assert f"Removing {former}" in capsys.readouterr().err
    assert (out / "own.gguf").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("locked", [".out.merging", "out"])
def test_of_two_merges_into_one_folder_one_is_refused(adapter, merged, tmp_path, locked):
    """The other one writes, or compares what it has written."""
    if locked == "out":
        shutil.copytree(merged, tmp_path / locked)
    else:
        (tmp_path / locked).mkdir()
    handle = os.open(tmp_path / locked, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"^--output: .*/out: is in use by another merge\. Wait for its end"):
        run_merge(adapter, tmp_path / "out", "--overwrite")
    os.close(handle)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name, words", [
    ("/", "root of the file system"), ("{}/" + "n" * 250, "too long a name"), ("{}/" + "n" * 300, "cannot be used"),
    ("~nosuchuser/x", "is no path"), ("{}/a\0b", "is no path"), ("{}/\udcff", "not named in UTF-8"), ("{}/a\x1b[2J", "control"),
    ("{}/run/checkpoints/new", "holds the checkpoints"), ("{}/run", "which the merge reads"), ("{}/file/x", "is a file"),
    ("{}/dangling", "leads nowhere"),
])  # fmt: skip
def test_a_folder_that_must_not_be_a_merge_is_one_line(adapter, tmp_path, name, words):
    shutil.copytree(adapter, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "manifest.json").touch()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(UserError, match=words) as error:
        run_merge(tmp_path / "run", Path(name.format(tmp_path)))
    assert len(error.value.lines) == 1 and error.value.problems[0].key == "--output"


def test_merge_json_and_what_is_printed_keep_no_token(adapter, tmp_path, capsys, monkeypatch):
    token = "hf_" + "a" * 34
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "qlora_kit.merge", "--output", token])
    run_merge(adapter, tmp_path / token)
    shown = capsys.readouterr()
    assert token not in shown.out + shown.err + (tmp_path / token / "merge.json").read_text()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_a_merge_unless_it_is_ignored(monkeypatch, number, status):
    handlers = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(command.cli, "run", lambda main: handlers[number](number, None))
    with pytest.raises(Stopped) as stop:
        command.run()
    assert stop.value.status == status
    handlers[number] = signal.SIG_IGN
    monkeypatch.setattr(command.cli, "run", lambda main: None)
    command.run()
    assert handlers[number] == signal.SIG_IGN


def test_config_tokenizer_and_the_adapters_template_are_in_the_folder(tiny_dir, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    (own / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    run_merge(own, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tiny_dir / "config.json").read_bytes()
    ours, base = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tiny_dir)
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi!"
    assert ours("A lighthouse\n is")["input_ids"] == base("A lighthouse\n is")["input_ids"]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert set(generation.eos_token_id) == {6141, 6143} and generation.pad_token_id == base.pad_token_id
    assert not {"run.json", "adapter_config.json"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_merged_model_ends_answers_with_the_adapters_tokens(tiny_dir, adapter, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    assert merge_stop_ids(7, read_adapter(str(adapter)), tokenizer) == [7, 6141, 6143]
    tokenizer.eos_token = "<|endoftext|>"  # as Qwen's base models have it: their turns end with another token
    chat = make_adapter(tiny_dir, tmp_path / "chat", style="chat")
    assert merge_stop_ids(None, read_adapter(str(chat)), tokenizer) == [6141, 6143]


PLAIN = """
import sys
sys.modules["peft"] = sys.modules["bitsandbytes"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The river", return_tensors="pt")
print(model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] - ids["input_ids"].shape[1], model.dtype)
"""


def start_python(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("run", [forked.run, pytest.param(start_python, marks=pytest.mark.slow)])
def test_a_merged_model_loads_without_peft_and_bitsandbytes(merged, tmp_path, run):
    result = run(["-c", PLAIN, str(merged)], cwd=tmp_path)
    assert result.stdout.split() == ["4", "torch.bfloat16"], result.stderr


def test_a_merged_model_can_be_fine_tuned_again(merged, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    train_qlora.main([
        "--config", "configs/tiny.yaml", "--model_name", str(merged), "--max_steps", "1", "--max_length", "32",
        "--set", "data.eval_split=null", "--set", "data.max_train_samples=8", "--output_dir", str(tmp_path / "again"),
    ])  # fmt: skip
    assert read_adapter(str(tmp_path / "again")).model.name == str(merged)


def test_the_paired_difference_is_that_computed_by_hand():
    # differences 1 and 2 nats over 10 and 20 tokens: 0.1 a token in both blocks, so no error
    result = compare_losses([30.0, 70.0], [31.0, 72.0], [10, 20], same_weights=False)
    assert result.difference == (pytest.approx(0.1), pytest.approx(0, abs=1e-12))
    assert result.adapter.loss == pytest.approx(100 / 30) and result.merged.loss == pytest.approx(103 / 30)
    # 1 and -1 over 10 each: mean 0, residuals 1 and -1, sqrt(2/1 * 2) / 20
    noisy = compare_losses([30.0, 30.0], [31.0, 29.0], [10, 10], same_weights=True)
    assert noisy.difference == (pytest.approx(0), pytest.approx(0.1))


@pytest.mark.parametrize("difference, error, same_weights, passed", [
    (0.9 * ROUNDING, 0.0, True, True),
    (-0.9 * ROUNDING, 0.0, True, True),
    (1.1 * ROUNDING, 0.0, True, False),
    (-1.1 * ROUNDING, 0.0, True, False),  # a better loss is a difference too
    (-1.1 * ROUNDING, ROUNDING, True, True),  # within chance
    (1.1 * ROUNDING, math.nan, True, False),  # a single block
    (0.9 * MARGIN, 0.0, False, True),
    (1.1 * MARGIN, 0.0, False, False),
    (1.1 * MARGIN, MARGIN, False, True),
    (-9.0, 0.0, False, True),
    (math.nan, 0.0, False, False),
])  # fmt: skip
def test_a_merge_passes_within_the_margin_or_within_chance(difference, error, same_weights, passed):
    some = compare_losses([1.0], [1.0], [1], same_weights=True).adapter
    assert Comparison(some, some, Difference(difference, error), same_weights).passed is passed


def test_the_check_of_a_single_block_is_valid_json():
    check = compare_losses([1.0], [1.0], [1], same_weights=True).as_json()
    assert check["standard_error"] is check["merged"]["standard_error"] is None and check["passed"]


def test_merged_model_and_adapter_are_compared(adapter, tmp_path, capsys, root):
    text = tmp_path / "text.txt"
    text.write_text((root / "samples" / "articles.txt").read_text()[:9000])
    command.main(["--adapter", str(adapter), "--output", str(tmp_path / "out"), "--device", "cpu", "--check", str(text)])
    out = capsys.readouterr().out
    check = json.loads((tmp_path / "out" / "merge.json").read_text())["check"]
    blocks = check["adapter"]["blocks"]
    assert "base + adapter" in out and f"{blocks} blocks of 512 tokens" in out and "pass" in out
    assert check["passed"] and check["same_weights"] and check["adapter"]["tokens"] == blocks * 511
    assert 0 < abs(check["difference"]) < ROUNDING  # weights are rounded


def test_a_merge_that_predicts_differently_fails_and_is_kept(tiny_dir, merged, monkeypatch, tmp_path, capsys):
    """The check compares it with an adapter that it was not made from."""
    source = read_adapter(str(make_adapter(tiny_dir, tmp_path / "other", lora_alpha=64)))
    blocks, name = load_check_blocks(source, None, AutoTokenizer.from_pretrained(tiny_dir), 64)
    assert "of 64 tokens" in name and "articles.txt" in name
    packing = training_packing(source, "cpu")
    losses = compare_models(merged, source, packing, [{"": "cpu"}, {"": "cpu"}], blocks)
    assert not compare_losses(*losses, same_weights=True).passed

    monkeypatch.setattr("qlora_kit.merge.check.compare_models", lambda *_: losses)
    with pytest.raises(Failed, match="kept") as failure:
        command.main(["--adapter", str(source.folder), "--output", str(tmp_path / "out"), "--device", "cpu"])
    kept = tmp_path / "out"
    assert str(kept) in str(failure.value) and "FAIL" in capsys.readouterr().out
    assert stored(kept) and json.loads((kept / "merge.json").read_text())["check"]["passed"] is False


def test_merge_is_a_function_too(adapter, merged, tmp_path, capsys, root):
    text = tmp_path / "text.txt"
    text.write_text((root / "samples" / "articles.txt").read_text()[:9000])
    result = merge(adapter, tmp_path / "out", check=text, device="cpu")
    assert result.folder == tmp_path / "out" and result.files == ["model.safetensors"]
    assert result.check is not None and result.check.passed and "FAIL" not in "".join(result.check.lines())
    assert stored(result.folder).keys() == stored(merged).keys()
    assert capsys.readouterr().out == ""
    assert merge(adapter, tmp_path / "unchecked", check=False, device="cpu").check is None
    with pytest.raises(UserError, match=r"^--base: other: names no weights\. Use original or dequantized\.$"):
        merge(adapter, tmp_path / "third", "other")


def test_importing_merge_imports_no_torch(root):
    code = "import sys; from qlora_kit.merge import merge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def changed(adapter: Path, folder: Path, **settings) -> Path:
    """Return a copy with other values in adapter_config.json."""
    shutil.copytree(adapter, folder)
    known = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(known | settings))
    return folder


def with_tensors(adapter: Path, folder: Path, **tensors) -> Path:
    shutil.copytree(adapter, folder)
    save_file(load_file(folder / "adapter_model.safetensors") | tensors, folder / "adapter_model.safetensors")
    return folder


def on_base(adapter: Path, folder: Path, base: Path) -> Path:
    """Return a copy with another base model in run.json."""
    shutil.copytree(adapter, folder)
    provenance = json.loads((folder / "run.json").read_text())
    provenance["base_model"] |= {"name": str(base), "folder": str(base)}
    (folder / "run.json").write_text(json.dumps(provenance))
    return folder


def base_without(tiny: Path, folder: Path, *names: str) -> Path:
    return Path(shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns(*names)))


def pickled(tiny: Path, folder: Path) -> Path:
    base_without(tiny, folder, "model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def quantized(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return folder


REFUSED = {
    "no adapter": (lambda a, t, d: d / "missing", ["does not exist"]),
    "dora": (lambda a, t, d: changed(a, d / "a", use_dora=True), ["use_dora", "merge_and_unload"]),
    "bias": (lambda a, t, d: changed(a, d / "a", bias="lora_only"), ["bias: lora_only"]),
    "whole modules": (lambda a, t, d: changed(a, d / "a", modules_to_save=["lm_head"]), ["modules_to_save", "lm_head"]),
    "pissa": (lambda a, t, d: changed(a, d / "a", init_lora_weights="pissa"), ["init_lora_weights: pissa"]),
    "other kind": (lambda a, t, d: changed(a, d / "a", peft_type="IA3"), ["peft_type: IA3"]),
    "rank": (lambda a, t, d: changed(a, d / "a", r=5), ["rank 4", "rank 5"]),
    "embedding": (
        lambda a, t, d: with_tensors(a, d / "a", **{"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 6144)}),
        ["embed_tokens.lora_embedding_A"],
    ),
    "one matrix of two": (
        lambda a, t, d: with_tensors(a, d / "a", **{"base_model.model.x.lora_A.weight": torch.ones(4, 6)}), ["for x", "lora_B"],
    ),
    "missing module": (
        lambda a, t, d: with_tensors(a, d / "a", **{PAIR.replace("layers.0", "layers.6").format("A"): torch.ones(4, 192),
                                                    PAIR.replace("layers.0", "layers.6").format("B"): torch.ones(192, 4)}),
        ["does not fit", "model.layers.6.self_attn.q_proj"],
    ),
    "shape": (
        lambda a, t, d: with_tensors(a, d / "a", **{PAIR.format("A"): torch.ones(4, 100)}),
        ["does not fit", "model.layers.0.self_attn.q_proj", "192 x 192", "192 x 100"],
    ),
    "tied head": (
        lambda a, t, d: with_tensors(a, d / "a", **{"base_model.model.lm_head.lora_A.weight": torch.ones(4, 192),
                                                    "base_model.model.lm_head.lora_B.weight": torch.ones(6144, 4)}),
        ["lm_head", "embedding"],
    ),
    "no weights": (lambda a, t, d: on_base(a, d / "a", base_without(t, d / "b", "*.safetensors")), ["save_pretrained"]),
    "pickled": (lambda a, t, d: on_base(a, d / "a", pickled(t, d / "b")), ["safetensors", "save_pretrained"]),
    "quantized": (lambda a, t, d: on_base(a, d / "a", quantized(t, d / "b")), ["quantized", "16-bit"]),
}  # fmt: skip


@pytest.mark.parametrize("prepare, words", REFUSED.values(), ids=REFUSED.keys())
def test_an_adapter_that_cannot_be_merged_is_one_line(adapter, tiny_dir, tmp_path, prepare, words):
    with pytest.raises(UserError) as error:
        run_merge(prepare(adapter, tiny_dir, tmp_path), tmp_path / "place" / "out")
    (problem,) = error.value.lines
    assert "\n" not in problem and not (tmp_path / "place").exists()
    for word in words:
        assert word in problem


def test_a_damaged_shard_is_named(in_pieces, adapter, tmp_path):
    base = Path(shutil.copytree(in_pieces, tmp_path / "base"))
    (base / names_of(base)[1]).write_bytes(b"half")
    with pytest.raises(UserError, match=names_of(base)[1]):
        run_merge(on_base(adapter, tmp_path / "a", base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_folder_must_be_empty_or_a_merge(adapter, merged, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "merge.json").write_text("{}")
    (tmp_path / "file").touch()
    former = shutil.copytree(merged, tmp_path / "former")
    shutil.copytree(adapter, former / "adapter")
    for output, used, words in [
        (tmp_path / "full", adapter, "not empty"), (tmp_path / "file", adapter, "a file"), (merged, adapter, "--overwrite"),
        (former, former / "adapter", "which the merge reads"),
    ]:  # fmt: skip
        flags = ["--overwrite"] if used != adapter or output.name == "full" else []
        with pytest.raises(UserError, match=words):
            run_merge(used, output, *flags)


def test_a_disk_with_too_little_space_is_refused_before_writing(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=60 * 2**20))
    with pytest.raises(UserError, match=r"^--output: .*/out: needs 71 MiB, and its disk has 60 MiB free\. "):
        run_merge(adapter, tmp_path / "place" / "out")
    assert not (tmp_path / "place").exists()


def test_a_16_bit_adapter_has_no_dequantized_base(adapter, tmp_path):
    with pytest.raises(UserError, match=r"--base: dequantized: needs a 4-bit base, .*\. Use --base original\."):
        run_merge(adapter, tmp_path / "out", "--base", "dequantized")


@pytest.mark.parametrize("size", ["4", "GB", "0GB", "-1GB", "much"])
def test_a_size_needs_a_number_and_a_unit(size):
    with pytest.raises(UserError, match="max_shard_size"):
        command.parse_size(size)


def test_sizes_are_in_bytes():
    assert [command.parse_size(size) for size in ("4GB", "500 MiB", "1.5kb")] == [4 * 10**9, 500 * 2**20, 1500]


def test_a_missing_file_to_check_on_is_refused_before_anything_is_written(adapter, tmp_path):
    with pytest.raises(UserError, match=r"^--check: .*none\.txt: does not exist\. .*, or use --check none\.$"):
        run_merge(adapter, tmp_path / "out", "--check", str(tmp_path / "none.txt"))
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_the_process_with_status_2_and_one_line(tmp_path):
    result = forked.run(["-m", "qlora_kit.merge", "--adapter", str(tmp_path / "x"), "--output", str(tmp_path / "y")])
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --adapter")
