"""Parameter counts by hand, and against the models that transformers and peft build."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from qlora_kit.config import Config
from qlora_kit.planning.shape import KNOWN_CONFIGS, PIECE_LOGITS, read_shape, vocabulary_piece

ALL_SEVEN = Config().lora.target_modules


def test_parameters_of_qwen_3b(qwen_3b):
    assert qwen_3b.parameters() == 3_085_938_688  # as its model card states


def test_adapter_parameters_of_qwen_3b(qwen_3b):
    # 36 layers x rank 16 x the sum of in + out: q, o 2 x 4096; k, v 2 x 2304; gate, up, down 3 x 13056
    assert qwen_3b.lora_parameters(16, ALL_SEVEN) == 29_933_568
    assert qwen_3b.lora_parameters(16, "all-linear") == 29_933_568
    # 36 x 8 x (4096 + 2304)
    assert qwen_3b.lora_parameters(8, ["q_proj", "v_proj"]) == 1_843_200


def test_recomputation_costs_one_forward_pass_through_the_layers(qwen_3b):
    work = qwen_3b.training_flops_per_token
    assert work(recompute=True) - work(recompute=False) == 2 * qwen_3b.projection_parameters()


def small(config_class: type[PretrainedConfig], tied: bool, **sizes) -> PretrainedConfig:
    return config_class(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        tie_word_embeddings=tied,
        **sizes,
    )


@pytest.fixture(
    params=[
        (config_class, tied, sizes)
        for config_class, sizes in [
            (Qwen2Config, {}),
            (LlamaConfig, {}),
            (LlamaConfig, {"head_dim": 32}),
            (MistralConfig, {}),
            (Qwen3Config, {"head_dim": 32}),
        ]
        for tied in (True, False)
    ],
    ids=lambda param: f"{param[0].model_type}-{'tied' if param[1] else 'untied'}{'-head_dim' if param[2] else ''}",
)
def model_and_shape(request, tmp_path):
    """A small model of each architecture, and the shape read from the config.json that it saves."""
    config_class, tied, sizes = request.param
    config = small(config_class, tied, **sizes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, read_shape(json.loads((tmp_path / "config.json").read_text()))


def test_parameters_equal_those_of_the_model_that_transformers_builds(model_and_shape):
    model, shape = model_and_shape
    model.tie_weights()
    assert shape.parameters() == model.num_parameters()


@pytest.mark.parametrize("targets", [ALL_SEVEN, ["q_proj", "v_proj"], ["down_proj"], "all-linear"], ids=str)
def test_adapter_parameters_equal_those_that_peft_adds(model_and_shape, targets):
    model, shape = model_and_shape
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert shape.lora_parameters(4, targets) == adapted.get_nb_trainable_parameters()[0]


def test_parameters_of_the_embedded_model(tiny_dir):
    shape = read_shape(json.loads((tiny_dir / "config.json").read_text()))
    assert shape.parameters() == AutoModelForCausalLM.from_pretrained(tiny_dir).num_parameters()


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "gemma3", None])
def test_other_architectures_have_no_shape(model_type):
    sizes = {key: value for key, value in KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"].items() if key != "model_type"}
    assert read_shape({"model_type": model_type, **sizes}) is None
    assert read_shape(sizes) is None


@pytest.mark.parametrize(
    "missing", ["num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_config_that_leaves_a_size_to_the_library_has_no_shape(missing):
    stated = KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"]
    assert read_shape({key: value for key, value in stated.items() if key != missing}) is None


@pytest.mark.parametrize("tokens", [1, 100, 441, 442, 512, 8192])
def test_pieces_of_the_head_cover_the_vocabulary_and_hold_no_more_logits_than_allowed(tokens):
    rows = vocabulary_piece(tokens, 151_936)
    assert rows % 64 == 0
    pieces = -(-151_936 // rows)
    assert (pieces == 1) == (tokens <= 441)  # 2^26 / 151,936
    assert tokens * rows <= PIECE_LOGITS + tokens * 64  # rows are rounded up to 64
    assert pieces == -(-tokens * 151_936 // PIECE_LOGITS)
