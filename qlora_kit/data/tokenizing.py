"""Records and running text -> token ids, and which of them are trained; a record cut to length or dropped.

Labels go by position, never by token id: a pad, separator or end token is trained where it stands in an answer. Each piece of a
record is tokenized by itself, as a prompt is when the adapter is used, so that no token joins the end of a prompt with the
beginning of its answer. Running text is tokenized a stretch at a time, with the tokens that the whole would give.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.data.chat_template import find_end_of_turn
from qlora_kit.data.formats import READERS, Piece, TrainOn, render_chat, render_instruction, require_text
from qlora_kit.errors import BadRecord

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
TooLong = Literal["cut", "drop"]
Fragment = tuple[str, bool]  # a stretch of a document, and whether the document ends with it
LONGEST_WORD = 1_000_000  # characters without a space or line end; more is no text, and tokenizers take all memory for it

STRETCH = 2**16  # characters of running text that are tokenized at once: many stretches keep all cores busy
CHARACTERS_AT_ONCE = 2**20  # so that the tokenizer's objects, a hundred bytes a token, take little
DOCUMENTS_AT_ONCE = 1024
SEAM_SEARCH = 2**12  # characters at the end of a stretch in which a place to cut is looked for
SEAM_CONTEXT = 256  # characters on both sides of a cut by which it is checked
SEAMS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?= \S)"))  # a line's end, else a word's


@dataclass(frozen=True)
class EncodedRecord:
    """One record: ids (length,) int32, and whether each is trained, (length,) bool."""

    ids: "np.ndarray"
    trained: "np.ndarray"

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self) -> "np.ndarray":
        """(length,) int64: the id where it is trained, else -100; the first is predicted from nothing. The model shifts them."""
        import numpy as np

        labels = np.where(self.trained, self.ids, IGNORED).astype(np.int64)
        labels[:1] = IGNORED
        return labels


# Records


def render_record(record: dict[str, Any], kind: str, tokenizer: Any, text_field: str, train_on: TrainOn) -> list[Piece]:
    """A record of format `kind` as it is rendered for training.

    Raises:
        BadRecord: it is not of that format, or holds what is no text.
    """
    if kind == "instruction":
        text = require_text(record.get(text_field), text_field)
        pieces = render_instruction(text, tokenizer.eos_token or "", train_on)
    else:
        pieces = render_chat(READERS[kind](record), tokenizer, train_on)
    for piece in pieces:
        check_word_length(piece.text)
    return pieces


def find_end_id(kind: str, tokenizer: Any) -> int:
    """The token that ends an answer in records of format `kind`.

    Raises:
        BadRecord: there is none.
    """
    return tokenizer.eos_token_id if kind == "instruction" else tokenizer.convert_tokens_to_ids(find_end_of_turn(tokenizer))


def check_word_length(text: str) -> None:
    """
    Raises:
        BadRecord: more than LONGEST_WORD characters without a space.
    """
    if len(text) > LONGEST_WORD and max(map(len, text.split()), default=0) > LONGEST_WORD:
        raise BadRecord(f"the text holds more than {LONGEST_WORD:,} characters without a space or line end")


def encode_records(records: list[list[Piece]], tokenizer: "PreTrainedTokenizerBase") -> list[EncodedRecord]:
    """Tokens of each record; the Rust tokenizer spreads all pieces over all cores."""
    import numpy as np

    records = [
        [Piece(text, piece.trained) for piece in pieces for text in _split_long_text(piece.text, tokenizer)] for pieces in records
    ]
    tokens = iter(encode_strings([piece.text for pieces in records for piece in pieces], tokenizer))
    encoded = []
    for pieces in records:
        parts = [next(tokens) for _ in pieces]
        trained = np.repeat(np.array([piece.trained for piece in pieces], dtype=bool), [len(part) for part in parts])
        encoded.append(EncodedRecord(np.array([token for part in parts for token in part], dtype=np.int32), trained))
    return encoded


def _split_long_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """A very long text in stretches that have the tokens of the whole."""
    return [text] if len(text) <= STRETCH else [part for part, _ in _split_into_stretches([(text, True)], tokenizer)]


def encode_strings(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Ids of each text, without the special tokens that a tokenizer puts around a sequence."""
    unique = list(dict.fromkeys(texts))  # what a template puts between turns is the same in all
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
    if backend.truncation or backend.padding:  # a tokenizer.json may bring them
        backend.no_truncation()
        backend.no_padding()
    # Past tokenizer(...), which builds masks, offsets and objects for each text: a third of the time.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def check_trained(record: EncodedRecord, end: int) -> None:
    """Refuse a record that teaches nothing, or never to stop.

    Args:
        end: the token that ends an answer.

    Raises:
        BadRecord: no token is trained; or none of the trained ones is `end`.
    """
    if not record.trained[1:].any():  # the first token is predicted from nothing
        raise BadRecord("no token is trained, expected an answer")
    if not (record.ids[record.trained] == end).any():
        raise BadRecord("no end-of-turn token is trained, so the model would not learn to stop")


def shorten(record: EncodedRecord, max_length: int, too_long: TooLong, train_on: TrainOn = "assistant") -> EncodedRecord | None:
    """The record in at most `max_length` tokens: cut from the left, where the prompt is, or None where it is dropped.

    A record whose last answer does not fit whole behind a token of its prompt is dropped either way: half an answer is no
    answer. Where prompts are trained as well, there is no such border, and the end of the record stays.
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
    """Where the last stretch of trained tokens ends."""
    return int(record.trained.nonzero()[0].max(initial=-1)) + 1


# Running text


def encode_documents(
    fragments: Iterable[Fragment], tokenizer: "PreTrainedTokenizerBase", separator: int
) -> Iterator[tuple["np.ndarray", bool]]:
    """Fragments of documents -> ids (n,) int32 of a stretch, and whether a document ends with it: then the separator is last."""
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
) -> Iterator[tuple["np.ndarray", bool]]:
    import numpy as np

    for ids, (_, ends) in zip(encode_strings([text for text, _ in batch], tokenizer), batch, strict=True):
        yield np.array([*ids, separator] if ends else ids, dtype=np.int32), ends


def _split_into_stretches(fragments: Iterable[Fragment], tokenizer: "PreTrainedTokenizerBase") -> Iterator[Fragment]:
    """The same text in stretches of about STRETCH characters, wherever the tokenizer allows a cut."""
    waiting = ""
    for text, ends in fragments:
        waiting += text
        while len(waiting) > STRETCH and (at := find_seam(waiting, tokenizer)):
            yield waiting[:at], False
            waiting = waiting[at:]
        if ends:
            yield waiting, True
            waiting = ""


def find_seam(text: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Where text longer than STRETCH may be cut so that the tokens of both parts are those of the whole; 0 where no place is.

    A place is taken when it is so for the text around it. For a tokenizer that marks the beginning of each text there is none.
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
