"""Small random models of the architectures that mix tokens in other ways than plain causal attention."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WINDOW, SHORT = 12, 16  # tokens: of windows and chunks; of the longest text with its own rotary angles
SIZES = {
    "vocab_size": 6144, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "bos_token_id": 6141, "eos_token_id": 6143, "pad_token_id": 6142,
}  # fmt: skip
HEAD = {"head_dim": 16}
ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": SHORT,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + n for n in range(8)]}  # fmt: skip
MODELS = {
    "gemma3": ("gemma3_text", HEAD | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("gpt_oss", HEAD | {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "mistral": ("mistral", HEAD | {"sliding_window": WINDOW}),
    "llama4": ("llama4_text", HEAD | {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 48,
                                      "layer_types": ["chunked_attention", "full_attention"]}),
    "phi3": ("phi3", {"original_max_position_embeddings": SHORT, "rope_parameters": ROPE}),
    "llama": ("llama", {"rope_parameters": ROPE}),
    "qwen3_5": ("qwen3_5_text", HEAD | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 1, "linear_num_value_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "tie_word_embeddings": True}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 2}),
    "mamba": ("mamba", {"state_size": 8}),
}  # fmt: skip
WINDOWED, BY_LENGTH, NOT_PACKED = (
    ("gemma3", "gpt_oss", "mistral", "llama4"),
    ("phi3", "llama"),
    ("qwen3_5", "lfm2", "bloom", "mamba"),
)


def build_model(name: str) -> PreTrainedModel:
    """Return a model of MODELS in evaluation mode; its weights are large enough for tokens to depend on those before them."""
    kind, settings = MODELS[name]
    known = {key: value for key, value in SIZES.items() if kind not in ("bloom", "mamba") or key in ("vocab_size", "hidden_size")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known | settings))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
