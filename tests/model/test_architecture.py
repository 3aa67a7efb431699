"""Which models the fast path computes, by their config.json."""

import pytest
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from qlora_kit.config import Config, ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.architecture import read_fast_shape, why_not_llama_like


@pytest.mark.parametrize(
    ("config_class", "settings", "windowed"),
    [
        (MistralConfig, {}, True),  # 4,096 where the file leaves it out
        (MistralConfig, {"sliding_window": None}, False),
        (MistralConfig, {"sliding_window": 8192}, False),
        (MistralConfig, {"sliding_window": 64, "use_sliding_window": False}, True),  # a key that Mistral does not know
        (Qwen2Config, {}, False),
        (Qwen2Config, {"sliding_window": 64}, False),
        (Qwen2Config, {"sliding_window": 64, "use_sliding_window": False}, False),
        (Qwen2Config, {"sliding_window": 64, "use_sliding_window": True}, True),
        (Qwen2Config, {"use_sliding_window": True}, True),
        (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 32}, False),  # no layer is beyond
        (Qwen3Config, {"use_sliding_window": True, "layer_types": ["full_attention"] * 32}, False),
        (Qwen3Config, {"use_sliding_window": True, "layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, True),
    ],
    ids=str,
)
def test_a_window_shorter_than_a_block_keeps_a_model_off_the_fast_path(config_class, settings, windowed):
    """As a config.json states it, and as transformers completes it."""
    for config in ({"model_type": config_class.model_type, **settings}, config_class(**settings).to_dict()):
        assert (why_not_llama_like(config, 8192) is not None) == windowed


def test_llama_has_no_window():
    assert why_not_llama_like({"model_type": "llama", "sliding_window": 64}, 512) is None


def test_absurd_sizes_name_the_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "32"}')
    with pytest.raises(UserError) as caught:
        read_fast_shape(Config(model=ModelSettings(name=str(tmp_path))))
    assert caught.value.lines == [
        f'model.name: {tmp_path}: states num_hidden_layers: "32" in its config.json, expected a whole number from 1 to '
        "512. Correct it, or copy the file again from its source."
    ]
