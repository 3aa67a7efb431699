"""README.md of an adapter's folder: a model card, as the Hugging Face Hub shows it, from the content of run.json."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from qlora_kit.errors import spell_out
from qlora_kit.output.folder import CURVES, replace_text
from qlora_kit.secrets import redact
from qlora_kit.untrusted import read_regular_file

CARD = "README.md"
MARK = "<!-- Written by qlora-kit, which replaces this file with the next run unless you delete this line. -->"
ANSWERS = "It answers like its training data, and knows little beyond the base model."
STYLES = {  # of each prompt style: what the adapter does, its limit, and the prompt of the example as Python writes it
    "text": (
        "continues text",
        "It continues texts like those it read, and answers no questions.",
        '" = River = \\n \\n A river is"',
    ),
    "chat": ("answers in the base model's chat template", ANSWERS, ""),
    "instruction": ("answers `### Instruction:` texts", ANSWERS, '"### Instruction:\\nName a color.\\n\\n### Response:\\n"'),
}
PAGE = """{front}
{mark}

# A LoRA adapter for {base}

Trained with QLoRA on {data}. It {does}. `run.json` has every setting, `training_log.txt` every step.

| | |
|---|---|
{rows}

## What it learned

{learned}

![Loss, learning rate and speed by step]({curves})

## How to load it

In this folder, with the toolkit that trained it:

```bash
qlora chat --adapter .
```

With peft; `AutoModelForCausalLM` of transformers takes the same arguments, where peft is installed:

```python
{program}
```

## Limits

- {limit} Perplexity was measured on data like those of the training; nothing else was.
- Errors and biases of the base model and of the data remain, and their licences hold for the adapter, too.
- It was trained on weights of the precision above: on others, and after merging, answers differ slightly.
"""


def write_model_card(folder: Path, run: dict[str, Any], place: Path) -> None:
    """Write the card of a run into a folder, unless the place that its files move to has a README.md of the user's.

    Args:
        run: the content of run.json.
    """
    if not os.path.lexists(place / CARD) or _is_ours(place / CARD):
        replace_text(folder / CARD, redact(describe(run)))


def _is_ours(path: Path) -> bool:
    try:
        return MARK.encode() in read_regular_file(path)
    except (OSError, ValueError):
        return False


def describe(run: dict[str, Any]) -> str:
    """Return the card: what was trained, on what and how, what it learned, how to load it, its limits."""
    does, limit, prompt = STYLES[run["prompt_style"]]
    return PAGE.format(
        front=_front_matter(run), mark=MARK, base=_short(run["base_model"]["name"]), data=", ".join(map(_short, _sources(run))),
        does=does, rows="\n".join(f"| {key} | {text} |" for key, text in _rows(run).items()), curves=CURVES, limit=limit,
        learned=_describe_perplexity(run["perplexity"]), program=_program(run, prompt),
    )  # fmt: skip


def _sources(run: dict[str, Any]) -> list[str]:
    source = run["data"]["source"]
    return [source] if isinstance(source, str) else source


def _front_matter(run: dict[str, Any]) -> str:
    """Return the YAML that the Hub reads; a JSON string is YAML. What has no name there is left out."""
    base, tags = run["base_model"], ["qlora", "lora"]
    lines = ["library_name: peft", "pipeline_tag: text-generation"]
    if base["folder"] is None:
        lines.append(f"base_model: {json.dumps(base['name'])}")
        tags.append(f"base_model:adapter:{base['name']}")
    if hub := [name for name in _sources(run) if _is_hub_name(name) and not os.path.exists(name)]:
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in hub)]
    return "\n".join(["---", *lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _rows(run: dict[str, Any]) -> dict[str, str]:
    config, data, quantization, reach = run["config"], run["data"], run["quantization"], run["projections"]
    lora, training = config["lora"], config["training"]
    bits = f"4-bit {quantization['quant_type'].upper()}" if quantization["load_in_4bit"] else "16-bit"
    double = " with double quantization" if quantization["load_in_4bit"] and quantization["use_double_quant"] else ""
    return {
        "base model": (f"commit {run['base_commit']}, " if run["base_commit"] else "")
        + f"weights {str(run['base_weights_sha256'])[:12]}, {bits}{double}, computing in {quantization['compute_dtype']}",
        "data": f"{data['train_blocks']:,} blocks of at most {config['data']['max_length']} tokens",
        "LoRA": f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, "
        f"on {reach['with_lora']} of {reach['projections']} projections",
        "training": f"{run['optimizer_steps']:,} steps of {training['batch_size'] * training['gradient_accumulation_steps']} "
        f"sequences, learning rate {training['learning_rate']:g} ({training['lr_scheduler']}), seed {run['seed']}; "
        f"{timedelta(seconds=round(run['seconds']))} on {spell_out(run['hardware'][0]).removeprefix('Device: ')}",
        "versions": ", ".join(f"{package} {version}" for package, version in run["versions"].items()),
    }


def _describe_perplexity(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "Not measured: the run had no evaluation data."
    rows = ["| | perplexity |", "|---|---|"]
    for whose, one in (("base model", measured["base"]), ("with the adapter", measured["adapter"])):
        error = one.get("standard_error")
        rows.append(f"| {whose} | {one['perplexity']:.3f}{'' if error is None else f' ± {error:.3f}'} |")
    worse = "" if measured["adapter"]["loss"] < measured["base"]["loss"] else " **It is no better than the base model.**"
    return "\n".join([*rows, "", f"It is {spell_out(measured['definition'])}.{worse}"])


def _program(run: dict[str, Any], prompt: str) -> str:
    """Return the program that loads base model and adapter in the precision of the training, and generates."""
    quantization, dtype = run["quantization"], run["quantization"]["compute_dtype"]
    pack = quantization["load_in_4bit"] and not run["base_quantization"]  # else it is packed already, or was not
    options = "quantization_config=packing, " * pack + f'dtype="{dtype}", device_map="auto"'
    options += ", trust_remote_code=True" * run["trust_remote_code"]
    lines = [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer" + ", BitsAndBytesConfig" * pack,
        "",
    ]
    if pack:
        lines += [
            "packing = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="{quantization["quant_type"]}", bnb_4bit_compute_dtype="{dtype}",',
            f"    bnb_4bit_use_double_quant={quantization['use_double_quant']},",
            ")",
        ]
    lines += [
        f'model = AutoPeftModelForCausalLM.from_pretrained(".", {options})  # this folder',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]
    if prompt:
        lines.append(f'inputs = tokenizer({prompt}, return_tensors="pt")')
    else:
        lines += [
            'messages = [{"role": "user", "content": "What is a river?"}]',
            'form = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
            "inputs = tokenizer.apply_chat_template(messages, **form)",
        ]
    lines += [
        "answer = model.generate(**inputs.to(model.device), max_new_tokens=64)",
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _short(name: str) -> str:
    """Return the Hub's name as it is, and of a path its last part, for a card is made to be published; as code."""
    short = name if _is_hub_name(name) else name.rstrip("/").rpartition("/")[2] or name
    return f"`{spell_out(short).replace('`', '')}`"
