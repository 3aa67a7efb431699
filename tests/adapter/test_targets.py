"""Put LoRA on models of other architectures: what is reached, what is left out, and what peft refuses."""

import warnings

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

from qlora_kit.adapter import targets
from qlora_kit.adapter.targets import add_lora, measure_reach
from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.loss import token_losses
from qlora_kit.model.skeleton import build_skeleton, pack_skeleton
from quantization_utils import ATTENTION_AND_MLP, create_bnb_config, create_lora_config, load_model_and_tokenizer
from tests.model.saved_models import save_model

IDS = torch.arange(100, 124)[None]


def skeleton(name: str):
    model = build_skeleton(ModelSettings(name=str(save_model(name))))
    pack_skeleton(model)
    return model


def adapt(name: str, chosen="all-linear", dropout=0.0):
    return add_lora(skeleton(name), create_lora_config(4, 8.0, dropout, chosen))


def refusal(name: str, chosen="all-linear", dropout=0.05) -> str:
    with pytest.raises(UserError) as error:
        adapt(name, chosen, dropout)
    (line,) = error.value.lines
    return line


@pytest.mark.parametrize("name, chosen, reached", [
    ("llama", ATTENTION_AND_MLP, "on 14 of 14 projections"),
    ("llama", ["q_proj", "v_proj"], "on 4 of 14 projections; not on k_proj, o_proj, gate_proj, up_proj, down_proj"),
    ("mixtral", ["q_proj"], "on 2 of 14 projections; not on k_proj, v_proj, o_proj, gate, experts"),
    ("mixtral", "all-linear", "on 14 of 14 projections"),  # with the experts and the routers, each one tensor
    ("qwen3_moe", ATTENTION_AND_MLP, "on 12 of 14 projections; not on gate"),
    ("phimoe", "all-linear", "on 8 of 14 projections; not on router, experts"),  # peft knows no experts of this model
    ("mamba", "all-linear", "on 2 of 8 projections; not on x_proj, dt_proj, out_proj"),
    ("falcon", "all-linear", "on 8 of 8 projections"),
    ("gemma3", ATTENTION_AND_MLP,
     "on 14 of 14 projections; none in vision_tower, multi_modal_projector, which text does not train"),
    ("gemma4", ["q_proj", "up_proj"],
     "on 4 of 19 projections; not on k_proj, v_proj, o_proj, gate_proj, down_proj, per_layer_input_gate, per_layer_projection, "
     "per_layer_model_projection; none in vision_tower, embed_vision, which text does not train"),
    ("mistral3", ATTENTION_AND_MLP,
     "on 14 of 14 projections; none in vision_tower, multi_modal_projector, which text does not train"),
])  # fmt: skip
def test_the_reach_of_lora_is_counted_and_named(name, chosen, reached):
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # peft's false alarms about the patterns of experts, among others
            warnings.simplefilter("error", kind)
        adapted = adapt(name, chosen)
    assert str(measure_reach(adapted)) == reached
    count = sum(isinstance(module, LoraLayer) for module in adapted.modules())
    assert measure_reach(adapted).as_json()["with_lora"] == count == int(reached.split()[1])


def test_an_encoder_of_images_gets_no_lora_and_the_adapter_says_so():
    adapted = adapt("gemma3")
    wrapped = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert len(wrapped) == 14 and all(".language_model." in name for name in wrapped)
    assert "vision_tower" in adapted.peft_config["default"].exclude_modules  # so that peft loads it the same way


@pytest.mark.parametrize("name", ["mamba", "phimoe", "gemma3n", "falcon"])
def test_every_adapter_of_a_model_with_layers_of_its_own_learns(name):
    """LoRA on a layer that is not called, or that is a router, got no gradient or ended in a traceback."""
    packing = create_bnb_config(compute_dtype=torch.float32)
    model, _ = load_model_and_tokenizer(str(save_model(name)), packing, device="cpu", dtype=torch.float32)
    adapted = add_lora(model.requires_grad_(False), create_lora_config(4, 8.0, 0.0, "all-linear")).train()
    token_losses(adapted, IDS, IDS).sum().backward()
    gradients = {key: matrix.grad for key, matrix in adapted.named_parameters() if "lora_B" in key}
    assert gradients and [key for key, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_experts_with_dropout_are_refused_with_two_ways_out_that_work():
    line = refusal("mixtral")
    assert line.startswith("lora.dropout: 0.05: cannot be used with lora.target_modules all-linear on this model, whose experts")
    assert "experts of 196,608 weights stay in 16 bits" in line
    assert line.endswith("Use --dropout 0, or the attention alone: --set lora.target_modules=[k_proj,o_proj,q_proj,v_proj].")
    adapt("mixtral", dropout=0.0)
    adapt("mixtral", ["k_proj", "o_proj", "q_proj", "v_proj"], dropout=0.05)


def test_the_names_that_would_do_come_with_what_they_need():
    line = refusal("mixtral", ATTENTION_AND_MLP)
    assert line.startswith("lora.target_modules: down_proj, gate_proj, up_proj: name no linear layers of this model. ")
    assert line.endswith("Use k_proj, o_proj, q_proj, v_proj, or all-linear with --dropout 0.")
    assert refusal("qwen3_moe", ATTENTION_AND_MLP).startswith("lora.dropout: 0.05: cannot be used with lora.target_modules down_")
    assert refusal("qwen3_moe", ["gate_proj"]).startswith("lora.target_modules: gate_proj: names no linear layer of this model. ")
    assert refusal("phimoe", ["router"]).endswith("Use k_proj, o_proj, q_proj, v_proj, or all-linear.")
    assert refusal("mamba", ["out_proj"]).endswith("Use in_proj, or all-linear.")


@pytest.mark.parametrize("kind", [ValueError, TypeError, NotImplementedError, RuntimeError])
def test_what_peft_refuses_is_one_line_with_targets_that_it_accepts(monkeypatch, kind):
    def refuse(model, config, **rest):
        if "k_proj" in config.target_modules:
            raise kind("Module 'k_proj' is\nincompatible.")
        return peft.get_peft_model(model, config, **rest)

    monkeypatch.setattr(targets, "get_peft_model", refuse)
    assert refusal("llama", ["k_proj", "v_proj"], 0.0) == (
        "lora.target_modules: k_proj, v_proj: cannot be used on this model (Module 'k_proj' is incompatible). "
        "Use down_proj, gate_proj, o_proj, q_proj, up_proj, v_proj."
    )


def test_a_full_memory_is_no_refusal(monkeypatch):
    def fill(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(targets, "get_peft_model", fill)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        adapt("llama")
