"""Turn records and running text into token ids, and records into labels; cut or drop records that are too long.

Labels depend on a token's position, never on its id: a pad, separator or end token is trained if it is part of an answer. Each
piece of a record is tokenized on its own, as a prompt is at inference, so that no token joins the end of a prompt with the
beginning of its answer. Running text is tokenized in stretches, which together give the tokens of the whole text.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from qlora_kit.data.chat_template import find_end_of_turn
from qlora_kit.data.formats import READERS, Record, require_text
from qlora_kit.data.rendering import Piece, TrainOn, render_chat, render_instruction
from qlora_kit.errors import BadRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
TooLong = Literal["cut", "drop"]
Fragment = tuple[str, bool]  # a piece of a document, and whether the document ends with it
LONGEST_WORD = 1_000_000  # characters without a space or line end; more is no text, and tokenizers take all memory for it

STRETCH = 2**16  # characters of running text in one string: many strings keep all cores busy
CHARACTERS_AT_ONCE = 2**20  # limits the tokenizer's objects, which take a hundred bytes a token
DOCUMENTS_AT_ONCE = 1024
SEAM_SEARCH = 2**12  # characters at the end of a stretch that are searched for a seam
SEAM_CONTEXT = 256  # characters on each side of a seam by which it is checked
SEAMS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?= \S)"))  # the end of a line, or of a word


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
) -> list[Piece]:
    """Render a record of format `kind` for training.

    Raises:
        BadRecord: the record is not of that format, or holds something that is not text.
    """
    if kind == "instruction":
        text = require_text(record.get(text_field), text_field)
        pieces = render_instruction(text, tokenizer.eos_token or "", train_on)
    else:
        pieces = render_chat(READERS[kind](record), tokenizer, train_on)
    for piece in pieces:
        check_word_length(piece.text)
    return pieces


def find_end_id(kind: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the token that ends an answer in records of format `kind`.

    Raises:
        BadRecord: no token ends an answer.
    """
    if kind == "instruction":
        return tokenizer.eos_token_id
    return cast(int, tokenizer.convert_tokens_to_ids(find_end_of_turn(tokenizer)))


def check_word_length(text: str) -> None:
    """Check that a text has spaces or line ends.

    Raises:
        BadRecord: more than LONGEST_WORD characters have none.
    """
    if len(text) > LONGEST_WORD and max(map(len, text.split()), default=0) > LONGEST_WORD:
        raise BadRecord(f"the text holds more than {LONGEST_WORD:,} characters without a space or line end")


def encode_records(records: list[list[Piece]], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedRecord]:
    """Return the tokens of each record, given as pieces; the Rust tokenizer uses all cores."""
    records = [
        [Piece(text, piece.trained) for piece in pieces for text in _split_long_text(piece.text, tokenizer)] for pieces in records
    ]
    ids_of_pieces = iter(encode_strings([piece.text for pieces in records for piece in pieces], tokenizer))
    encoded = []
    for pieces in records:
        ids = [next(ids_of_pieces) for _ in pieces]
        trained = np.repeat(np.array([piece.trained for piece in pieces], dtype=bool), [len(each) for each in ids])
        encoded.append(EncodedRecord(np.array([token for each in ids for token in each], dtype=np.int32), trained))
    return encoded


def _split_long_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    return [text] if len(text) <= STRETCH else [stretch for stretch, _ in _split_into_stretches([(text, True)], tokenizer)]


def encode_strings(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the ids of each text, without the special tokens that a tokenizer adds around a sequence."""
    unique = list(dict.fromkeys(texts))  # the text that a template writes between turns is always the same
    ids: dict[str, list[int]] = {}
    batch: list[str] = []
    characters = 0
    for number, text in enumerate(unique, 1):
        batch.append(text)
        characters += len(text)
        if characters > CHARACTERS_AT_ONCE or number == len(unique):
            ids.update(zip(batch, _encode_batch(batch, tokenizer), strict=True))
            batch, characters = [], 0
    return [ids[text] for text in texts]


def _encode_batch(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if backend.truncation or backend.padding:  # a tokenizer.json may set them
        backend.no_truncation()
        backend.no_padding()
    # tokenizer(...) also builds masks, offsets and objects for each text, which takes a third of the time.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def check_trained(record: EncodedRecord, end: int) -> None:
    """Check that a record trains an answer and its end.

    Args:
        end: the id of the token that ends an answer.

    Raises:
        BadRecord: no token is trained, or none of the trained tokens is `end`.
    """
    if not record.trained[1:].any():  # the first token is never predicted
        raise BadRecord("no token is trained, expected an answer")
    if not (record.ids[record.trained] == end).any():
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
    """Yield the ids (n,) int32 of each stretch, and whether a document ends with it; then the separator is the last id."""
    batch: list[Fragment] = []
    characters = 0
    for stretch in _split_into_stretches(fragments, tokenizer):
        batch.append(stretch)
        characters += len(stretch[0])
        if characters > CHARACTERS_AT_ONCE or len(batch) == DOCUMENTS_AT_ONCE:
            yield from _encode_stretches(batch, tokenizer, separator)
            batch, characters = [], 0
    yield from _encode_stretches(batch, tokenizer, separator)


def _encode_stretches(
    batch: list[Fragment], tokenizer: "PreTrainedTokenizerBase", separator: int
) -> Iterator[tuple[np.ndarray, bool]]:
    for ids, (_, ends) in zip(encode_strings([text for text, _ in batch], tokenizer), batch, strict=True):
        yield np.array([*ids, separator] if ends else ids, dtype=np.int32), ends


def _split_into_stretches(fragments: Iterable[Fragment], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Fragment]:
    """Yield the same text in stretches of about STRETCH characters, split at seams."""
    pending = ""
    for text, ends in fragments:
        pending += text
        while len(pending) > STRETCH and (at := find_seam(pending, tokenizer)):
            yield pending[:at], False
            pending = pending[at:]
        if ends:
            yield pending, True
            pending = ""


def find_seam(text: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return where text longer than STRETCH can be split so that both parts have the tokens of the whole; 0 if nowhere.

    A place is chosen if this holds for the text around it. It never holds for a tokenizer that marks the beginning of each text.
    """
    for end in dict.fromkeys((min(STRETCH, len(text) - SEAM_CONTEXT), len(text) - SEAM_CONTEXT)):
        for pattern in SEAMS:
            for match in list(pattern.finditer(text, end - SEAM_SEARCH, end))[:-9:-1]:  # the last eight
                at = match.end()
                left, right = text[at - SEAM_CONTEXT : at], text[at : at + SEAM_CONTEXT]
                whole, first, second = encode_strings([left + right, left, right], tokenizer)
                if whole == first + second:
                    return at
    return 0
