"""Which chat templates work: what is trained of each kind of conversation, checked token by token.

    python benchmarks/template_matrix.py FOLDER                       all templates of the folder that PUBLIC names
    python benchmarks/template_matrix.py FOLDER --only trl-qwen3      some, also others than those
    python benchmarks/template_matrix.py FOLDER --json rows.json --page docs/models.md     keep the rows, and write the table

FOLDER holds .jinja files; public_templates.py says where they come from.

The tokenizer is the embedded model's, a byte-level BPE, with the template's control tokens added and the public model's beginning
and end of a text. The reference is `apply_chat_template` of transformers alone: an answer is what it writes beyond the prompt for
that answer, up to the token that ends it in the public model. A conversation is `ok` if

    the trained tokens, decoded, are exactly those answers with their ends;
    the tokens before each answer are those of its prompt, at inference and from apply_chat_template;
    all tokens are those of apply_chat_template(tokenize=True); and the end is among the tokens that stop an answer.

`last:` stands for data.train_on: last, and `refused` for one line that says why. Anything else is wrong.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matrix_run
from matrix_run import Row, shorten
from public_templates import PUBLIC, Public
from tiny_models import TOKENIZER

CONTROL = re.compile(
    r"<\|[^\s|<>'\"{}]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\|[a-z_]+>|<[a-z_]+\|>|\[/?[A-Z][A-Z_]{2,}\]|\[\|[a-z]+\|\]|\[gMASK\]|<sop>"
    r"|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|</?seed:[a-z_]+>|<SPECIAL_\d+>|\]~!?b\[?\]?|\[e~\["
)
WORDS = re.compile(r"</?(?:think|thinking|tool_call|tool_response|tools)>|<｜(?:User|Assistant)｜>")  # added, but not special


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
    control = [public.bos, public.eos, *public.ends, *CONTROL.findall(template)]
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
    template = (folder / f"{stem}.jinja").read_text(encoding="utf-8")
    if stem.startswith("chat_templates-"):  # laid out for reading; its README says to take that out
        template = template.replace("    ", "").replace("\n", "")
    tokenizer = build_tokenizer(template, public)
    row: Row = {"name": public.name, "cases": {}, "wrong": []}
    for kind, record in conversations().items():
        outcome = check_record(kind, record, tokenizer, public, work)
        if outcome.startswith("refused") and "data.train_on" in outcome:
            last = check_record(kind, record, tokenizer, public, work, "last")
            outcome = f"last: {last}"
        row["cases"][kind] = outcome
        if not re.match(r"(last: )?(ok|refused)", outcome):
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
    faults = []
    for form in forms_of(record):
        check = Check(form, tokenizer, public, train_on)
        if (fault := next(check.find_faults(encoded), None)) is None:
            return f"ok, prompt without {check.left_out!r}" if check.left_out else "ok"
        faults.append(fault)
    return faults[0]


def forms_of(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a record in the forms that templates differ in: the name of thoughts, arguments as text, no content of a call."""
    for thoughts, as_text, content in product(("reasoning_content", "thinking", "reasoning"), (False, True), ("", None)):
        messages = []
        for turn in record["messages"]:
            turn = {thoughts if key == "reasoning_content" else key: value for key, value in turn.items()}
            if "tool_calls" in turn:
                arguments = CALL["function"]["arguments"]
                function = CALL["function"] | {"arguments": json.dumps(arguments) if as_text else arguments}
                turn |= {"tool_calls": [CALL | {"function": function}], "content": content}
            messages.append(turn)
        yield record | {"messages": messages}


class Check:
    """The reference for the tokens of a conversation, and what is wrong with them.

    Attributes:
        left_out: what prompts lack of those of the template, in training and at inference alike: a thought that it only opens.
    """

    def __init__(self, record: dict[str, Any], tokenizer: Any, public: Public, train_on: str):
        self.record, self.turns, self.tokenizer = record, record["messages"], tokenizer
        self.public, self.train_on, self.left_out = public, train_on, ""
        self.answers = [number for number, turn in enumerate(self.turns) if turn["role"] == "assistant"]

    def find_faults(self, encoded: list[Any]) -> Iterator[str]:
        """Yield what is wrong with the tokens of all records that were made of the conversation."""
        if self.turns[-1]["role"] != "assistant":
            yield "trained, though no answer follows the last turn"
            return
        wanted, found = self.answers[-1:] if self.train_on == "last" else self.answers, []
        for each in encoded:
            ids = each.ids.tolist()
            spans = spans_of(each.trained)
            if difference := self._compare_tokens(ids, spans):
                yield difference
            for start, stop in spans:
                number = next((n for n in self.answers if n not in found and self._fits(n, ids[:start])), None)
                if number is None:
                    yield f"trained behind no prompt: ...{self.tokenizer.decode(ids[max(start - 6, 0) : start])!r}"
                    continue
                found.append(number)
                yield from self._check_answer(number, ids[start:stop], ids[:start])
        if sorted(found) != wanted:
            yield f"trains answers {found}, expected {wanted}"

    def _render(self, turns: int, **options: Any) -> Any:
        return render(self.tokenizer, self.record, turns, **options)

    @property
    def _ends(self) -> list[str]:
        return [*self.public.ends, self.public.eos]

    def _compare_tokens(self, ids: list[int], spans: list[tuple[int, int]]) -> str:
        """Return how tokens differ from those of apply_chat_template, cut where answers begin and end; empty if they do not."""
        edges = [0, *(edge for span in spans for edge in span), len(ids)]
        pieces = [self.tokenizer.decode(ids[a:b]) for a, b in pairwise(edges)]
        found, texts = "".join(pieces), [text for number in self.answers for text in self._texts(number)]
        if found not in texts:
            return f"another text than apply_chat_template: ...{found[-60:]!r}, expected ...{texts[-1][-60:]!r}"
        cut = [token for piece in pieces for token in self.tokenizer(piece, add_special_tokens=False)["input_ids"]]
        if ids in (cut, self.tokenizer(found, add_special_tokens=False)["input_ids"]):
            return ""
        return f"other tokens than apply_chat_template: {describe_difference(ids, cut, self.tokenizer)}"

    def _texts(self, number: int) -> Iterator[str]:
        """Yield the rendering of all turns up to an answer; with an end, where the template leaves that to the next turn."""
        text = self._render(number + 1)
        after = text.rpartition(self.turns[number]["content"] or CALL["function"]["name"])[2]
        if not any(end in after for end in self._ends):
            words = text.rstrip()
            for end in self._ends:
                yield from (words + end, words + end + text[len(words) :])
        yield text

    def _prompt_at_inference(self, number: int) -> list[int] | None:
        """Return the prompt for an answer as inference gives it; None where it takes no such turns."""
        from qlora_kit.inference.prompts import PromptEncoder

        if "tools" in self.record:
            return None
        encoder: Any = PromptEncoder(self.tokenizer, "chat", [], self.train_on)  # type: ignore[arg-type]
        return encoder.encode_chat(self.turns[:number])

    def _fits(self, number: int, prompt: list[int]) -> bool:
        """Return whether tokens are the prompt for an answer."""
        if self._prompt_at_inference(number) not in (None, prompt):
            return False
        own, text = self._render(number, add_generation_prompt=True), self.tokenizer.decode(prompt)
        if text != own and own.startswith(text):
            self.left_out = own[len(text) :]
        return own.startswith(text)

    def _check_answer(self, number: int, ids: list[int], prompt: list[int]) -> Iterator[str]:
        """Yield how the trained tokens differ from what the template writes behind the prompt."""
        from qlora_kit.data.chat_template import find_stop_ids

        turn, trained, before = self.turns[number], self.tokenizer.decode(ids), self.tokenizer.decode(prompt)
        whole = self._render(number + 1)
        if whole.startswith(before):
            rest = whole[len(before) :]
            stops = [rest.rindex(end) + len(end) for end in self._ends if end in rest]
            expected = [rest[:stop] for stop in stops] or [rest.rstrip() + end for end in ("", *self._ends)]
            if trained not in expected:
                yield f"trains {trained!r}, expected {expected[0]!r}"
        elif turn["content"] and turn["content"] not in trained:
            yield f"trains {trained!r} for {turn['content']!r}"
        for key in ("reasoning_content", "thinking", "reasoning"):
            if turn.get(key, "") not in trained:
                yield f"the thought {turn[key]!r} is left out"
        if ids[-1] not in find_stop_ids(self.tokenizer, "chat"):
            yield f"{self.tokenizer.convert_ids_to_tokens(ids[-1])} stops no answer at inference"


def spans_of(trained: Any) -> list[tuple[int, int]]:
    """Return the first token of each trained stretch, and the one after its last."""
    edges = [0, *(int(at) for at in (trained[1:] != trained[:-1]).nonzero()[0] + 1), len(trained)]
    return [(a, b) for a, b in pairwise(edges) if trained[a]]


def describe_difference(found: list[int], expected: list[int], tokenizer: Any) -> str:
    """Return the tokens around the first difference."""
    at = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    near = slice(max(at - 2, 0), at + 3)
    return f"{tokenizer.convert_ids_to_tokens(found[near])}, expected {tokenizer.convert_ids_to_tokens(expected[near])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with .jinja files")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="files, without .jinja; none only writes the page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the rows to those of this file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the rows, and those of --json, into this page")
    arguments = parser.parse_args()
    names = arguments.only
    if names is None:
        names = [name for name in PUBLIC if (arguments.folder / f"{name}.jinja").exists()]
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
    kinds, reasons = list(conversations()), dict[str, str]()

    def cell(outcome: str) -> str:
        last, _, reason = outcome.rpartition("refused: ")
        if reason == outcome:
            return shorten(outcome if re.match(r"(last: )?ok", outcome) else f"**{outcome}**", 120)
        general = re.sub(r"'[^']*'", "'...'", re.sub(r"turn \d+", "turn N", reason))
        return f"{last}refused ({reasons.setdefault(general, f'{len(reasons) + 1}')})"

    lines = [f"| template of | file | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 2)]
    for name, row in rows.items():
        outcomes = row.get("cases") or dict.fromkeys(kinds, row["wrong"][0])
        lines.append(f"| {row.get('name', name)} | {name} | {' | '.join(cell(outcomes[kind]) for kind in kinds)} |")
    return [*lines, "", *(f"{number}. {shorten(reason, 400)}" for reason, number in reasons.items())]


if __name__ == "__main__":
    main()
