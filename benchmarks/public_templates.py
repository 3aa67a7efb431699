"""The public models whose chat templates template_matrix.py checks: the files, and the tokens that their tokenizers have.

The files are not part of this repository. They were copied from these, under these names:

    models/templates of ggml-org/llama.cpp            their own
    trl/chat_templates of huggingface/trl             trl-...
    src/axolotl/utils/chat_templates/templates of axolotl-ai-cloud/axolotl      axolotl-...
    chat_templates of chujiezheng/chat_templates      chat_templates-...
"""

from typing import NamedTuple


class Public(NamedTuple):
    """A public model: its name, the tokens that begin and end a text, and those that end an answer (none: the same)."""

    name: str
    bos: str | None
    eos: str
    ends: tuple[str, ...] = ()


def _family(bos: str | None, eos: str, ends: str | None, files: dict[str, str]) -> dict[str, Public]:
    return {file: Public(name, bos, eos, tuple(ends.split()) if ends else ()) for file, name in files.items()}


PUBLIC: dict[str, Public] = {
    **_family("<|begin_of_text|>", "<|eot_id|>", None, {
        "trl-llama3": "Llama 3", "meta-llama-Llama-3.1-8B-Instruct": "Llama 3.1", "meta-llama-Llama-3.2-3B-Instruct": "Llama 3.2",
        "meta-llama-Llama-3.3-70B-Instruct": "Llama 3.3", "fireworks-ai-llama-3-firefunction-v2": "Firefunction v2",
        "meetkai-functionary-medium-v3.1": "Functionary v3.1"}),
    **_family("<|begin_of_text|>", "<|eot|>", None, {"axolotl-llama4": "Llama 4"}),
    **_family("<|begin_of_text|>", "<|im_end|>", None, {"NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "Hermes 3 (tools)"}),
    **_family("<s>", "</s>", None, {
        "chat_templates-llama-2-chat": "Llama 2 Chat", "axolotl-mistral_v1": "Mistral 7B v0.1",
        "axolotl-mistral_v2v3": "Mistral 7B v0.3",
        "mistralai-Mistral-Nemo-Instruct-2407": "Mistral Nemo", "axolotl-mistral_v7_tekken": "Mistral Small 3",
        "Mistral-Small-3.2-24B-Instruct-2506": "Mistral Small 3.2", "unsloth-mistral-Devstral-Small-2507": "Devstral Small",
        "mistralai-Ministral-3-14B-Reasoning-2512": "Ministral 3 Reasoning", "chat_templates-zephyr": "Zephyr",
        "chat_templates-vicuna": "Vicuna", "chat_templates-solar-instruct": "SOLAR", "chat_templates-alpaca": "Alpaca",
        "chat_templates-amberchat": "AmberChat"}),
    **_family("<s>", "<|im_end|>", None, {"Bielik-11B-v3.0-Instruct": "Bielik v3"}),
    **_family("<s>", "<|end_of_turn|>", None, {"chat_templates-openchat-3.5": "OpenChat 3.5"}),
    **_family("<s>", "<|assistant_end|>", None, {"Apertus-8B-Instruct": "Apertus"}),
    **_family("<s>", "<|message_sep|>", None, {"GigaChat3-10B-A1.8B": "GigaChat 3"}),
    **_family("<bos>", "<eos>", "<end_of_turn>", {
        "google-gemma-2-2b-it": "Gemma 2", "trl-gemma3": "Gemma 3", "axolotl-gemma3n": "Gemma 3n"}),
    **_family("<bos>", "<eos>", "<turn|>", {"google-gemma-4-31B-it": "Gemma 4"}),
    **_family("<s>", "<|endoftext|>", "<|end|>", {
        "trl-phi3": "Phi-3", "microsoft-Phi-3.5-mini-instruct": "Phi-3.5",
        "llama-cpp-microsoft-Phi-4-mini-instruct": "Phi-4-mini, as llama.cpp has it"}),
    **_family("<|endoftext|>", "<|im_end|>", None, {"axolotl-phi_4": "Phi-4"}),
    **_family(None, "<|im_end|>", None, {
        "Qwen-Qwen2.5-7B-Instruct": "Qwen2.5", "Qwen-Qwen3-0.6B": "Qwen3", "trl-qwen3_instruct_2507": "Qwen3-2507",
        "Qwen3-Coder": "Qwen3-Coder", "Qwen3.5-4B": "Qwen3.5", "trl-qwen3_6": "Qwen3.6", "Qwen-QwQ-32B": "QwQ",
        "trl-qwen3_training": "Qwen3, as TRL trains it", "chat_templates-chatml": "ChatML (SmolLM2, Yi, many bases)",
        "HuggingFaceTB-SmolLM3-3B": "SmolLM3", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "Nemotron 3 Nano",
        "axolotl-nemotron_h": "Nemotron-H", "MiMo-VL": "MiMo", "MiroThinker": "MiroThinker",
        "StepFun3.5-Flash": "Step 3.5 Flash"}),
    **_family("<|begin_of_text|>", "<|im_end|>", None, {"NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "Hermes 2 Pro (tools)"}),
    **_family("<|startoftext|>", "<|im_end|>", None, {"LFM2-8B-A1B": "LFM2", "LFM2.5-Instruct": "LFM2.5"}),
    **_family("<|startoftext|>", "<|eom|>", None, {"axolotl-jamba": "Jamba"}),
    **_family("<|begin_of_text|>", "<|im_end|>", None, {"axolotl-falcon_h1": "Falcon-H1"}),
    **_family(None, "<|endoftext|>", None, {"chat_templates-falcon-instruct": "Falcon Instruct"}),
    **_family("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", None, {
        "axolotl-deepseek_v2": "DeepSeek-V2", "axolotl-deepseek_v3": "DeepSeek-V3",
        "trl-deepseekv3": "DeepSeek-V3 and R1, as TRL has them", "deepseek-ai-DeepSeek-V3.1": "DeepSeek-V3.1",
        "deepseek-ai-DeepSeek-V3.2": "DeepSeek-V3.2", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "DeepSeek-R1-Distill-Llama",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "DeepSeek-R1-Distill-Qwen"}),
    **_family("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", None, {
        "trl-cohere": "Command R", "axolotl-aya": "Aya", "trl-cohere2": "Command R7B",
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "Command R7B (tools)",
        "axolotl-command_a": "Command A", "CohereForAI-c4ai-command-r-plus-tool_use": "Command R+ (tools)"}),
    **_family("<|end_of_text|>", "<|end_of_text|>", None, {
        "chat_templates-granite-3.0-instruct": "Granite 3.0", "ibm-granite-granite-3.3-2B-Instruct": "Granite 3.3",
        "ibm-granite-granite-4.0": "Granite 4.0", "ibm-granite-granite-4.1": "Granite 4.1"}),
    **_family(None, "<|endoftext|>", "<|user|> <|observation|>", {
        "trl-glm4moe": "GLM-4.5", "GLM-4.6": "GLM-4.6", "GLM-4.7-Flash": "GLM-4.7-Flash"}),
    **_family("<|startoftext|>", "<|return|>", "<|return|> <|call|>", {"openai-gpt-oss-120b": "gpt-oss"}),
    **_family("[BOS]", "[EOS]", "<|im_end|>", {"moonshotai-Kimi-K2": "Kimi K2", "Kimi-K2-Thinking": "Kimi K2 Thinking"}),
    **_family("<seed:bos>", "<seed:eos>", None, {"ByteDance-Seed-OSS": "Seed-OSS"}),
    **_family("[BOS]", "[|endofturn|]", None, {"axolotl-exaone": "EXAONE 3.5", "axolotl-exaone4": "EXAONE 4"}),
    **_family("<s>", "<SPECIAL_12>", None, {"NVIDIA-Nemotron-Nano-v2": "Nemotron Nano 2"}),
    **_family("]~!b[", "[e~[", None, {"MiniMax-M2": "MiniMax-M2"}),
    **_family("<s>", "<|end|>", None, {"unsloth-Apriel-1.5": "Apriel 1.5", "upstage-Solar-Open-100B": "Solar Open"}),
}  # fmt: skip
