"""One conversation as Alpaca, ShareGPT, messages and instruction text, with the tokens that each of them trains.

    python -m finetuning_lessons.formats

Alpaca, ShareGPT and messages name the turns, and the tokenizer's chat template turns them into one text. Instruction text is
ready made. The loss covers the answer and the token that ends its turn, from which the model learns to stop. All other tokens are
context with label -100. Trained tokens are printed in colour on a terminal, and between [[ and ]] elsewhere.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from finetuning_lessons.lesson import (
    GREEN,
    GREY,
    PRINTED_WIDTH,
    ROOT,
    begin,
    create_parser,
    finish,
    load_tokenizer,
    picture,
    print_table,
    print_text,
)
from finetuning_lessons.words import text
from qlora_kit import cli
from qlora_kit.data.formats import alpaca_to_text, recognise_format
from qlora_kit.data.preview import mark_trained
from qlora_kit.data.rendering import Piece, Rendering, TrainOn
from qlora_kit.data.tokenizing import EncodedRecord, encode_records, find_end_id, render_record

ALPACA = {"instruction": "Make it a question.", "input": "The train is late.", "output": "Is the train late?"}
ASKED = f"{ALPACA['instruction']}\n\n{ALPACA['input']}"
RECORDS: dict[str, dict[str, Any]] = {
    "alpaca": ALPACA,
    "sharegpt": {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ALPACA["output"]}]},
    "messages": {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ALPACA["output"]}]},
    "instruction": {"text": alpaca_to_text(ALPACA)},
}
CHINESE = {
    "instruction": "將以下句子翻譯成英文",
    "input": "深度學習是人工智慧的一個重要分支。",
    "output": "Deep learning is an important branch of artificial intelligence.",
}
TWO_ROUNDS = {
    "conversations": [
        {"from": "human", "value": "What is a tide?"},
        {"from": "gpt", "value": "The sea rises and falls."},
        {"from": "human", "value": "How often?"},
        {"from": "gpt", "value": "Twice a day."},
    ]
}
SAMPLES = ("alpaca.jsonl", "sharegpt.json", "messages.jsonl", "completion.jsonl", "instruction.jsonl")
TRAIN_ON: tuple[TrainOn, ...] = ("assistant", "last", "all")


def encode_record(record: dict[str, Any], tokenizer: Any, train_on: TrainOn = "assistant") -> EncodedRecord:
    """Return the token ids of a record of any format, and which of them are trained."""
    return encode_records([render_record(record, recognise_format(record), tokenizer, "text", train_on)], tokenizer)[0]


def encode_everything(text: str, tokenizer: Any) -> EncodedRecord:
    """Encode a text as `labels = input_ids.clone()` does: the prompt is trained too, and no token ends the answer."""
    return encode_records([Rendering([Piece(text, True)], is_plain=True)], tokenizer)[0]


def learns_to_stop(encoded: EncodedRecord, end: int) -> bool:
    """Return whether the token that ends an answer is trained."""
    return bool(((encoded.ids == end) & encoded.trained).any())


def token_row(name: str, encoded: EncodedRecord, end: int) -> list[str]:
    trained = int((encoded.labels() >= 0).sum())
    stops = text("yes", "會") if learns_to_stop(encoded, end) else text("no", "不會")
    return [name, stops, str(len(encoded)), str(trained), f"{100 * trained / len(encoded):.0f} %"]


def format_rows(tokenizer: Any) -> list[list[str]]:
    rows = [token_row(kind, encode_record(record, tokenizer), find_end_id(kind, tokenizer)) for kind, record in RECORDS.items()]
    everything = encode_everything(RECORDS["instruction"]["text"], tokenizer)
    name = text("instruction, all labels", "instruction，全部訓練")
    return [*rows, token_row(name, everything, find_end_id("instruction", tokenizer))]


def train_on_rows(tokenizer: Any) -> list[list[str]]:
    """Return a row for each value of data.train_on, for a conversation of two rounds."""
    end = find_end_id("sharegpt", tokenizer)
    return [token_row(train_on, encode_record(TWO_ROUNDS, tokenizer, train_on), end) for train_on in TRAIN_ON]


def sample_rows(tokenizer: Any) -> list[list[str]]:
    rows = []
    for name in SAMPLES:
        content = (ROOT / "samples" / name).read_text(encoding="utf-8")
        records = json.loads(content) if name.endswith(".json") else [json.loads(line) for line in content.splitlines()]
        encoded = [encode_record(record, tokenizer) for record in records]
        tokens, trained = sum(map(len, encoded)), sum(int((one.labels() >= 0).sum()) for one in encoded)
        rows.append(
            [
                f"samples/{name}",
                recognise_format(records[0]),
                f"{len(records):,}",
                f"{tokens:,}",
                f"{100 * trained / tokens:.0f} %",
            ]
        )
    return rows


def print_records(tokenizer: Any) -> None:
    console = Console(width=PRINTED_WIDTH)
    for kind, record in (RECORDS | {text("alpaca in Chinese", "中文的 alpaca"): CHINESE}).items():
        console.print(f"{kind}:", style="bold")
        written = json.dumps(record, indent=2, ensure_ascii=False)
        console.print(written, highlight=False, markup=False, soft_wrap=True)  # no break inside a string
        console.print(mark_trained(encode_record(record, tokenizer), tokenizer, console.is_terminal), soft_wrap=True)
        console.print()


def print_findings(tokenizer: Any) -> None:
    chats = [encode_record(RECORDS[kind], tokenizer) for kind in ("alpaca", "sharegpt", "messages")]
    same = all(one.labels().tolist() == chats[0].labels().tolist() and (one.ids == chats[0].ids).all() for one in chats)
    print_text(
        text(
            f"Alpaca, ShareGPT and messages give {'the same' if same else 'different'} tokens and labels: they are three ways to "
            "write down the same turns. Instruction text has no turns that a chat template could know.",
            f"alpaca、sharegpt、messages 得到{'相同' if same else '不同'}的 token 與 label：它們是同一段對話的三種寫法。"
            "instruction 是寫好的文字，裡面沒有 chat template 認得出的輪次。",
        )
    )
    everything = encode_everything(RECORDS["instruction"]["text"], tokenizer)
    trained = int((everything.labels() >= 0).sum())
    answer = int((encode_record(RECORDS["instruction"], tokenizer).labels() >= 0).sum()) - 1  # without its end token
    print_text(
        text(
            f"Labels copied from the input, as in the simplest of data sets, spend {trained - answer} of {trained} trained "
            "tokens on a prompt that the model never has to write, and without an end token it never learns to stop.",
            f"最簡單的資料集直接把輸入複製成 label：{trained} 個訓練 token 中有 {trained - answer} 個花在模型永遠不必寫的提示上；"
            "又沒有結束 token，模型學不會停下來。",
        )
    )


def draw_tokens(axes: Any, title: str, encoded: EncodedRecord, tokenizer: Any, columns: int = 36, lines: int = 8) -> None:
    """Draw characters in cells, coloured if trained, with lines between tokens and `columns` cells in a row."""
    at, line = 0, 0
    for token, label in zip(encoded.ids.tolist(), encoded.labels().tolist(), strict=True):
        colour, words = (GREEN if label >= 0 else GREY), tokenizer.decode([token])
        if at + len(words) > columns:
            at, line = 0, line + 1
        axes.vlines(at, line, line + 0.9, color="white", linewidth=1.5, zorder=2)
        for character in words:
            axes.broken_barh([(at, 1)], (line, 0.9), color=colour, alpha=0.75 if label >= 0 else 0.2, linewidth=0, zorder=1)
            shown, newline = ("↵", True) if character == "\n" else (character, False)
            axes.text(at + 0.5, line + 0.48, shown, family="monospace", fontsize=10, ha="center", va="center", zorder=3)
            at, line = (0, line + 1) if newline else (at + 1, line)
    axes.set(xlim=(0, columns), ylim=(lines, -0.2))
    axes.set_title(title, loc="left", fontsize=11)
    axes.axis("off")


def draw(path: Path, tokenizer: Any) -> None:
    with picture(path, columns=2, rows=2, size=(11, 6.7)) as grid:
        panels = {
            text("Alpaca, ShareGPT, messages: the chat template", "alpaca、sharegpt、messages：用 chat template"): encode_record(
                RECORDS["alpaca"], tokenizer
            ),
            text("Instruction text", "instruction 文字"): encode_record(RECORDS["instruction"], tokenizer),
            text("ShareGPT, two rounds: every answer is trained", "sharegpt 兩輪：每個回答都訓練"): encode_record(
                TWO_ROUNDS, tokenizer
            ),
            text("Instruction text, labels = input_ids, no end", "instruction，labels = input_ids，沒有結尾"): encode_everything(
                RECORDS["instruction"]["text"], tokenizer
            ),
        }
        for axes, (title, encoded) in zip(grid.flat, panels.items(), strict=True):
            draw_tokens(axes, title, encoded, tokenizer)
        grid[0, 0].figure.suptitle(
            text(
                "Green: trained. Grey: context, label -100. White lines separate tokens, ↵ ends a line",
                "綠：訓練。灰：上下文，label 為 -100。白線分開 token，↵ 是換行",
            ),
            fontsize=12,
        )
        note = text("← the first token: nothing predicts it", "← 第一個 token：沒有東西預測它")
        grid[1, 1].text(18, 0.48, note, fontsize=9, va="center")


def main(argv: list[str] | None = None) -> None:
    arguments = begin(create_parser(__doc__, "formats"), argv)
    tokenizer = load_tokenizer()
    print_records(tokenizer)
    header = [text("format", "格式"), text("learns to stop", "會停"), "tokens", text("trained", "訓練"), text("share", "比例")]
    print_table(text("One question and its answer", "一個問題與回答"), header, format_rows(tokenizer), words=2)
    title = text("Two rounds of ShareGPT, by data.train_on", "sharegpt 的兩輪對話，依 data.train_on")
    print_table(title, ["train_on", *header[1:]], train_on_rows(tokenizer), words=2)
    header = [text("file", "檔案"), text("format", "格式"), text("records", "筆數"), "tokens", text("trained", "訓練")]
    print_table(text("The sample files", "範例檔案"), header, sample_rows(tokenizer), words=2)
    print_findings(tokenizer)
    draw(arguments.output_dir / "formats.png", tokenizer)
    finish(arguments)


if __name__ == "__main__":
    cli.run(main)
