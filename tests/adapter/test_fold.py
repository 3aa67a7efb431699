"""Fold adapters into loaded models, and compare with the same models before folding."""

import json
import shutil
from types import SimpleNamespace

import bitsandbytes
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import inference_example
from qlora_kit.adapter.fold import ANSWER_BYTES, check_memory, fold
from qlora_kit.config import GIB, ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.inference.graph_engine import GraphEngine

IDS = torch.randint(0, 6000, (2, 48), generator=torch.Generator().manual_seed(0))


def with_adapter(folder, packed: bool, dtype=torch.float32, targets="all-linear", **settings):
    """A model in `folder` with a random adapter whose B is not zero."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=dtype)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization if packed else None, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("name, packed, settings", [
    ("tiny", True, {}),
    ("tiny", True, {"targets": ["q_proj", "v_proj"], "use_rslora": True}),
    ("llama", False, {}),
    ("gpt2", True, {}),
    ("gpt2", False, {"fan_in_fan_out": True}),  # GPT-2 stores its matrices transposed
])  # fmt: skip
def test_the_folded_model_has_the_logits_of_base_and_adapter(tiny_dir, other_models, name, packed, settings):
    adapted = with_adapter(tiny_dir if name == "tiny" else other_models[name], packed, **settings)
    expected = logits(adapted)
    with adapted.disable_adapter():
        assert (logits(adapted) - expected).abs().max() > 0.1  # the adapter changes the logits
    folded = fold(adapted)
    torch.testing.assert_close(logits(folded), expected, rtol=1e-3, atol=2e-3)
    assert not any(isinstance(module, LoraLayer | bitsandbytes.nn.Linear4bit) for module in folded.modules())
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}


def test_in_16_bits_the_loss_agrees_within_rounding(tiny_dir):
    adapted = with_adapter(tiny_dir, packed=True, dtype=torch.bfloat16)

    def loss(model) -> float:
        return torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()

    before = loss(adapted)
    folded = fold(adapted)
    assert loss(folded) == pytest.approx(before, abs=0.02)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}


def test_merged_answers_are_those_without_the_flag(adapter, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    flags = [
        "--adapter",
        str(adapter),
        "--device",
        "cpu",
        "--prompt",
        " = River = ",
        "--temperature",
        "0",
        "--max_new_tokens",
        "30",
    ]
    inference_example.main(flags)
    expected = capsys.readouterr().out
    inference_example.main([*flags, "--merged"])
    assert capsys.readouterr().out == expected


def test_the_graph_engine_runs_a_folded_model(adapter, root, monkeypatch):
    from qlora_kit.config import GenerationSettings

    monkeypatch.chdir(root)
    greedy = GenerationSettings(temperature=0, max_new_tokens=12, repetition_penalty=1)
    generator = inference_example.load_generator(adapter, device="cpu", merged=True, settings=greedy)
    ids = [generator.encode("The river")]
    expected = list(generator.engine.steps(ids, greedy, 1, []))
    assert list(GraphEngine(generator.engine.model, captured=False).steps(ids, greedy, 1, [])) == expected


@pytest.mark.gpu
def test_on_a_gpu_the_graph_engine_answers_a_folded_model_as_the_library_does(adapter, root, monkeypatch):
    from qlora_kit.config import GenerationSettings
    from qlora_kit.inference.library_engine import LibraryEngine

    monkeypatch.chdir(root)
    greedy = GenerationSettings(temperature=0, max_new_tokens=12, repetition_penalty=1)
    generator = inference_example.load_generator(adapter, device="cuda", merged=True, settings=greedy)
    assert isinstance(generator.engine, GraphEngine)
    ids = [generator.encode("The river"), generator.encode("A lighthouse is a tower that")]
    expected = list(LibraryEngine(generator.engine.model, None).steps(ids, greedy, 1, []))
    assert list(generator.engine.steps(ids, greedy, 1, [])) == expected


@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_too_little_memory_is_refused_before_loading(tiny_dir, monkeypatch, dtype, width):
    """The model needs 3,543,360 parameters, its largest projection 192 x 512 in fp32, and room for answers."""
    needed = 3_543_360 * width + 192 * 512 * 4 + ANSWER_BYTES
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed))
    check_memory(ModelSettings(name=str(tiny_dir)), dtype, "cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=needed - 1))
    with pytest.raises(UserError, match=f"^--merged: needs {needed / GIB:.2f} GiB for .*, or leave --merged out") as error:
        check_memory(ModelSettings(name=str(tiny_dir)), dtype, "cpu")
    assert "\n" not in error.value.lines[0]


def test_an_adapter_that_is_not_plain_lora_is_refused_before_the_base_model_is_read(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    for file, change in (("adapter_config.json", {"use_dora": True}), ("run.json", {"base_model": {"name": "some/model",
                          "revision": None, "folder": None}})):  # fmt: skip
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(UserError, match="use_dora: True"):
        inference_example.main(["--adapter", str(folder), "--prompt", "x", "--merged"])
