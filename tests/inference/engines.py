"""Models, settings and answers for the tests of the engines."""

import torch
from peft import PeftModel

from qlora_kit.config import GenerationSettings
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training

PROMPTS = [[100, 200, 300, 400, 500], [7], list(range(50, 90)), [1000, 2000]]


def load_adapted(folder, targets=None, device="cpu", dtype=torch.float32) -> PeftModel:
    """A 4-bit model whose adapter changes every answer."""
    model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(compute_dtype=dtype), device=device, dtype=dtype)
    torch.manual_seed(0)
    lora = create_lora_config(4, 16.0, 0.05, targets) if targets else create_lora_config(4, 16.0, 0.05)
    model = prepare_model_for_training(model, lora, use_gradient_checkpointing=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def greedy(**changes) -> GenerationSettings:
    return GenerationSettings(**{"max_new_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.0} | changes)


def answer(engine, prompts, settings, seed=0, stop_ids=(3,)) -> list[list[int]]:
    rows = zip(*engine.steps(prompts, settings, seed, list(stop_ids)), strict=True)
    ends = [(list(row), next((at for at, token in enumerate(row, 1) if token in stop_ids), None)) for row in rows]
    return [row[:end] for row, end in ends]


def decode_without_cache(model, prompt, count) -> list[int]:
    """The most probable tokens, each from a pass over the whole text, without padding."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()
