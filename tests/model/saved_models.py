"""Folders of small random models whose layers are not all plain linear layers, and copies of the embedded model with changes."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets" / "tiny-qwen2"
COMMON = {
    "vocab_size": 6144, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 6141, "eos_token_id": 6143, "pad_token_id": 6141,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FEW = {"vocab_size": 6144, "hidden_size": 64, "bos_token_id": 6141, "eos_token_id": 6143, "pad_token_id": 6141}
GEMMA = COMMON | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
          "patch_size": 16}  # fmt: skip
MODELS = {
    "llama": ("llama", COMMON),
    "mixtral": ("mixtral", COMMON | EXPERTS),
    # peft finds its experts by the names that they had as layers, gate_proj, up_proj and down_proj.
    "qwen3_moe": ("qwen3_moe", COMMON | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}),
    # Its router is a subclass of Linear that returns two tensors.
    "phimoe": ("phimoe", COMMON | EXPERTS),
    # They have a Linear of their own.
    "falcon": ("falcon", FEW | {"num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True}),
    "falcon_bias": ("falcon", FEW | {"num_hidden_layers": 2, "num_attention_heads": 4, "bias": True, "multi_query": False}),
    # They read the weights of some layers themselves.
    "mamba": ("mamba", FEW | {"num_hidden_layers": 2, "state_size": 8, "time_step_rank": 64}),
    "gemma3n": ("gemma3n_text", GEMMA | {
        "vocab_size_per_layer_input": 6144, "hidden_size_per_layer_input": 64, "intermediate_size": [128] * 2,
        "num_kv_shared_layers": 0, "laurel_rank": 64, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2}),
    # They read images as well; in Gemma 4's encoder `q_proj` is a module with a linear layer in it.
    "gemma3": ("gemma3", {
        "text_config": GEMMA | {"model_type": "gemma3_text"}, "mm_tokens_per_image": 4, "image_token_index": 6100,
        "vision_config": VISION}),
    "gemma4": ("gemma4", {
        "text_config": GEMMA | {
            "model_type": "gemma4_text", "vocab_size_per_layer_input": 6144, "hidden_size_per_layer_input": 64,
            "global_head_dim": 16, "num_kv_shared_layers": 0},
        "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32}, "audio_config": None}),
    "mistral3": ("mistral3", {
        "text_config": COMMON | {"model_type": "mistral", "head_dim": 16}, "image_token_index": 6100,
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 32}}),
}  # fmt: skip


@functools.cache
def save_model(name: str) -> Path:
    """Return the folder of a model of MODELS in float32, with the embedded model's tokenizer."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    folder = _new_folder()
    loader = AutoModelForImageTextToText if kind == "mistral3" else AutoModelForCausalLM
    model = loader.from_config(AutoConfig.for_model(kind, **settings))
    for parameter in model.parameters():
        if not parameter.any():  # biases, and a scale of Gemma 3n's: zero only before any training
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / file, folder)
    return folder


@functools.cache
def save_packed() -> Path:
    """Return a folder of the embedded model whose files are in FP4 already; its layer 1 has attention in 32 bits."""
    folder = _new_folder()
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False, bnb_4bit_compute_dtype=torch.float16,
        llm_int8_skip_modules=["lm_head", "model.layers.1.self_attn"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=packing, dtype=torch.float32, device_map={"": "cpu"})
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / file, folder)
    return folder


def change_model(
    folder: Path, keep: Callable[[str], bool] = lambda name: True, base: Path = TINY, added: dict | None = None, **config: object
) -> Path:
    """Copy a model into `folder` with the tensors that `keep` names, those that are added, and keys of config.json changed."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    tensors = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if keep(name)}
    save_file(tensors | (added or {}), folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def _new_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="qlora-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
