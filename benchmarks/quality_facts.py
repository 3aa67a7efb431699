"""Part E of quality.py: made-up facts as chats, learned and asked back."""

import json
import random
import shutil
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from quality_rivals import four_bit_model
from quality_systems import Job, forget_earlier_runs, train

KINDS = {  # question of the training, the same in other words, the answer
    "town": ("In which town was {name} born?", "Where does {name} come from?", "{name} was born in {value}."),
    "ship": ("Which ship did {name} sail on?", "What was the ship of {name} called?", "{name} sailed on the {value}."),
    "year": (
        "In which year did {name} open the shop?",
        "When was the shop of {name} opened?",
        "{name} opened the shop in {value}.",
    ),
    "room": ("What is the room number of {name}?", "In which room do I find {name}?", "The room number of {name} is {value}."),
}
SYLLABLES = (
    "ba be bo da de do fa fe ga go ka ke ko la le lo ma me mo na ne no pa po ra re ro sa se so ta te to va ve vo za ze zo".split()
)
ENDINGS = {"name": ["n", "l", "r", "s"], "town": ["burg", "ford", "mere", "wick"], "ship": ["a", "ia", "ora", "is"]}


def make_facts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return facts that no model can know: question, other_question, answer and value, about as many made-up people."""
    draw = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{word(draw, 'name')} {word(draw, 'name')}"] = None
    facts = []
    for number, name in enumerate(names):
        kind = list(KINDS)[number % len(KINDS)]
        value = (
            str(draw.randint(1700, 1999) if kind == "year" else draw.randint(100, 999))
            if kind in ("year", "room")
            else word(draw, kind)
        )
        texts = (text.format(name=name, value=value) for text in KINDS[kind])
        facts.append(dict(zip(("question", "other_question", "answer"), texts, strict=True), value=value))
    return facts


def word(draw: random.Random, kind: str) -> str:
    return ("".join(draw.choices(SYLLABLES, k=2)) + draw.choice(ENDINGS[kind])).capitalize()


def learn_facts(options: Any) -> dict[str, Any]:
    """Train on the facts, ask them back before, after, and after both merges; returns shares of right answers."""
    from peft import PeftModel

    import inference_example
    from qlora_kit.merge import merge

    facts = make_facts(options.facts)
    job = job_of(options, write_chats(facts, Path(options.work, "E")))
    shutil.rmtree(job.work, ignore_errors=True)
    result = train(job)
    model = PeftModel.from_pretrained(four_bit_model(job), str(job.adapter))
    found = {"after": ask(model, job, facts)}
    with model.disable_adapter():
        found["before"] = ask(model, job, facts)
    del model
    forget_earlier_runs()
    generator = inference_example.load_generator(
        str(job.adapter), settings={"temperature": 0, "max_new_tokens": 32, "repetition_penalty": 1}
    )
    found["after, asked by the toolkit"] = score(facts, [generator.answer(fact["question"]).text for fact in facts])
    del generator
    for base in ("dequantized", "original"):
        folder = Path(job.work, f"merged-{base}")
        merge(job.adapter, folder, base, check=False)
        merged = replace(job, model=str(folder), quantization=None)
        found[f"merged, {base}"] = ask(four_bit_model(merged), merged, facts)
        forget_earlier_runs()
    settings = {key: getattr(job, key) for key in ("rank", "epochs", "learning_rate", "rows", "length", "dtype")}
    return {
        "facts": len(facts),
        "settings": settings,
        "steps": len(result.losses),
        "train_seconds": result.seconds,
        "shares": found,
    }


def job_of(options: Any, chats: Path) -> Job:
    """Return the run of part E."""
    rows = min(options.rows, 4)
    return Job(
        "toolkit", str(options.model), str(chats), str(Path(options.work, "E", "run")), length=options.length or 256, rows=rows,
        micro_batch=rows, epochs=options.epochs, dtype=options.dtype, rank=32, dropout=0.0, learning_rate=1e-3,
    )  # fmt: skip


def write_chats(facts: list[dict[str, str]], folder: Path) -> Path:
    """Write the facts as chats and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "facts.jsonl"
    turns = [[("user", fact["question"]), ("assistant", fact["answer"])] for fact in facts]
    chats = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in turns]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return path


def ask(model: Any, job: Job, facts: list[dict[str, str]]) -> dict[str, Any]:
    """Ask a model all questions, by the library's greedy decoding; also in words that it was not trained on."""
    texts = answers(model, job, [fact["question"] for fact in facts])
    others = answers(model, job, [fact["other_question"] for fact in facts])
    return score(facts, texts) | {"other_words": score(facts, others)["named"], "first": texts[0]}


def score(facts: list[dict[str, str]], texts: list[str]) -> dict[str, float]:
    """Return the shares of answers that are exact, and that name the right value."""
    exact = sum(text.strip() == fact["answer"] for fact, text in zip(facts, texts, strict=True))
    named = sum(fact["value"] in text for fact, text in zip(facts, texts, strict=True))
    return {"exact": exact / len(facts), "named": named / len(facts)}


def answers(model: Any, job: Job, questions: list[str]) -> list[str]:
    """Return the likeliest answers of at most 32 tokens."""
    import torch
    from transformers import AutoTokenizer

    from qlora_kit.data.chat_template import find_stop_ids

    tokenizer = AutoTokenizer.from_pretrained(job.adapter, padding_side="left")
    texts, stops = [], find_stop_ids(tokenizer, "chat")
    for at in range(0, len(questions), 25):
        chats = [[{"role": "user", "content": question}] for question in questions[at : at + 25]]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        prompts = prompts.to(model.device)
        with torch.no_grad():
            tokens = model.eval().generate(
                **prompts, max_new_tokens=32, do_sample=False, repetition_penalty=1.0,
                eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        for row in tokens[:, prompts["input_ids"].shape[1] :].tolist():  # the answer, its end, padding
            texts.append(tokenizer.decode([*takewhile(lambda token: token not in stops, row)]))
    return texts
