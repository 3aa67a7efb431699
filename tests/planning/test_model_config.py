"""What a config.json may state, before anything computes with it."""

import json

import pytest

from qlora_kit.errors import UserError
from qlora_kit.planning.model_config import check_model_config

SOUND = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]},
    "dtype": "bfloat16",
    "eos_token_id": [1, 106],
    "pad_token_id": -1,
    "id2label": {0: "no"},
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": [8192, 8192],
        "rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}},
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
    },
    "vision_config": {"num_attention_heads": [1, 2, 5, 8]},
}


def test_a_sound_config_is_accepted():
    check_model_config(SOUND)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num_hidden_layers", [10**5, 10**12, 0, -1, True, 2.0, "2", {}, float("inf")]),
        ("num_local_experts", [10**9, "8"]),
        ("hidden_size", [0, 10**30, [64, 0], [[64]]]),
        ("max_position_embeddings", [0, -1, float("nan"), "x", []]),
        ("rms_norm_eps", [-1, 10**30, "1e-6", True]),
        ("rope_theta", [0, float("inf"), [1]]),
        ("rope_parameters", ["linear", 1, []]),
        ("text_config", ["x", []]),
        ("quantization_config", [5, "x"]),
        ("auto_map", ["own.py", {"AutoConfig": 5}]),
        ("architectures", ["Qwen2ForCausalLM", [1]]),
        ("model_type", [5, ["qwen2"]]),
        ("dtype", ["text", 16]),
        ("eos_token_id", ["x", [[1]], [10**30], True]),
        ("tie_word_embeddings", [1, "no"]),
        ("anything", [float("nan")]),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["whole", "text_config"])
def test_another_type_or_size_is_one_line(key, values, inside):
    for value in values:
        with pytest.raises(UserError) as error:
            check_model_config({"text_config": {key: value}} if inside else {key: value})
        assert error.value.lines[0].startswith(f"model.name: states {key}: {json.dumps(value)} in its config.json, expected ")


def test_objects_within_objects_without_end_are_one_line():
    deep: dict = {}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(UserError, match="objects within each other"):
        check_model_config(deep)
