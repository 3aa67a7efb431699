"""Parameters and bytes by hand, and against models that transformers and peft really build."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from qlora_kit.config import override
from qlora_kit.memory import GIB, KNOWN_CONFIGS, ModelShape, estimate_memory, read_shape
from qlora_kit.settings import Config

ALL_SEVEN = Config().lora.target_modules


@pytest.fixture
def qwen_3b() -> ModelShape:
    return read_shape(KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"])


def estimate(shape: ModelShape, **changes) -> dict[str, float]:
    """Bytes per part; `lora__rank=8` stands for the key lora.rank."""
    return estimate_memory(shape, override(Config(), {key.replace("__", "."): value for key, value in changes.items()}))


def total(shape: ModelShape, **changes) -> float:
    return sum(estimate(shape, **changes).values())


# Qwen2.5-3B, whose figures are published


def test_parameters_of_qwen_3b(qwen_3b):
    assert qwen_3b.parameters() == 3_085_938_688


def test_adapters_of_qwen_3b(qwen_3b):
    # 36 layers x rank 16 x the sum of in + out: q, o 2 x 4096; k, v 2 x 2304; gate, up, down 3 x 13056
    assert qwen_3b.lora_parameters(16, ALL_SEVEN) == 29_933_568
    assert qwen_3b.lora_parameters(16, "all-linear") == 29_933_568
    # 36 x 8 x (4096 + 2304)
    assert qwen_3b.lora_parameters(8, ["q_proj", "v_proj"]) == 1_843_200


def test_weights_of_qwen_3b_in_four_bits(qwen_3b):
    parts = estimate(qwen_3b)
    # 36 x 77,070,336 weights x 4.127 bits
    assert parts["projection weights"] / GIB == pytest.approx(1.33, abs=0.005)
    # 151,936 x 2048 x 2 bytes, and norms and biases of half a MiB
    assert parts["embedding and norms"] / GIB == pytest.approx(0.58, abs=0.005)


def test_adapters_gradients_and_optimizer_state_of_qwen_3b(qwen_3b):
    parts = estimate(qwen_3b)
    assert parts["adapters (fp32)"] == parts["gradients (fp32)"] == 4 * 29_933_568
    assert parts["optimizer state"] == 2 * 29_933_568  # two moments of 8 bits
    assert estimate(qwen_3b, training__optim="adamw_torch")["optimizer state"] == 8 * 29_933_568


def test_bits_per_weight_are_those_of_the_qlora_paper(qwen_3b):
    def bits(**changes) -> float:
        return 8 * estimate(qwen_3b, **changes)["projection weights"] / qwen_3b.projection_parameters()

    assert bits() == pytest.approx(4.127, abs=0.001)
    assert bits(quantization__use_double_quant=False) == 4.5
    assert bits(quantization__load_in_4bit=False) == 16


def test_a_chunk_of_logits_by_hand(qwen_3b):
    # 128 tokens x 151,936 entries x 6 bytes (fp32, and bf16 before or after); one layer of 512 tokens is smaller
    assert estimate(qwen_3b)["loss or a layer"] == 128 * 151_936 * 6


# Against the libraries


def small(config_class: type[PretrainedConfig], tied: bool, **rest) -> PretrainedConfig:
    return config_class(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        tie_word_embeddings=tied,
        **rest,
    )


@pytest.fixture(
    params=[
        (config_class, tied, rest)
        for config_class, rest in [
            (Qwen2Config, {}),
            (LlamaConfig, {}),
            (LlamaConfig, {"head_dim": 32}),
            (MistralConfig, {}),
            (Qwen3Config, {"head_dim": 32}),
        ]
        for tied in (True, False)
    ],
    ids=lambda parts: f"{parts[0].model_type}-{'tied' if parts[1] else 'untied'}{'-head_dim' if parts[2] else ''}",
)
def model_and_shape(request, tmp_path):
    """A small model of each kind, and the shape read from the config.json that it saves."""
    config_class, tied, rest = request.param
    config = small(config_class, tied, **rest)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, read_shape(json.loads((tmp_path / "config.json").read_text()))


def test_parameters_are_those_of_the_model_that_transformers_builds(model_and_shape):
    model, shape = model_and_shape
    model.tie_weights()
    assert shape.parameters() == model.num_parameters()


@pytest.mark.parametrize("targets", [ALL_SEVEN, ["q_proj", "v_proj"], ["down_proj"], "all-linear"], ids=str)
def test_adapters_are_those_that_peft_adds(model_and_shape, targets):
    model, shape = model_and_shape
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert shape.lora_parameters(4, targets) == adapted.get_nb_trainable_parameters()[0]


def test_the_embedded_model_counts_as_it_is(tiny_dir):
    shape = read_shape(json.loads((tiny_dir / "config.json").read_text()))
    assert shape.parameters() == AutoModelForCausalLM.from_pretrained(tiny_dir).num_parameters()


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "gemma3", None])
def test_other_architectures_have_no_estimate(model_type):
    assert read_shape({"model_type": model_type}) is None
    assert read_shape({}) is None


# What takes more, and what takes less


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"lora__rank": 8}, {"lora__rank": 16}),
        ({"data__max_length": 512}, {"data__max_length": 513}),
        ({"training__batch_size": 1}, {"training__batch_size": 2}),
        ({"performance__micro_batch": 1, "training__batch_size": 4}, {"training__batch_size": 4}),
        ({"quantization__use_double_quant": True}, {"quantization__use_double_quant": False}),
        ({"quantization__use_double_quant": False}, {"quantization__load_in_4bit": False}),
        ({"training__gradient_checkpointing": True}, {"training__gradient_checkpointing": False}),
        ({"training__optim": "adamw_8bit"}, {"training__optim": "adamw_torch"}),
        ({"lora__target_modules": ["q_proj"]}, {"lora__target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=str,
)
def test_the_estimate_grows_with_what_takes_memory(qwen_3b, less, more):
    assert total(qwen_3b, **less) < total(qwen_3b, **more)


def test_gradient_accumulation_takes_no_memory(qwen_3b):
    assert total(qwen_3b, training__gradient_accumulation_steps=1) == total(qwen_3b, training__gradient_accumulation_steps=64)


def test_the_default_run_fits_a_card_of_8_gib(qwen_3b):
    assert 1.92 * GIB < total(qwen_3b) < 7 * GIB


def test_recomputing_costs_one_forward_pass_through_the_layers(qwen_3b):
    work = qwen_3b.training_flops_per_token
    assert work(recompute=True) - work(recompute=False) == 2 * qwen_3b.projection_parameters()
