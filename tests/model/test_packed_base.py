"""Settings against the quantization that a base model's files state themselves."""

import pytest

from qlora_kit.config import Config
from qlora_kit.config_file import load_config, override
from qlora_kit.errors import UserError
from qlora_kit.model.packed_base import read_packed, settle_quantization
from tests.model.saved_models import TINY, save_packed

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize("settings, expected", [
    (BNB, ("fp4", False, "float32")),  # bitsandbytes' own defaults
    (BNB | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
     ("nf4", True, "bfloat16")),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, ("nf4", False, "float32")),  # before files named the method
])  # fmt: skip
@pytest.mark.parametrize("where", ["quantization_config", "text_config"])
def test_the_files_settings_are_read_with_bitsandbytes_defaults(settings, expected, where):
    config = {where: settings if where == "quantization_config" else {"quantization_config": settings}}
    names = ("load_in_4bit", "quant_type", "use_double_quant", "compute_dtype")
    assert read_packed(config, "m") == dict(zip(names, (True, *expected), strict=True))
    assert read_packed({"model_type": "qwen2"}, "m") is None


def settled(config: Config, *changes: tuple[str, object], model=None):
    return settle_quantization(override(config, {"model.name": str(model or save_packed()), **dict(changes)}))


def test_defaults_give_way_to_the_files_and_the_log_says_so(root):
    for config in (Config(), load_config(root / "config.yaml")):
        own, (note,) = settled(config)
        assert (own.quantization.quant_type, own.quantization.use_double_quant) == ("fp4", False)
        assert own.quantization.compute_dtype == "auto" and own.lora == config.lora
        assert note.endswith("are 4-bit FP4 without double quantization already, made to compute in float16, and stay so")


def test_a_config_that_agrees_is_fine_and_so_is_a_base_that_is_not_packed():
    own, _ = settled(Config(), ("quantization.quant_type", "fp4"), ("quantization.compute_dtype", "bfloat16"))
    assert own.quantization.compute_dtype == "bfloat16"  # any dtype can compute with the weights
    config = override(Config(), {"model.name": str(TINY)})
    assert settle_quantization(config) == (config, [])


@pytest.mark.parametrize("key, value, remedy", [
    ("quantization.quant_type", "nf4", "Use fp4"),  # insisted on, though it is the default
    ("quantization.use_double_quant", True, "Use false"),
    ("quantization.load_in_4bit", False, "Use true"),
    ("performance.fsdp", True, "Use false"),
])  # fmt: skip
def test_a_setting_that_the_user_insists_on_contradicts_in_one_line(key, value, remedy):
    with pytest.raises(UserError) as error:
        settled(Config(), (key, value))
    (line,) = error.value.lines
    assert line.startswith(f"{key}: {str(value).lower()}: ") and "already" in line and remedy in line
