"""Run one model on two GPUs, in fp32, where rounding changes no answer: `python -m pytest -m gpu tests/model`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inference_example
from qlora_kit.adapter.attach import adapter_norm
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.config import GenerationSettings
from qlora_kit.config_file import override
from qlora_kit.inference.compare import compare_perplexity, evaluation_blocks
from qlora_kit.inference.generator import Generator
from qlora_kit.inference.library_engine import LibraryEngine
from qlora_kit.inference.load import load_engine
from qlora_kit.merge import command
from qlora_kit.model.gpu_placement import needed_bytes
from qlora_kit.planning.shape import read_shape

pytestmark = pytest.mark.gpu
FIRST = ["model.embed_tokens", "lm_head", "model.layers.0", "model.layers.1", "model.layers.2"]
SECOND = ["model.layers.3", "model.layers.4", "model.layers.5", "model.norm", "model.rotary_emb"]
# The tied embedding is on another GPU than the last layer; in the second map the inputs begin on the second GPU.
BY_HAND = {
    "embedding first": dict.fromkeys(FIRST, 0) | dict.fromkeys(SECOND, 1),
    "embedding second": dict.fromkeys(FIRST, 1) | dict.fromkeys(SECOND, 0),
}
PROMPTS = ["The river", "A lighthouse is a tower that", "In"]


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    if torch.cuda.device_count() < 2:  # at run time: training in this process leaves it one GPU
        pytest.skip("needs two CUDA GPUs; run this file alone if there are two")
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def adapter(root, tmp_path_factory) -> Path:
    """Train on the CPU, which computes in float32, and in another process, so that both GPUs stay visible in this one."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    flags = ["--config", "configs/tiny.yaml", "--max_length", "64", "--max_steps", "4", "--output_dir", str(folder)]
    for setting in ("data.eval_split=null", "data.max_train_samples=32", "training.warmup_ratio=0", "training.device=cpu"):
        flags += ["--set", setting]
    subprocess.run([sys.executable, "train_qlora.py", *flags], cwd=root, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture
def load(adapter, monkeypatch):
    """Return a function that loads the adapter and its packed base model as inference_example.py does."""

    def load(device_map=None):
        """Load as `device_map` says, or onto the first GPU."""
        if device_map:
            monkeypatch.setattr("qlora_kit.inference.load.choose_device_map", lambda *rest: (device_map, None))
        greedy = GenerationSettings(temperature=0, max_new_tokens=16, repetition_penalty=1)
        source = read_adapter(str(adapter))
        encoder, _ = inference_example.load_encoder(source, None)
        return Generator(load_engine(source, encoder.tokenizer, "cuda", "auto" if device_map else "one"), encoder, greedy)

    return load


def answers(generator):
    found = [answer.text for answer in generator.complete([generator.encode(prompt) for prompt in PROMPTS])]
    with generator.adapter_off():
        return found + [answer.text for answer in generator.complete([generator.encode(PROMPTS[0])])]


@pytest.mark.parametrize("device_map", BY_HAND.values(), ids=BY_HAND)
def test_answers_are_those_of_one_gpu(load, device_map, capsys):
    one, several = load(), load(device_map)
    assert "library's generate (its weights are on several devices)" in capsys.readouterr().err
    assert isinstance(several.engine, LibraryEngine) and not isinstance(one.engine, LibraryEngine)
    assert {parameter.device.index for parameter in several.engine.model.parameters()} == {0, 1}
    assert answers(several) == answers(one)
    assert "".join(several.stream(several.encode(PROMPTS[0]))) == answers(one)[0]
    norms = [adapter_norm(generator.engine.model) for generator in (one, several)]
    assert norms[1] == pytest.approx(norms[0])


@pytest.fixture
def text(root, tmp_path) -> str:
    """Write the beginning of the articles to a file: training held nothing of the articles out."""
    path = tmp_path / "text.txt"
    path.write_text((root / "samples/articles.txt").read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return str(path)


def compared(generator, adapter, text):
    config = read_adapter(str(adapter)).config
    blocks, name = evaluation_blocks(text, config, generator.encoder.tokenizer)
    return compare_perplexity(generator, blocks, name, override(config, {"training.batch_size": 4}))


@pytest.mark.parametrize("device_map", BY_HAND.values(), ids=BY_HAND)
def test_perplexity_is_that_of_one_gpu(load, adapter, text, device_map):
    one, several = (compared(load(where), adapter, text) for where in (None, device_map))
    assert several.base.loss == pytest.approx(one.base.loss, rel=1e-5)
    assert several.adapter.loss == pytest.approx(one.adapter.loss, rel=1e-5)
    assert several.difference.loss == pytest.approx(one.difference.loss, rel=1e-3)


def test_an_untied_head_on_the_second_gpu_has_the_same_losses(other_models):
    from qlora_kit.model.load import load_base_model
    from qlora_kit.model.perplexity import library_losses

    over_two = {"model.embed_tokens": 0, "model.layers": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 1}
    ids, losses = torch.arange(100, 228).reshape(2, 64), []
    for device in ("cuda", over_two):
        model = load_base_model(other_models["llama"], None, device=device, dtype=torch.float32)
        losses.append(library_losses(model.requires_grad_(False))(ids, ids).cpu())
    torch.testing.assert_close(losses[1], losses[0])


def free_for_weights(tiny_dir, quantization, *budgets: int):
    """Return a _free_memory that leaves each GPU room for so many bytes of weights."""
    room = needed_bytes(read_shape(json.loads((tiny_dir / "config.json").read_text())), quantization, 4)[1]
    return lambda gpus: [room + budget for budget in budgets[:gpus]]


def test_the_command_spreads_a_model_that_the_first_gpu_cannot_hold(adapter, tiny_dir, text, monkeypatch, capsys):
    """The model has 5.9 MB in 4 bits and float32, 4.7 MB of it the embedding; each GPU has room for 5.6 MB."""
    flags = ["--mode", "text", "--adapter", str(adapter), "--prompt", PROMPTS[0], "--temperature", "0", "--json",
             "--compare", "--perplexity", text, "--max_new_tokens", "8"]  # fmt: skip
    inference_example.main([*flags, "--device_map", "one"])
    one = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr(
        "qlora_kit.model.gpu_placement._free_memory",
        free_for_weights(tiny_dir, read_adapter(str(adapter)).quantization, 5_600_000, 5_600_000),
    )
    inference_example.main(flags)
    printed = capsys.readouterr()
    assert "spread over 2 GPUs" in printed.err and "library's generate" in printed.err
    several = [json.loads(line) for line in printed.out.splitlines()]
    assert len(several) == len(one) > 1
    for model in ("base", "adapter"):
        assert several[0]["perplexity"][model]["loss"] == pytest.approx(one[0]["perplexity"][model]["loss"], rel=1e-3)


@pytest.mark.parametrize("device_map", BY_HAND.values(), ids=BY_HAND)
def test_the_check_of_a_merge_loads_both_models_on_two_gpus(adapter, tmp_path, monkeypatch, capsys, device_map):
    losses = []
    for name, where in (("one", {"": 0}), ("two", device_map)):
        monkeypatch.setattr("qlora_kit.merge.check.choose_device_map", lambda *rest, where=where: (where, None))
        flags = ["--adapter", str(adapter), "--output", str(tmp_path / name), "--base", "dequantized", "--device", "cuda"]
        command.main(flags)
        losses.append(json.loads((tmp_path / name / "merge.json").read_text())["check"])
    assert "pass" in capsys.readouterr().out
    for key in ("adapter", "merged"):
        assert losses[1][key]["loss"] == pytest.approx(losses[0][key]["loss"], rel=1e-3)
