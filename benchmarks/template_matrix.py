"""Which chat templates work: what is trained of each kind of conversation, checked token by token.

    python benchmarks/template_matrix.py FOLDER                       all templates of the folder that PUBLIC names
    python benchmarks/template_matrix.py FOLDER --only trl-qwen3      some, also others than those
    python benchmarks/template_matrix.py FOLDER --json rows.json --page docs/models.md     keep the rows, and write the table

FOLDER holds .jinja files, which are not part of this repository: of models/templates in ggml-org/llama.cpp under their own names,
and under `trl-`, `axolotl-` and `chat_templates-` of trl/chat_templates in huggingface/trl, of
src/axolotl/utils/chat_templates/templates in axolotl-ai-cloud/axolotl, and of chat_templates in chujiezheng/chat_templates.

The tokenizer is the embedded model's, a byte-level BPE, with the template's control tokens added and the public model's beginning
and end of a text. The reference is `apply_chat_template` of transformers alone: an answer is what it writes beyond the prompt for
that answer, up to the token that ends it in the public model. A conversation is `ok` if

    the trained tokens, decoded, are exactly those answers with their ends;
    the tokens before each answer are those of its prompt, at inference and from apply_chat_template;
    all tokens are those of apply_chat_template(tokenize=True); and the end is among the tokens that stop an answer.

`last` works with data.train_on: last; `refused` ends in one line that says why. Anything else is wrong.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matrix_run
from matrix_run import Row, shorten
from tiny_models import TOKENIZER

CONTROL = re.compile(
    r"<\|[^\s|<>'\"{}]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z][A-Z_]{2,}\]|\[\|[a-z]+\|\]|\[gMASK\]|<sop>"
    r"|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|</?seed:[a-z_]+>|<SPECIAL_\d+>|\]~!?b\[?\]?|\[e~\["
)
WORDS = re.compile(r"</?(?:think|thinking|tool_call|tool_response|tools)>|<｜(?:User|Assistant)｜>")  # added, but not special


class Public(NamedTuple):
    """A public model: its name, the tokens that begin and end a text, and the one that ends an answer (None: the same)."""

    name: str
    bos: str | None
    eos: str
    end: str | None = None


def _family(bos: str | None, eos: str, end: str | None, files: dict[str, str]) -> dict[str, Public]:
    return {file: Public(name, bos, eos, end) for file, name in files.items()}


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
        "llama-cpp-microsoft-Phi-4-mini-instruct": "Phi-4-mini"}),
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
        "axolotl-deepseek_v2": "DeepSeek-V2", "trl-deepseekv3": "DeepSeek-V3", "deepseek-ai-DeepSeek-V3.1": "DeepSeek-V3.1",
        "deepseek-ai-DeepSeek-V3.2": "DeepSeek-V3.2", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "DeepSeek-R1-Distill-Llama",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "DeepSeek-R1-Distill-Qwen"}),
    **_family("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", None, {
        "trl-cohere": "Command R", "axolotl-aya": "Aya", "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "Command R7B",
        "axolotl-command_a": "Command A", "CohereForAI-c4ai-command-r-plus-tool_use": "Command R+ (tools)"}),
    **_family("<|end_of_text|>", "<|end_of_text|>", None, {
        "chat_templates-granite-3.0-instruct": "Granite 3.0", "ibm-granite-granite-3.3-2B-Instruct": "Granite 3.3",
        "ibm-granite-granite-4.0": "Granite 4.0", "ibm-granite-granite-4.1": "Granite 4.1"}),
    **_family(None, "<|endoftext|>", "<|user|>", {
        "trl-glm4moe": "GLM-4.5", "GLM-4.6": "GLM-4.6", "GLM-4.7-Flash": "GLM-4.7-Flash"}),
    **_family("<|startoftext|>", "<|return|>", None, {"openai-gpt-oss-120b": "gpt-oss"}),
    **_family("[BOS]", "[EOS]", "<|im_end|>", {"moonshotai-Kimi-K2": "Kimi K2", "Kimi-K2-Thinking": "Kimi K2 Thinking"}),
    **_family("<seed:bos>", "<seed:eos>", None, {"ByteDance-Seed-OSS": "Seed-OSS"}),
    **_family("[BOS]", "[|endofturn|]", None, {"axolotl-exaone": "EXAONE 3.5", "axolotl-exaone4": "EXAONE 4"}),
    **_family("<s>", "<SPECIAL_12>", None, {"NVIDIA-Nemotron-Nano-v2": "Nemotron Nano 2"}),
    **_family("]~!b[", "[e~[", None, {"MiniMax-M2": "MiniMax-M2"}),
    **_family("<s>", "<|end|>", None, {"unsloth-Apriel-1.5": "Apriel 1.5", "upstage-Solar-Open-100B": "Solar Open"}),
}  # fmt: skip

U, A, THOUGHT = "Which {} is the oldest?", "The {} by the sea.", "They ask about a {}."
CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"place": "Rome"}}}
PLACE = {"type": "object", "properties": {"place": {"type": "string", "description": "Its name."}}, "required": ["place"]}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks up a place.", "parameters": PLACE}}


def conversations() -> dict[str, dict[str, Any]]:
    """Return a record of each kind."""

    def user(word: str) -> dict[str, Any]:
        return {"role": "user", "content": U.format(word)}

    def answer(word: str, thought: bool = False) -> dict[str, Any]:
        turn = {"role": "assistant", "content": A.format(word)}
        return turn | {"reasoning_content": THOUGHT.format(word)} if thought else turn

    system = {"role": "system", "content": "Be brief."}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "name": "look_up", "tool_call_id": CALL["id"], "content": "Founded in 753."}
    three = [turn for word in ("tower", "bridge", "harbour") for turn in (user(word), answer(word))]
    return {
        "single turn": {"messages": three[:2]},
        "several turns": {"messages": three},
        "system": {"messages": [system, *three[:4]]},
        "thoughts": {"messages": [user("tower"), answer("tower", True)]},
        "thoughts, several": {"messages": [user("tower"), answer("tower", True), user("bridge"), answer("bridge", True)]},
        "tools": {"messages": [user("tower"), called, result, answer("tower")], "tools": [TOOL]},
        "no answer": {"messages": three[:3]},
    }


def build_tokenizer(template: str, public: Public) -> Any:
    """Return the embedded model's tokenizer with a template and the control tokens that it writes or names."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = template
    control = [public.bos, public.eos, public.end, *CONTROL.findall(template)]
    words = WORDS.findall(template)
    _add(tokenizer, control, words)
    tokenizer.bos_token, tokenizer.eos_token = public.bos, public.eos
    for record in conversations().values():  # some templates put tokens together: '<|' + role + '|>'
        if text := render(tokenizer, record):
            _add(tokenizer, CONTROL.findall(text), WORDS.findall(text))
    if public.bos:
        begin = [("BOS", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("BOS $A", special_tokens=begin)
    return tokenizer


def _add(tokenizer: Any, control: list[str | None], words: list[str]) -> None:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for tokens, special in ((control, True), (words, False)):
        new = [token for token in dict.fromkeys(tokens) if token and token not in known]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in new], special_tokens=special)


def render(tokenizer: Any, record: dict[str, Any], turns: int | None = None, **options: Any) -> Any:
    """Return what apply_chat_template makes of the first turns of a record; None if the template refuses them."""
    messages = record["messages"][:turns]
    try:
        return tokenizer.apply_chat_template(
            messages, tools=record.get("tools"), **{"tokenize": False, "return_dict": False} | options
        )
    except Exception:
        return None


def check_template(stem: str, folder: Path, work: Path) -> Row:
    """Return the row of a template: an outcome for each kind of conversation."""
    public = PUBLIC.get(stem, Public(stem, None, "<|endoftext|>"))
    tokenizer = build_tokenizer((folder / f"{stem}.jinja").read_text(encoding="utf-8"), public)
    row: Row = {"name": public.name, "cases": {}, "wrong": []}
    for kind, record in conversations().items():
        outcome = check_record(kind, record, tokenizer, public, work)
        if outcome.startswith("refused") and "data.train_on" in outcome:
            last = check_record(kind, record, tokenizer, public, work, "last")
            outcome = f"last: {last}" if last != "ok" else "last"
        row["cases"][kind] = outcome
        if not re.fullmatch(r"ok|last|(last: )?refused.*|not written", outcome):
            row["wrong"].append(f"{kind}: {outcome}")
    return row


def check_record(
    kind: str, record: dict[str, Any], tokenizer: Any, public: Public, work: Path, train_on: str = "assistant"
) -> str:
    """Return the outcome of a conversation: ok, refused with the line, or what is wrong."""
    from qlora_kit.config import Config
    from qlora_kit.config_file import override
    from qlora_kit.data.dataset import load_blocks
    from qlora_kit.errors import UserError

    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{kind.replace(', ', '_').replace(' ', '_')}.jsonl"
    file.write_text(json.dumps(record), encoding="utf-8")
    settings = {"data.dataset": str(file), "data.subset": None, "data.eval_split": None, "data.max_length": 4096}
    try:
        blocks: Any = load_blocks(override(Config(), settings | {"data.train_on": train_on}), tokenizer)[0]
    except UserError as error:
        return f"refused: {str(error).split('line 1: ')[-1]}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    encoded = [blocks.record(number) for number in range(len(blocks.stored))]
    return next(find_faults(encoded, record, tokenizer, public, train_on), "ok")


def find_faults(encoded: list[Any], record: dict[str, Any], tokenizer: Any, public: Public, train_on: str) -> Iterator[str]:
    """Yield what is wrong with the tokens of a conversation."""
    turns = record["messages"]
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if turns[-1]["role"] != "assistant":
        yield "trained, though no answer follows the last turn"
        return
    wanted, found = answers[-1:] if train_on == "last" else answers, []
    for each in encoded:
        ids = each.ids.tolist()
        if ids not in (whole := [render(tokenizer, record, number + 1, tokenize=True) for number in answers]):
            yield f"other tokens than apply_chat_template: {describe_difference(ids, whole[-1], tokenizer)}"
        for start, stop in spans_of(each.trained):
            number = next((n for n in answers if n not in found and _fits(n, ids[:start], record, tokenizer)), None)
            if number is None:
                yield f"trained behind no prompt: ...{tokenizer.decode(ids[max(start - 6, 0) : start])!r}"
                continue
            found.append(number)
            yield from _check_answer(number, ids[start:stop], record, tokenizer, public)
            yield from _check_inference(number, ids[:start], record, tokenizer, train_on)
    if sorted(found) != wanted:
        yield f"trains answers {found}, expected {wanted}"


def spans_of(trained: Any) -> list[tuple[int, int]]:
    """Return the first token of each trained stretch, and the one after its last."""
    edges = [0, *(int(at) for at in (trained[1:] != trained[:-1]).nonzero()[0] + 1), len(trained)]
    return [(a, b) for a, b in pairwise(edges) if trained[a]]


def _fits(number: int, prompt: list[int], record: dict[str, Any], tokenizer: Any) -> bool:
    """Return whether tokens are the prompt for an answer, as apply_chat_template gives it."""
    return render(tokenizer, record, number, add_generation_prompt=True, tokenize=True) == prompt


def _check_answer(number: int, ids: list[int], record: dict[str, Any], tokenizer: Any, public: Public) -> Iterator[str]:
    """Yield how the trained tokens differ from what the template writes behind the prompt."""
    turn, trained = record["messages"][number], tokenizer.decode(ids)
    prompt = render(tokenizer, record, number, add_generation_prompt=True)
    whole = render(tokenizer, record, number + 1)
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
        end = public.end or public.eos
        expected = rest[: rest.rindex(end) + len(end)] if end in rest else rest.rstrip()
        if trained != expected:
            yield f"trains {trained!r}, expected {expected!r}"
    elif turn["content"] and turn["content"] not in trained:
        yield f"trains {trained!r} for {turn['content']!r}"
    thought = turn.get("reasoning_content", "")
    if thought and thought not in trained:
        yield "thoughts are left out"


def _check_inference(number: int, prompt: list[int], record: dict[str, Any], tokenizer: Any, train_on: str) -> Iterator[str]:
    """Yield whether another prompt is given, or no token stops the answer, at inference."""
    from qlora_kit.data.chat_template import find_stop_ids
    from qlora_kit.inference.prompts import PromptEncoder

    stop_ids = find_stop_ids(tokenizer, "chat")
    if "tools" not in record:
        encoder: Any = PromptEncoder(tokenizer, "chat", stop_ids, train_on)  # type: ignore[arg-type]
        given = encoder.encode_chat(record["messages"][:number])
        if given != prompt:
            yield f"another prompt at inference: {describe_difference(given, prompt, tokenizer)}"


def describe_difference(found: list[int], expected: list[int], tokenizer: Any) -> str:
    """Return the tokens around the first difference."""
    at = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    near = slice(max(at - 2, 0), at + 3)
    return f"{tokenizer.convert_ids_to_tokens(found[near])}, expected {tokenizer.convert_ids_to_tokens(expected[near])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with .jinja files")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="files, without .jinja")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to those of this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the rows, and those of --json, into this page")
    arguments = parser.parse_args()
    names = arguments.only or [name for name in PUBLIC if (arguments.folder / f"{name}.jinja").exists()]
    with tempfile.TemporaryDirectory() as temporary:
        work, folder = Path(temporary), arguments.folder.resolve()
        matrix_run.prepare(work)
        from transformers import AutoTokenizer  # noqa: F401  once, before forking

        from qlora_kit.data import dataset  # noqa: F401

        checks = {name: partial(check_template, name, folder, work / name) for name in names}
        rows = matrix_run.run_rows(checks, work, 60)
    rows = matrix_run.update_json(arguments.json, rows)
    print("\n".join(table(rows)))
    if arguments.page:
        command = f"python benchmarks/template_matrix.py FOLDER --json {arguments.json or 'rows.json'} --page {arguments.page}"
        text = [matrix_run.describe_run(command, ("transformers", "tokenizers", "jinja2")), "", *summary(rows), "", *table(rows)]
        matrix_run.write_section(arguments.page, "template matrix", "\n".join(text))
    sys.exit(any(row["wrong"] for row in rows.values()))


def summary(rows: dict[str, Row]) -> list[str]:
    """Return the counts of the table in words."""
    outcomes = [outcome for row in rows.values() for outcome in row.get("cases", {}).values()]
    refused = sum("refused" in outcome for outcome in outcomes)
    wrong = sum(len(row["wrong"]) for row in rows.values())
    return [f"{len(rows)} templates, {len(outcomes)} conversations: {refused} refused, {wrong} wrong."]


def table(rows: dict[str, Row]) -> list[str]:
    """Return the rows as a Markdown table, and the lines of the refusals below it."""
    kinds = list(conversations())
    lines = [f"| template of | file | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 2)]
    for name, row in rows.items():
        cells = [row.get("cases", {}).get(kind, "") for kind in kinds] if "cases" in row else [f"**{row['wrong'][0]}**"]
        marked = [cell if re.match(r"(ok|last|refused)", cell) else f"**{cell}**" for cell in cells]
        lines.append(f"| {row.get('name', name)} | {name} | {' | '.join(shorten(cell, 120) for cell in marked)} |")
    return lines


if __name__ == "__main__":
    main()
