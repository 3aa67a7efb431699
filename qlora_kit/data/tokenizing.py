"""Turn records and running text into token ids, and records into labels; cut or drop records that are too long.

Labels depend on a token's position, never on its id: a pad, separator or end token is trained if it is part of an answer. A
record has the tokens of its whole text, as the tokenizer itself gives them. There are two exceptions: a control token that a
person typed is spelled out; and where a token would join the end of a prompt with the beginning of its answer, the prompt has the
tokens that it has at inference, when no answer follows.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, compress
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from qlora_kit.data.chat_template import find_end_ids, find_end_of_turn
from qlora_kit.data.encoding import (
    CHARACTERS_AT_ONCE,
    SEAMS,
    STRETCH,
    Fragment,
    Stretch,
    begin_text,
    check_seams,
    encode_stretches,
    split_into_stretches,
)
from qlora_kit.data.fields import is_empty, require_text
from qlora_kit.data.formats import READERS, Record
from qlora_kit.data.rendering import CUT, Rendering, TrainOn, render_chat, render_instruction
from qlora_kit.errors import BadRecord, UserError
from qlora_kit.model.tokenizer import find_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
TooLong = Literal["cut", "drop"]
LONGEST_WORD = 1_000_000  # characters without a space or line end; more is no text, and tokenizers take all memory for it
DOCUMENTS_AT_ONCE = 1024
FAR, NEAR = 128, 32  # characters: how long a part before a border is worth a seam, and how much of it decides


@dataclass(frozen=True)
class EncodedRecord:
    """One record: ids (length,) int32, and whether each is trained, (length,) bool."""

    ids: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self) -> np.ndarray:
        """Return the labels, (length,) int64: the id of each trained token but the first, else -100. The model shifts them."""
        labels = np.where(self.trained, self.ids, IGNORED).astype(np.int64)
        labels[:1] = IGNORED
        return labels


def render_record(
    record: Record, kind: str, tokenizer: "PreTrainedTokenizerBase", text_field: str, train_on: TrainOn
) -> Rendering:
    """Render a record of format `kind` for training.

    Raises:
        BadRecord: the record is not of that format, or holds something that is not text.
    """
    if kind == "instruction":
        text = require_text(record.get(text_field), text_field)
        unused = frozenset(str(key) for key, value in record.items() if key != text_field and not is_empty(value))
        rendering = render_instruction(text, tokenizer.eos_token or "", train_on)._replace(unused=unused)
    else:
        rendering = render_chat(READERS[kind](record), tokenizer, train_on)
    for piece in rendering.pieces:
        check_word_length(piece.text)
    return rendering


def find_end_id(kind: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the token that ends an answer of words in records of format `kind`.

    Raises:
        BadRecord: no token could end one.
    """
    if kind == "instruction":
        return tokenizer.eos_token_id
    return cast(int, tokenizer.convert_tokens_to_ids(find_end_of_turn(tokenizer)))


def find_all_end_ids(kind: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the ids of all tokens that end answers in records of format `kind`: of words, and of tool calls.

    Raises:
        BadRecord: no token could end one.
    """
    return (tokenizer.eos_token_id,) if kind == "instruction" else find_end_ids(tokenizer)


def check_word_length(text: str) -> None:
    """Check that a text has spaces or line ends.

    Raises:
        BadRecord: more than LONGEST_WORD characters have none.
    """
    if len(text) > LONGEST_WORD and max(map(len, text.split()), default=0) > LONGEST_WORD:
        raise BadRecord(f"the text holds more than {LONGEST_WORD:,} characters without a space or line end")


class _Part(NamedTuple):
    """A part of a record whose tokens do not depend on the text around it.

    Attributes:
        continues: it stands behind other text.
        stops: where each piece of the record ends in it; the last is its own end.
        trained: whether each piece is trained.
    """

    text: str
    continues: bool
    stops: list[int]
    trained: list[bool]


def encode_records(records: list[Rendering], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedRecord]:
    """Return the tokens of each record; the Rust tokenizer uses all cores.

    Raises:
        UserError: the tokenizer is written in Python.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        problem = "has a tokenizer without a fast version (tokenizer.json), which chats and instructions need"
        raise UserError("model.name", tokenizer.name_or_path, problem, "use another model, or train on running text")
    beginning = find_frame(tokenizer)[0]
    parts_of_records = _cut_into_parts(records, tokenizer)
    ids_of_parts = iter(_encode_parts([part for parts in parts_of_records for part in parts], tokenizer))
    encoded = []
    for record, parts in zip(records, parts_of_records, strict=True):
        pieces = [piece for _ in parts for piece in next(ids_of_parts)]
        ids = list(chain.from_iterable(pieces))
        trained = np.repeat(np.array([mark for part in parts for mark in part.trained], dtype=bool), list(map(len, pieces)))
        if record.is_plain:
            ids = begin_text(ids, beginning)
            trained = np.concatenate([np.zeros(len(ids) - len(trained), dtype=bool), trained])
        encoded.append(EncodedRecord(np.array(ids, dtype=np.int32), trained))
    return encoded


def _cut_into_parts(records: list[Rendering], tokenizer: "PreTrainedTokenizerBase") -> list[list[_Part]]:
    """Cut each record near the borders of its pieces, so that little of it is encoded both with and without what follows.

    A cut depends on nothing that follows the border, so that a prompt is cut alike with and without its answer.
    """
    texts = ["".join(piece.text for piece in record.pieces) for record in records]
    borders = [list(accumulate(len(piece.text) for piece in record.pieces)) for record in records]
    cuts: list[list[tuple[int, int]]] = []
    places = []
    for text, stops in zip(texts, borders, strict=True):
        certain = _find_cuts(text, stops, tokenizer)
        places += [(len(cuts), *place) for place in _propose_seams(text, stops, certain)]
        cuts.append(certain)
    holds = check_seams([(texts[n][begin:at], texts[n][at:stop]) for n, begin, at, stop in places], tokenizer)
    for n, _, at, _ in compress(places, holds):
        cuts[n].append((at, at))
    return [_build_parts(*each, tokenizer) for each in zip(records, texts, borders, cuts, strict=True)]


def _find_cuts(text: str, stops: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[int, int]]:
    """Return where a part ends and the next begins: at the last control token before each stop, and at each CUT."""
    control = [match.start() for match in _build_barrier_pattern(tokenizer).finditer(text)]
    before = {control[number - 1] for stop in stops if (number := bisect_left(control, stop))}
    cuts = [(at, at) for at in before]
    if CUT in text:
        cuts += [match.span() for match in re.finditer(CUT, text)]
    return sorted(cuts)


def _propose_seams(text: str, stops: list[int], cuts: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield where the text before a stop that is far from any cut may have a seam: begin of what decides, seam, stop."""
    begins = [0, *(begin for _, begin in cuts)]
    for stop in stops:
        if stop - begins[bisect_left(begins, stop) - 1] > FAR:
            for pattern in SEAMS:
                if found := list(pattern.finditer(text, stop - NEAR, stop)):
                    yield found[-1].end() - NEAR, found[-1].end(), stop
                    break


def _build_parts(
    record: Rendering, text: str, stops: list[int], cuts: list[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase"
) -> list[_Part]:
    parts, begin, first = [], 0, 0
    for end, following in [*sorted(cuts), (len(text), len(text))]:
        for words, continues in _split_long_text(text[begin:end], begin > 0, tokenizer):
            last = begin + len(words)
            part = _Part(words, continues, [], [])
            for number in range(first, len(stops)):
                if stops[number] > begin:
                    part.stops.append(min(stops[number], last) - begin)
                    part.trained.append(record.pieces[number].trained)
                if stops[number] >= last:
                    break
            parts.append(part)
            begin, first = last, number
        begin = following
    return parts


def _split_long_text(text: str, continues: bool, tokenizer: "PreTrainedTokenizerBase") -> list[Stretch]:
    if len(text) <= STRETCH:
        return [(text, continues)] if text else []
    return [stretch for stretch, _ in split_into_stretches([(text, True)], tokenizer, continues)]


@lru_cache(maxsize=8)
def _build_barrier_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Return a pattern of the special tokens that the tokenizer takes out of a text without anything that precedes them."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not token.lstrip and not token.single_word
        if not (token.normalized and normalizer and normalizer.normalize_str(token.content) != token.content)
    ]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")  # (?!) matches nothing


def _encode_parts(parts: list[_Part], tokenizer: "PreTrainedTokenizerBase") -> list[list[list[int]]]:
    """Return the ids of each part's pieces.

    Pieces have the ids of the part as a whole, unless a token joins the end of one with the beginning of the next: then the text
    up to there has the ids that it has when nothing follows, as at inference, and the text behind it is encoded on its own.
    """
    found: list[list[list[int]]] = [[] for _ in parts]
    waiting = dict(enumerate(parts))
    while waiting:
        strings = [(part.text[:stop], part.continues) for part in waiting.values() for stop in part.stops]
        encoded, at, rests = encode_stretches(strings, tokenizer), 0, {}
        for number, part in waiting.items():
            ids: list[int] = []
            for count, longer in enumerate(encoded[at : at + len(part.stops)]):
                if longer[: len(ids)] != ids:
                    rests[number] = _drop_pieces(part, count)
                    break
                found[number].append(longer[len(ids) :])
                ids = longer
            at += len(part.stops)
        waiting = rests
    return found


def _drop_pieces(part: _Part, count: int) -> _Part:
    """Return a part without its first pieces."""
    begin = part.stops[count - 1]
    stops = [stop - begin for stop in part.stops[count:]]
    return _Part(part.text[begin:], True, stops, part.trained[count:])


def check_trained(record: EncodedRecord, ends: tuple[int, ...]) -> None:
    """Check that a record trains an answer and its end.

    Args:
        ends: the ids of the tokens that end an answer.

    Raises:
        BadRecord: no token is trained, or none of the trained tokens is an end.
    """
    if not record.trained[1:].any():  # the first token is never predicted
        raise BadRecord("no token is trained, expected an answer")
    trained = record.ids[record.trained]
    if not any((trained == end).any() for end in ends):  # np.isin takes four times as long
        raise BadRecord("no end-of-turn token is trained, so the model would not learn to stop")


def shorten(record: EncodedRecord, max_length: int, too_long: TooLong, train_on: TrainOn = "assistant") -> EncodedRecord | None:
    """Return the record in at most `max_length` tokens, cut from the left, where the prompt is; None if it is dropped.

    A record is dropped if its last answer and one token of the prompt do not fit, even if `too_long` is `cut`: no answer is cut.
    With `train_on` = `all` there is no such limit, and the end of the record is kept.
    """
    if len(record) <= max_length:
        return record
    if too_long == "drop":
        return None
    start = len(record) - max_length
    if train_on != "all" and record.trained[start : _find_last_answer_end(record)].all():
        return None
    return EncodedRecord(record.ids[start:], record.trained[start:])


def _find_last_answer_end(record: EncodedRecord) -> int:
    return int(record.trained.nonzero()[0].max(initial=-1)) + 1


def encode_documents(
    fragments: Iterable[Fragment], tokenizer: "PreTrainedTokenizerBase", separator: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield the ids (n,) int32 of each stretch, and whether a document ends with it.

    Each document begins with the tokens that the tokenizer puts before a text, if there are any, and ends with the separator.
    """
    batch: list[tuple[Stretch, bool]] = []
    characters = 0
    for (text, continues), ends in split_into_stretches(fragments, tokenizer):
        batch.append(((text, continues), ends))
        characters += len(text)
        if characters > CHARACTERS_AT_ONCE or len(batch) == DOCUMENTS_AT_ONCE:
            yield from _encode_batch(batch, tokenizer, separator)
            batch, characters = [], 0
    yield from _encode_batch(batch, tokenizer, separator)


def _encode_batch(
    batch: list[tuple[Stretch, bool]], tokenizer: "PreTrainedTokenizerBase", separator: int
) -> Iterator[tuple[np.ndarray, bool]]:
    beginning = find_frame(tokenizer)[0]
    encoded = encode_stretches([stretch for stretch, _ in batch], tokenizer)
    for ids, ((_, continues), ends) in zip(encoded, batch, strict=True):
        whole = ids if continues else begin_text(ids, beginning)
        yield np.array([*whole, separator] if ends else whole, dtype=np.int32), ends
