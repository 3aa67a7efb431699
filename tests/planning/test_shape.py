"""Parameter counts by hand, and against the models that transformers and peft build."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from qlora_kit.config import Config
from qlora_kit.errors import UserError
from qlora_kit.planning.model_config import DEFAULTS
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


@pytest.mark.parametrize(
    "targets",
    [ALL_SEVEN, ["q_proj", "v_proj"], ["down_proj"], "all-linear", ["self_attn.q_proj", "2.mlp.up_proj", "up_proj"]],
    ids=str,
)
def test_adapter_parameters_equal_those_that_peft_adds(model_and_shape, targets):
    model, shape = model_and_shape
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert shape.lora_parameters(4, targets) == adapted.get_nb_trainable_parameters()[0]


def test_parameters_of_the_embedded_model(tiny_dir):
    shape = read_shape(json.loads((tiny_dir / "config.json").read_text()))
    assert shape.parameters() == AutoModelForCausalLM.from_pretrained(tiny_dir).num_parameters()


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "gemma2", "gemma3_text", "phi3", "qwen3_moe", None, []])
def test_other_architectures_have_no_shape(model_type):
    sizes = {key: value for key, value in KNOWN_CONFIGS["Qwen/Qwen2.5-3B-Instruct"].items() if key != "model_type"}
    assert read_shape({"model_type": model_type, **sizes}) is None
    assert read_shape(sizes) is None


def stated(kind: str, layers, hidden, heads, kv_heads, head_size, mlp, vocabulary, tied, **others) -> dict:
    """Return a config.json; a size of None is left out."""
    sizes = {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_size, "intermediate_size": mlp, "vocab_size": vocabulary,
    }  # fmt: skip
    present = {key: value for key, value in sizes.items() if value is not None}
    return {"model_type": kind, "tie_word_embeddings": tied, **present, **others}


LLAMA_1B = (16, 2048, 32, 8, 64, 8192, 128256, True)
PUBLISHED = [
    ("Llama-3.2-1B", 1235814400, stated("llama", *LLAMA_1B)),
    ("Llama-3.2-3B", 3212749824, stated("llama", 28, 3072, 24, 8, 128, 8192, 128256, True)),
    ("Llama-3.1-8B", 8030261248, stated("llama", 32, 4096, 32, 8, None, 14336, 128256, False)),
    ("Llama-2-7B", 6738415616, stated("llama", 32, 4096, 32, None, None, 11008, 32000, False)),
    ("Mistral-7B-v0.1", 7241732096, stated("mistral", 32, 4096, 32, 8, None, 14336, 32000, False)),
    ("Mistral-7B-v0.3", 7248023552, stated("mistral", 32, 4096, 32, 8, None, 14336, 32768, False)),
    ("Mistral-Nemo-12B", 12247782400, stated("mistral", 40, 5120, 32, 8, 128, 14336, 131072, False)),
    ("Qwen2.5-0.5B", 494032768, stated("qwen2", 24, 896, 14, 2, None, 4864, 151936, True)),
    ("Qwen2.5-1.5B", 1543714304, stated("qwen2", 28, 1536, 12, 2, None, 8960, 151936, True)),
    ("Qwen2.5-3B", 3085938688, stated("qwen2", 36, 2048, 16, 2, None, 11008, 151936, True)),
    ("Qwen2.5-7B", 7615616512, stated("qwen2", 28, 3584, 28, 4, None, 18944, 152064, False)),
    ("Qwen2.5-14B", 14770033664, stated("qwen2", 48, 5120, 40, 8, None, 13824, 152064, False)),
    ("Qwen2.5-32B", 32763876352, stated("qwen2", 64, 5120, 40, 8, None, 27648, 152064, False)),
    ("Qwen2.5-72B", 72706203648, stated("qwen2", 80, 8192, 64, 8, None, 29568, 152064, False)),
    ("Qwen3-0.6B", 596049920, stated("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True)),
    ("Qwen3-4B", 4022468096, stated("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, True)),
    ("Qwen3-8B", 8190735360, stated("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False)),
    ("SmolLM2-1.7B", 1711376384, stated("llama", 24, 2048, 32, 32, None, 8192, 49152, True)),
    ("TinyLlama-1.1B", 1100048384, stated("llama", 22, 2048, 32, 4, None, 5632, 32000, False)),
    # As transformers builds them:
    ("biases of Llama", 1236191232, stated("llama", *LLAMA_1B, attention_bias=True, mlp_bias=True)),
    ("biases of Qwen3", 1235898368, stated("qwen3", *LLAMA_1B, attention_bias=True)),
    ("Qwen3 without head_dim", 4022468096, stated("qwen3", 36, 2560, 32, 8, None, 9728, 151936, True)),
    ("Mistral without num_key_value_heads", 7241732096, stated("mistral", 32, 4096, 32, None, None, 14336, 32000, False)),
    ("Llama without vocab_size", 5933109248, stated("llama", 32, 4096, 32, 8, None, 11008, None, False)),
]


@pytest.mark.parametrize(("name", "parameters", "config"), PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_parameters_of_published_models(name, parameters, config):
    assert read_shape(config).parameters() == parameters


CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 64}, {"hidden_size": 8192}], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_config_leaves_out_is_what_transformers_takes(kind, changes):
    completed = CLASSES[kind](**changes).to_dict()
    assert set(DEFAULTS[kind]) - {"head_dim"} <= set(completed)  # Qwen2 reads head_dim without declaring it
    assert read_shape({"model_type": kind, **changes}) == read_shape(completed)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_biases_are_counted_where_the_architecture_has_them(config_class, changes):
    config = small(config_class, tied=True, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert read_shape(config.to_dict()).parameters() == model.num_parameters()


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "sliding_window"]
)
@pytest.mark.parametrize("value", [-1, 10**30, 4096.0, "32", [32], {}, True], ids=str)
def test_a_size_that_is_none_is_one_problem(key, value):
    with pytest.raises(UserError) as caught:
        read_shape(stated("qwen2", *LLAMA_1B) | {key: value})
    (line,) = caught.value.lines
    assert f"states {key}: {json.dumps(value)} in its config.json, expected " in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 0}, "states hidden_size: 0 in its config.json, expected a whole number from 1 to 16,777,216"),
        (
            {"num_hidden_layers": 1025},
            "states num_hidden_layers: 1025 in its config.json, expected a whole number from 1 to 512",
        ),
        (
            {"num_key_value_heads": 5},
            "states num_key_value_heads: 5 in its config.json, expected a divisor of the 32 attention heads",
        ),
        ({"hidden_size": 2050}, "states hidden_size: 2050 in its config.json, expected a multiple of the 32 attention heads"),
        ({"attention_bias": "yes"}, 'states attention_bias: "yes" in its config.json, expected true or false'),
        ({"tie_word_embeddings": 1}, "states tie_word_embeddings: 1 in its config.json, expected true or false"),
        ({"vocab_size": None}, "states vocab_size: null in its config.json, expected a whole number"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_one_problem(changes, expected):
    with pytest.raises(UserError) as caught:
        read_shape(stated("llama", *LLAMA_1B) | changes)
    (line,) = caught.value.lines
    assert line.startswith(f"model.name: {expected}")


@pytest.mark.parametrize("tokens", [1, 100, 441, 442, 512, 8192])
def test_pieces_of_the_head_cover_the_vocabulary_and_hold_no_more_logits_than_allowed(tokens):
    rows = vocabulary_piece(tokens, 151_936)
    assert rows % 64 == 0
    pieces = -(-151_936 // rows)
    assert (pieces == 1) == (tokens <= 441)  # 2^26 / 151,936
    assert tokens * rows <= PIECE_LOGITS + tokens * 64  # rows are rounded up to 64
    assert pieces == -(-tokens * 151_936 // PIECE_LOGITS)
