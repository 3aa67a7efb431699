"""Tiny random models of many architectures, each with the tokenizer of the embedded model: one table, and their builder.

    python benchmarks/tiny_models.py FOLDER [NAME ...]     writes FOLDER/NAME for each name, or for all

Two layers of 64 hidden dimensions, more layers only where an architecture mixes kinds of layers. Rows of matrices are multiples
of 64, which bitsandbytes dequantizes correctly on any processor. Windows are 32 tokens, shorter than the blocks that
model_matrix.py trains on. Weights are in 32 bits, so that a merged model can be compared exactly.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "assets" / "tiny-qwen2"
VOCABULARY = 6144
TOKENS = {"bos_token_id": 6141, "eos_token_id": 6143, "pad_token_id": 6141}
WINDOW = 32  # tokens


class Tiny(NamedTuple):
    """A tiny model: the public models that are built so, its `model_type`, and the sizes that differ from the common ones."""

    public: str
    kind: str
    sizes: dict[str, Any]


COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, **TOKENS,
}  # fmt: skip
OLD = {"vocab_size": VOCABULARY, **TOKENS}  # these have names of sizes of their own
GPT2 = OLD | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128}
GPT2_DRY = GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # gradients are compared without dropout
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 64,
}  # fmt: skip
DEEPSEEK = {
    "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, **ROUTED,
}  # fmt: skip
DELTA_NET = {  # linear attention in three of four layers
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
WINDOWS = {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = WINDOWS | {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}
GEMMA4 = WINDOWS | {
    "global_head_dim": 16, "tie_word_embeddings": True, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 0,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}


def _tiny(public: str, kind: str, **sizes: Any) -> Tiny:
    return Tiny(public, kind, COMMON | sizes)


MODELS: dict[str, Tiny] = {
    "llama": _tiny("Llama 2, TinyLlama, SmolLM2, Yi", "llama", tie_word_embeddings=True),
    "llama3": _tiny("Llama 3.x", "llama", rope_parameters=ROPE | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}),
    "llama_bias": _tiny("Llama with biases", "llama", attention_bias=True, mlp_bias=True),
    "llama_yarn": _tiny("Llama, yarn", "llama", rope_parameters=ROPE | {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "llama_linear": _tiny("Llama, linear scaling", "llama", rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0}),
    "llama_dynamic": _tiny("Llama, dynamic scaling", "llama", rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}),
    "llama_longrope": _tiny("Llama, longrope", "llama", rope_parameters=ROPE | {
        "rope_type": "longrope", "factor": 16.0, "original_max_position_embeddings": WINDOW, "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.5 * i for i in range(8)]}),
    "llama_head_dim": _tiny("Llama, heads of 32", "llama", head_dim=32),
    "llama_gelu": _tiny("Llama, GELU", "llama", hidden_act="gelu"),
    "mistral": _tiny("Mistral 7B, Mistral Small", "mistral", sliding_window=None, head_dim=32),
    "mistral_window": _tiny("Mistral 7B v0.1", "mistral", sliding_window=WINDOW),
    "ministral": _tiny("Ministral 8B", "ministral", **WINDOWS),
    "ministral3": _tiny("Ministral 3", "ministral3", head_dim=16),
    "mistral3": Tiny("Mistral Small 3.1, Ministral 3 with vision", "mistral3", {
        "text_config": COMMON | {"model_type": "mistral", "head_dim": 16}, "image_token_index": 6100, "spatial_merge_size": 1,
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 32, "patch_size": 16}}),
    "qwen2": _tiny("Qwen2.5", "qwen2", tie_word_embeddings=True),
    "qwen2_window": _tiny("Qwen2 with a window", "qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": _tiny("Qwen3", "qwen3", head_dim=32),
    "qwen3_bias": _tiny("Qwen3 with biases", "qwen3", head_dim=16, attention_bias=True),
    "qwen3_5_text": _tiny("Qwen3.5 (text)", "qwen3_5_text", **DELTA_NET),
    "qwen3_5": Tiny("Qwen3.5", "qwen3_5", {
        "text_config": COMMON | DELTA_NET | {"model_type": "qwen3_5_text", "rope_parameters": ROPE | {
            "rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        "vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                          "patch_size": 16, "num_position_embeddings": 16},
        "image_token_id": 6100, "video_token_id": 6101, "vision_start_token_id": 6102, "vision_end_token_id": 6103}),
    "gemma": _tiny("Gemma", "gemma", head_dim=16, tie_word_embeddings=True),
    "gemma2": _tiny("Gemma 2", "gemma2", **GEMMA),
    "gemma3_text": _tiny("Gemma 3 1B", "gemma3_text", **GEMMA),
    "gemma3": Tiny("Gemma 3 4B, 12B, 27B", "gemma3", {
        "text_config": COMMON | GEMMA | {"model_type": "gemma3_text"}, "vision_config": VISION | {"patch_size": 16},
        "mm_tokens_per_image": 4, "image_token_index": 6100, "boi_token_index": 6101, "eoi_token_index": 6102,
        "tie_word_embeddings": True}),
    "gemma3n_text": _tiny("Gemma 3n (text)", "gemma3n_text", head_dim=16, sliding_window=WINDOW, tie_word_embeddings=True,
                          vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=64, num_hidden_layers=4,
                          intermediate_size=[128] * 4, num_kv_shared_layers=0, laurel_rank=64, altup_num_inputs=2,
                          layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4),
    "gemma4_text": _tiny("Gemma 4 (text)", "gemma4_text", **GEMMA4),
    "gemma4": Tiny("Gemma 4", "gemma4", {
        "text_config": COMMON | GEMMA4 | {"model_type": "gemma4_text"}, "audio_config": None,
        "vision_config": VISION | {"patch_size": 4, "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32},
        "image_token_id": 6100, "boi_token_id": 6101, "eoi_token_id": 6102, "tie_word_embeddings": True}),
    "vaultgemma": _tiny("VaultGemma", "vaultgemma", **GEMMA),
    "phi": _tiny("Phi-1.5, Phi-2", "phi", partial_rotary_factor=0.5, resid_pdrop=0.0, embd_pdrop=0.0),
    "phi3": _tiny("Phi-3, Phi-4", "phi3", sliding_window=None),
    "phi3_longrope": _tiny("Phi-3 128k", "phi3", original_max_position_embeddings=WINDOW, rope_scaling={
        "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.3 * i for i in range(8)]}),
    "phi4_mini": _tiny("Phi-4-mini", "phi3", partial_rotary_factor=0.75, head_dim=32, tie_word_embeddings=True),
    "smollm3": _tiny("SmolLM3", "smollm3", num_hidden_layers=4, no_rope_layer_interval=4),
    "granite": _tiny("Granite 3", "granite", embedding_multiplier=2.0, logits_scaling=4.0, residual_multiplier=0.5,
                     attention_multiplier=0.3),
    "olmo": _tiny("OLMo", "olmo"),
    "olmo2": _tiny("OLMo 2", "olmo2"),
    "olmo3": _tiny("OLMo 3", "olmo3", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "olmo_hybrid": _tiny("OLMo Hybrid", "olmo_hybrid", **DELTA_NET, layer_types=["linear_attention"] * 3 + ["full_attention"]),
    "glm": _tiny("GLM-4 9B", "glm", head_dim=16, partial_rotary_factor=0.5),
    "glm4": _tiny("GLM-4-0414", "glm4", head_dim=16, partial_rotary_factor=0.5),
    "lfm2": _tiny("LFM2", "lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, block_ff_dim=128,
                  block_multiple_of=64, block_auto_adjust_ff_dim=False),
    "gpt2": Tiny("GPT-2", "gpt2", GPT2_DRY),
    "gptj": Tiny("GPT-J", "gptj", GPT2_DRY | {"rotary_dim": 8}),
    "gpt_neo": Tiny("GPT-Neo", "gpt_neo", OLD | {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "window_size": WINDOW,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512}),
    "gpt_neox": _tiny("Pythia, GPT-NeoX", "gpt_neox"),
    "gpt_bigcode": Tiny("StarCoder", "gpt_bigcode", GPT2_DRY),
    "codegen": Tiny("CodeGen", "codegen", GPT2_DRY | {"rotary_dim": 8, "n_ctx": 512}),
    "opt": _tiny("OPT", "opt", ffn_dim=128, word_embed_proj_dim=64, dropout=0.0),
    "bloom": Tiny("BLOOM", "bloom", OLD | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": Tiny("MPT", "mpt", OLD | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2}),
    "falcon": _tiny("Falcon 7B", "falcon", alibi=False),
    "falcon_alibi": _tiny("Falcon RW", "falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "persimmon": _tiny("Persimmon", "persimmon"),
    "biogpt": _tiny("BioGPT", "biogpt", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "xglm": Tiny("XGLM", "xglm", OLD | {
        "pad_token_id": 1, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "dropout": 0.0,
        "attention_dropout": 0.0, "max_position_embeddings": 512}),
    "starcoder2": _tiny("StarCoder2", "starcoder2", sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0),
    "stablelm": _tiny("StableLM 2", "stablelm", partial_rotary_factor=0.25, use_qkv_bias=True),
    "cohere": _tiny("Command R, Aya", "cohere", logit_scale=0.25, tie_word_embeddings=True),
    "cohere2": _tiny("Command R7B", "cohere2", logit_scale=0.25, tie_word_embeddings=True, **WINDOWS),
    "ernie4_5": _tiny("ERNIE 4.5", "ernie4_5", head_dim=16, use_bias=True),
    "hunyuan_v1_dense": _tiny("Hunyuan", "hunyuan_v1_dense", head_dim=16),
    "nemotron": _tiny("Nemotron-4, Minitron", "nemotron", partial_rotary_factor=0.5),
    "exaone": _tiny("EXAONE 3.5", "exaone"),
    "exaone4": _tiny("EXAONE 4", "exaone4", **WINDOWS),
    "minicpm3": _tiny("MiniCPM3", "minicpm3", **{key: size for key, size in DEEPSEEK.items() if key not in ROUTED}),
    "internlm3": _tiny("InternLM3", "internlm3", head_dim=16),
    "seed_oss": _tiny("Seed-OSS", "seed_oss", head_dim=16, residual_dropout=0.0, attention_dropout=0.0),
    "bitnet": _tiny("BitNet", "bitnet"),
    "helium": _tiny("Helium", "helium", head_dim=16),
    "arcee": _tiny("Arcee AFM", "arcee", head_dim=16),
    "apertus": _tiny("Apertus", "apertus"),
    "nanochat": _tiny("nanochat", "nanochat"),
    "hyperclovax": _tiny("HyperCLOVA X SEED", "hyperclovax"),
    "diffllama": _tiny("DiffLlama", "diffllama"),
    "jais2": _tiny("Jais 2", "jais2"),
    "doge": _tiny("Doge", "doge"),
    "qwen2_moe": _tiny("Qwen1.5-MoE, Qwen2-MoE", "qwen2_moe", shared_expert_intermediate_size=64, **EXPERTS),
    "qwen3_moe": _tiny("Qwen3-30B-A3B, Qwen3-Coder", "qwen3_moe", head_dim=16, **EXPERTS),
    "qwen3_next": _tiny("Qwen3-Next", "qwen3_next", shared_expert_intermediate_size=64, **DELTA_NET, **EXPERTS),
    "qwen3_5_moe_text": _tiny("Qwen3.5-35B-A3B (text)", "qwen3_5_moe_text", shared_expert_intermediate_size=64, **DELTA_NET,
                              **EXPERTS),
    "mixtral": _tiny("Mixtral", "mixtral", **LOCAL_EXPERTS),
    "gpt_oss": _tiny("gpt-oss", "gpt_oss", **WINDOWS, **LOCAL_EXPERTS),
    "olmoe": _tiny("OLMoE", "olmoe", num_experts=4, num_experts_per_tok=2),
    "flex_olmo": _tiny("FlexOlmo", "flex_olmo", num_experts=4, num_experts_per_tok=2),
    "granitemoe": _tiny("Granite 3 MoE", "granitemoe", **LOCAL_EXPERTS),
    "granitemoeshared": _tiny("Granite MoE, shared expert", "granitemoeshared", shared_intermediate_size=64, **LOCAL_EXPERTS),
    "granitemoehybrid": _tiny("Granite 4", "granitemoehybrid", shared_intermediate_size=64, layer_types=["mamba", "attention"],
                              position_embedding_type="nope", mamba_expand=2, **LOCAL_EXPERTS, **MAMBA2),
    "deepseek_v2": _tiny("DeepSeek-V2", "deepseek_v2", **DEEPSEEK | {"q_lora_rank": None}),
    "deepseek_v3": _tiny("DeepSeek-V3, R1", "deepseek_v3", **DEEPSEEK),
    "glm4_moe": _tiny("GLM-4.5, GLM-4.6", "glm4_moe", head_dim=16, partial_rotary_factor=0.5, **ROUTED),
    "glm4_moe_lite": _tiny("GLM-4.7-Flash", "glm4_moe_lite", **DEEPSEEK),
    "ernie4_5_moe": _tiny("ERNIE 4.5 MoE", "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=64,
                          moe_layer_start_index=1, moe_num_shared_experts=1),
    "hunyuan_v1_moe": _tiny("Hunyuan A13B", "hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2),
    "phimoe": _tiny("Phi-3.5-MoE", "phimoe", **LOCAL_EXPERTS),
    "llama4_text": _tiny("Llama 4 (text)", "llama4_text", head_dim=16, num_local_experts=4, num_experts_per_tok=1,
                         interleave_moe_layer_step=2, intermediate_size_mlp=128, attention_chunk_size=WINDOW),
    "dots1": _tiny("dots.llm1", "dots1", head_dim=16, **ROUTED),
    "minimax_m2": _tiny("MiniMax-M2", "minimax_m2", head_dim=16, **LOCAL_EXPERTS),
    "lfm2_moe": _tiny("LFM2-8B-A1B", "lfm2_moe", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2,
                      num_dense_layers=2, **EXPERTS),
    "mamba": Tiny("Mamba", "mamba", OLD | {"hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "time_step_rank": 64}),
    "mamba2": Tiny("Mamba 2", "mamba2", OLD | {"hidden_size": 64, "state_size": 16, "num_hidden_layers": 2, "num_heads": 8,
                                               "head_dim": 16, "n_groups": 1}),
    "falcon_mamba": Tiny("Falcon Mamba", "falcon_mamba", OLD | {"hidden_size": 64, "state_size": 16, "num_hidden_layers": 2,
                                                              "time_step_rank": 64}),
    "falcon_h1": _tiny("Falcon-H1", "falcon_h1", head_dim=16, mamba_d_ssm=128, **MAMBA2),
    "jamba": _tiny("Jamba", "jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                   num_experts=4, mamba_d_state=16, mamba_dt_rank=64, use_mamba_kernels=False),
    "bamba": _tiny("Bamba", "bamba", attn_layer_indices=[1], mamba_expand=2, **MAMBA2),
    "nemotron_h": _tiny("Nemotron-H, Nemotron Nano 2", "nemotron_h", hybrid_override_pattern="M*-", num_hidden_layers=3,
                        head_dim=16, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1),
    "recurrent_gemma": _tiny("RecurrentGemma", "recurrent_gemma", num_hidden_layers=3, attention_window_size=WINDOW, lru_width=64,
                             tie_word_embeddings=True),
}  # fmt: skip

SPECIAL = ("A_log", "dt_bias", ".D", "conv1d", "e_score", "recurrent_param")  # vectors that random values would make unstable


def build(name: str, folder: Path) -> None:
    """Write a tiny model and its tokenizer into a new folder; weights are the same every time.

    Raises:
        ValueError: this version of transformers has no such architecture.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    tiny = MODELS[name]
    if tiny.kind not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no {tiny.kind}")
    torch.manual_seed(0)
    # Models with a vision tower are published whole.
    auto = AutoModelForImageTextToText if "vision_config" in tiny.sizes else AutoModelForCausalLM
    model = auto.from_config(CONFIG_MAPPING[tiny.kind](**tiny.sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not any(part in parameter_name for part in SPECIAL):
                _randomize(parameter_name, parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def _randomize(name, parameter) -> None:
    """Make every part of a model matter: fresh models have norms of one, biases of zero and logits that hardly differ."""
    if parameter.dim() < 2:
        parameter.add_(0.2 * parameter.new_empty(parameter.shape).normal_())
    else:
        parameter.normal_(std=0.1 if "emb" in name or "wte" in name else 0.8 * parameter.shape[-1] ** -0.5)


if __name__ == "__main__":
    for each in sys.argv[2:] or MODELS:
        build(each, Path(sys.argv[1], each))
