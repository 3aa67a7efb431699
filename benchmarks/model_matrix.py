"""Which models work: tiny random models of many architectures, trained, answered with and merged as a user would, and compared.

    python benchmarks/model_matrix.py                          all models
    python benchmarks/model_matrix.py --only gemma2 lfm2       some
    python benchmarks/model_matrix.py --folder ./my_model      one of your own, if memory holds it several times in 32 bits
    python benchmarks/model_matrix.py --json rows.json --page docs/models.md     keep the rows, and write the table

Each model trains twice for two steps: on running text with the default dropout, and on chats packed into blocks of 64 tokens
without dropout. The functions are those of the commands: train_qlora.train, inference_example.load_generator,
qlora_kit.merge.merge. model_checks.py has the reference. Columns:

    text            evaluation loss before and after training against the reference, nats per token
    packed chats    the same against each record alone, and the gradient of every LoRA matrix, worst relative error
    answers         greedy text with the adapter and without, of one prompt and of two at once, against `generate`
    merge           every weight of both merges against peft's merge_and_unload, worst relative difference
    4 bits, LoRA    share of the weights of all projections (not embedding and head) that is packed, and that LoRA reaches

Nothing here says anything about GPU kernels, or about rounding to 16 bits.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matrix_run
from matrix_run import Row, shorten
from tiny_models import MODELS, ROOT, build

LENGTH = 64  # tokens of a block
LONG, SHORT = 46, 18  # tokens of the two records of a block: one longer than a window of 32
SETTINGS = {
    "data.subset": None, "data.max_length": LENGTH, "data.max_eval_samples": 4, "lora.rank": 8, "training.device": "cpu",
    "training.max_steps": 2, "training.batch_size": 4, "training.gradient_accumulation_steps": 2, "training.learning_rate": 5e-3,
    "training.warmup_ratio": 0.0, "training.logging_steps": 1, "training.eval_steps": 2, "training.save_steps": 100,
}  # fmt: skip
TEXT = {"data.dataset": str(ROOT / "samples" / "articles.txt"), "data.eval_split": 0.15, "data.max_train_samples": 8}
# The most that rounding in 32 bits explains, with a margin.
LIMITS = {"base": 1e-5, "adapter": 1e-5, "gradient": 1e-4, "original": 1e-5, "dequantized": 1e-5}
# What the log says where 4 bits or LoRA do not reach every projection.
SAID = {"packed": r"[\d,]+ of [\d,]+ stay in \d+ bits", "adapted": r"on \d+ of \d+ projections; not on"}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def check_model(name: str, folder: Path, work: Path, quick: bool = False) -> Row:
    """Return the row of a model.

    Args:
        folder: of the model and its tokenizer.
        work: an empty folder for what the runs write.
        quick: train on chats only, answer with the adapter only, and merge onto the original weights only.
    """
    import model_checks as checks

    started = time.monotonic()
    row: Row = {"name": name, "set": {}, "figures": {}, "refused": {}, "wrong": []}
    files = {key: str(write_chats(work / f"{key}.jsonl", folder)) for key in ("data.dataset", "data.eval_split")}
    runs = {"chats": files | {"lora.dropout": 0.0}}
    if not quick:
        runs = {"text": TEXT} | runs
    steps = {}
    for kind, data in runs.items():
        settings = {"model.name": str(folder)} | SETTINGS
        if step := _attempt(row, kind, train_as_advised, row, settings, data, work / kind):
            steps[kind] = step
    if steps:
        _check_runs(row, folder, steps, work, quick)
    elif row["refused"]:
        row["peft"] = checks.why_peft_cannot_train(folder)
        if row["peft"] is None:
            row["wrong"].append("refused, though plain peft trains it")
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _check_runs(row: Row, folder: Path, steps: dict[str, Any], work: Path, quick: bool) -> None:
    """Compare everything that follows from the runs, whose second steps are given."""
    import model_checks as checks

    loaded, packed = checks.load_plain(folder), checks.find_packed(folder)
    plain, rounded = partial(checks.round_weights, loaded, ()), partial(checks.round_weights, loaded, packed)
    for kind, step in steps.items():
        compared = _attempt(row, kind, checks.compare_losses, rounded(), step, work / kind)
        if compared:
            _note(row, kind, compared[0])
        if compared and kind == "chats":
            row["several_a_block"] = step.training.packed
            error = _attempt(row, kind, checks.compare_gradients, compared[1], step, LIMITS["gradient"])
            _note(row, kind, {} if error is None else {"gradient": error})
    output = work / next(iter(steps))
    row |= _attempt(row, "reach", checks.measure_reach, plain(), packed, output) or {}
    read_log(row, output)
    differs = _attempt(row, "answers", checks.compare_answers, rounded(), output, (False,) if quick else (False, True))
    if differs:
        row["wrong"].append(f"answers: {differs}")
    row["figures"]["answers"] = "=" if differs == "" else ""
    for base, load in (("original", plain), ("dequantized", rounded))[: 1 if quick else 2]:
        if worst := _attempt(row, "merge", checks.compare_merge, load(), output, work / base, base):
            _note(row, f"merge ({worst[1]})" if worst[0] > LIMITS[base] else "merge", {base: worst[0]})


def _attempt(row: Row, part: str, function: Callable, *arguments: Any) -> Any:
    """Return the function's result; a refusal and a crash are noted in the row, and None is returned."""
    from qlora_kit.errors import UserError

    try:
        return function(*arguments)
    except UserError as refusal:
        row["refused"][part] = str(refusal).replace(str(ROOT), ".")
    except Exception as error:
        row["wrong"].append(f"{part}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _note(row: Row, part: str, figures: dict[str, float]) -> None:
    """Keep figures, and say which are wrong."""
    for key, figure in figures.items():
        row["figures"][f"{part} {key}"] = figure
        if not figure <= LIMITS[key]:  # NaN is wrong too
            row["wrong"].append(f"{part}: {key} differs by {figure:.1e}")


def train(settings: dict[str, Any], output: Path) -> Any:
    """Train as `train_qlora.py` does, but for the curves, which take longer than the steps; return the second step."""
    import model_checks as checks

    import train_qlora

    with checks.record_steps() as steps, patch("train_qlora.plot_training_curves"):
        train_qlora.train(settings | {"training.output_dir": str(output)})
    return steps[1]


def train_as_advised(row: Row, settings: dict[str, Any], data: dict[str, Any], output: Path) -> Any:
    """Train; where a refusal advises another setting, train with that, and note it in the row.

    Raises:
        UserError: the model is refused with any setting.
    """
    from qlora_kit.errors import UserError

    while True:
        try:
            return train(settings | row["set"] | data, output)
        except UserError as error:
            advice = read_advice(error.problems[0])
            if not advice or advice.items() <= row["set"].items():
                raise
            row["set"] |= advice


def read_advice(problem: Any) -> dict[str, Any]:
    """Return the settings that a refusal advises; none where it advises another model."""
    remedy = problem.remedy
    dropout = {"lora.dropout": 0.0} if "--dropout 0" in remedy else {}
    if problem.key == "lora.dropout":
        return dropout
    if problem.key != "lora.target_modules" or remedy == "use another model":
        return {}
    names = "all-linear" if "all-linear" in remedy else remedy.removeprefix("use ").split(", ")
    return {"lora.target_modules": names} | dropout


def read_log(row: Row, output: Path) -> None:
    """Note the path of a run, and what its log leaves unsaid."""
    log = (output / "training_log.txt").read_text(encoding="utf-8")
    slow = re.search(r"through the library's layers \((.*)\)", log)
    row["path"] = f"library ({slow[1]})" if slow else "fast"
    for part, line in SAID.items():
        if row.get(part, 1) < 1 and not re.search(line, log):
            row["wrong"].append(f"{100 * row[part]:.0f} % {part}, and the log does not say so")


def write_chats(file: Path, folder: Path) -> Path:
    """Write chats that fill blocks in pairs, a long and a short one, so that packing has something to get wrong."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = (ROOT / "samples" / "articles.txt").read_text(encoding="utf-8").split()
    lines = []
    for number in range(8):
        start, most = 50 * number, (LONG, SHORT)[number % 2]
        turns = [{"role": "user", "content": words[start]}, {"role": "assistant", "content": words[start + 1]}]
        while len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)) <= most:
            start, before = start + 1, turns[1]["content"]
            turns[1] = turns[1] | {"content": f"{before} {words[start + 1]}"}
        turns[1]["content"] = before
        lines.append(json.dumps({"messages": turns}))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = f"these; none only writes the page: {', '.join(MODELS)}"
    parser.add_argument("--only", nargs="*", choices=[*MODELS, []], default=list(MODELS), metavar="NAME", help=only)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="a model of your own instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to those of this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the rows, and those of --json, into this page")
    parser.add_argument("--timeout", type=float, default=120, metavar="SECONDS", help="limit of a model (default: 120)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="models at a time (default: 1)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep models, runs and what they print here")
    arguments = parser.parse_args()
    own = arguments.folder and arguments.folder.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        matrix_run.prepare(work)
        import model_checks  # noqa: F401  once, before forking

        names = [own.name] if own else arguments.only
        checks = {name: partial(_build_and_check, name, own, work / name) for name in names}
        rows = matrix_run.run_rows(checks, work, arguments.timeout, arguments.jobs)
    rows = matrix_run.update_json(arguments.json, rows)
    print("\n".join(table(rows)))
    if arguments.page:
        command = f"python benchmarks/model_matrix.py --json {arguments.json or 'rows.json'} --page {arguments.page}"
        text = [matrix_run.describe_run(command, PACKAGES), "", *summary(rows), "", *table(rows)]
        matrix_run.write_section(arguments.page, "model matrix", "\n".join(text))
    sys.exit(any(row["wrong"] for row in rows.values()))


def _build_and_check(name: str, own: Path | None, work: Path) -> Row:
    shutil.rmtree(work, ignore_errors=True)
    if own is None:
        build(name, work / "model")
    return check_model(name, own or work / "model", work)


def summary(rows: dict[str, Row]) -> list[str]:
    """Return the counts of the table in words."""
    kinds = {MODELS[name].kind for name in rows if name in MODELS}
    fast = sum(row.get("path") == "fast" for row in rows.values())
    refused = sum("peft" in row for row in rows.values())
    wrong = sum(bool(row["wrong"]) for row in rows.values())
    counts = f"{fast} on the fast path, {len(rows) - fast - refused} on the library's layers, {refused} refused; {wrong} wrong."
    return [f"{len(rows)} models of {len(kinds)} architectures (`model_type`): {counts}"]


def table(rows: dict[str, Row]) -> list[str]:
    """Return the rows as a Markdown table."""
    head = "| model | name | path | set | text: base, adapter | packed chats: base, adapter, gradient | answers | "
    head += "merge: original, dequantized | in 4 bits | LoRA reaches | result |"
    return [head, "|" + "---|" * (head.count("|") - 1), *(table_row(name, row) for name, row in rows.items())]


def table_row(name: str, row: Row) -> str:
    figures, refused = row.get("figures", {}), row.get("refused", {})

    def numbers(*keys: str) -> str:
        return ", ".join(f"{figures[key]:.0e}" if key in figures else "-" for key in keys)

    def share(part: str) -> str:
        missing = f"; not {shorten(', '.join(row[f'not_{part}']))}" if row.get(f"not_{part}") else ""
        return f"{100 * row[part]:.0f} %{missing}" if part in row else ""

    chats = numbers("chats base", "chats adapter", "chats gradient")
    if not row.get("several_a_block", True):
        chats += " (one record a block)"
    result = "; ".join(row["wrong"]) or ("" if "peft" in row else "ok")
    lines = {line: f"{'' if 'peft' in row else f'{part} '}refused: {line}" for part, line in refused.items()}
    path = re.sub(r" \(\w+ is not built like Llama\)", "", row.get("path", ""))
    cells = [
        MODELS[name].public if name in MODELS else name, name, path,
        " ".join(f"`{key}={value}`" for key, value in row.get("set", {}).items()),
        numbers("text base", "text adapter"), chats, figures.get("answers", ""), numbers("merge original", "merge dequantized"),
        share("packed"), share("adapted"),
        re.sub(r"/\S*/", "", "; ".join(filter(None, [f"**{result}**" if row["wrong"] else result, *lines.values()]))),
    ]  # fmt: skip
    return f"| {' | '.join(shorten(cell, 300) for cell in cells)} |"


if __name__ == "__main__":
    main()
