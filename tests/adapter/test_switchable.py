"""Switch attached adapters off and compare with the base model loaded alone."""

import json
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.adapter.attach import attach_adapter
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.errors import UserError
from qlora_kit.inference.graph_engine import why_not_decoded
from qlora_kit.inference.library_engine import LibraryEngine
from quantization_utils import create_bnb_config, load_model_and_tokenizer

IDS = torch.arange(100, 140)[None]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
IA3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def load_base(folder, packed: bool):
    quantization = create_bnb_config(compute_dtype=torch.float32) if packed else None
    return load_model_and_tokenizer(str(folder), quantization, device="cpu", dtype=torch.float32)[0].eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def attach(two_layers_dir, tmp_path):
    """Return a function that saves an adapter, everything in it changed, and attaches it to a base model."""

    def build(config, packed: bool = False, save_embedding: bool = False):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(two_layers_dir, dtype=torch.float32), config)
        embedding = [model.get_input_embeddings().weight] * save_embedding
        for parameter in [*(one for one in model.parameters() if one.requires_grad), *embedding]:
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path, save_embedding_layers=save_embedding)
        settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(two_layers_dir)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        return attach_adapter(load_base(two_layers_dir, packed), read_adapter(str(tmp_path)), "cpu"), logits(model.eval())

    return build


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config, save_embedding", [
    (LoraConfig(**LORA, bias="all"), False),
    (LoraConfig(**LORA, bias="lora_only"), False),
    (LoraConfig(**LORA), True),
    (LoraConfig(**LORA, modules_to_save=["embed_tokens", "norm"]), False),
    (LoraConfig(**LORA, trainable_token_indices=[100, 101]), False),
    (IA3, False),
], ids=["bias-all", "bias-lora_only", "embedding", "modules_to_save", "tokens", "ia3"])  # fmt: skip
def test_switched_off_it_is_the_base_model_alone_and_on_again_what_was_trained(
    two_layers_dir, attach, packed, config, save_embedding
):
    adapted, trained = attach(config, packed, save_embedding)
    on, base = logits(adapted), logits(load_base(two_layers_dir, packed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful")  # peft's, of the biases that it leaves
        with LibraryEngine(adapted, 0).adapter_off():
            assert torch.equal(logits(adapted), base)
    assert torch.equal(logits(adapted), on) and (on - base).abs().max() > 0.1
    if not packed:
        torch.testing.assert_close(on, trained, rtol=0, atol=1e-4)
    assert why_not_decoded(adapted, 64)  # the fast engine knows LoRA alone


@pytest.mark.parametrize("settings, words", [
    ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
])  # fmt: skip
def test_an_adapter_that_changes_the_base_for_good_answers_and_is_not_compared(attach, settings, words):
    adapted, trained = attach(LoraConfig(**LORA | settings))
    torch.testing.assert_close(logits(adapted), trained, rtol=0, atol=1e-3)
    with pytest.raises(UserError, match=f"--adapter: .*{words}.* --base_only"), LibraryEngine(adapted, 0).adapter_off():
        pass
    torch.testing.assert_close(logits(adapted), trained, rtol=0, atol=1e-3)
