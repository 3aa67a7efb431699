"""Turn strings into token ids: texts from their beginning, and stretches from the middle of a text.

Some tokenizers mark where a text begins, with a space (SentencePiece) or a special token. The middle of a text gets no such mark.
Long text is encoded in stretches, which together give the tokens of the whole text.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from qlora_kit.model.tokenizer import find_frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fragment = tuple[str, bool]  # a piece of a document, and whether the document ends with it
Stretch = tuple[str, bool]  # a part of a text that is encoded on its own, and whether it stands behind other text

STRETCH = 2**16  # characters of running text in one string: many strings keep all cores busy
CHARACTERS_AT_ONCE = 2**20  # limits the tokenizer's objects, which take a hundred bytes a token
SEAM_SEARCH = 2**12  # characters at the end of a stretch that are searched for a seam
SEAM_CONTEXT = 256  # characters on each side of a seam by which it is checked
SEAMS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?= \S)"))  # the end of a line, or of a word
NEUTRAL = ("\n", "\ue000", ".")  # texts that may stand before a stretch; the second is of Unicode's private use area


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids of a text that may go on: with the tokens that begin a text, and without those that end it."""
    return begin_text(encode_strings([text], tokenizer)[0], find_frame(tokenizer)[0])


def begin_text(ids: list[int], beginning: list[int]) -> list[int]:
    """Return the ids of a text behind those that begin every text, unless it has them already."""
    return ids if ids[: len(beginning)] == beginning else beginning + ids


def encode_stretches(stretches: list[Stretch], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the ids of each stretch; joined, those of consecutive stretches are the ids of their text if no token joins them."""
    before, skipped = _find_neutral_text(tokenizer)
    encoded = encode_strings([before + text if continues else text for text, continues in stretches], tokenizer)
    if not before:
        return encoded
    for number, (text, continues) in enumerate(stretches):
        if continues and encoded[number][: len(skipped)] == skipped:
            encoded[number] = encoded[number][len(skipped) :]
        elif continues:  # a token joins the neutral text with this one
            (encoded[number],) = encode_strings([text], tokenizer)
    return encoded


@lru_cache(maxsize=8)
def _find_neutral_text(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[int]]:
    """Return text to encode a stretch behind, and its ids; no text if the tokenizer does not mark where a text begins."""
    for text in NEUTRAL:
        once, twice, word, both = encode_strings([text, text + text, "a", text + "a"], tokenizer)
        if len(twice) > len(once) and twice[: len(once)] == once:  # the tokenizer neither drops nor joins it
            break
    return ("", []) if both == once + word else (text, once)


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


def split_into_stretches(
    fragments: Iterable[Fragment], tokenizer: "PreTrainedTokenizerBase", continues: bool = False
) -> Iterator[tuple[Stretch, bool]]:
    """Yield the same text in stretches of about STRETCH characters, split at seams, and whether a document ends with each.

    Args:
        continues: the first fragment stands behind other text.
    """
    pending = ""
    for text, ends in fragments:
        pending += text
        while len(pending) > STRETCH and (at := find_seam(pending, tokenizer)):
            yield (pending[:at], continues), False
            pending, continues = pending[at:], True
        if ends:
            yield (pending, continues), True
            pending, continues = "", False


def find_seam(text: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return where text longer than STRETCH can be split so that both parts have the tokens of the whole; 0 if nowhere.

    A place is chosen if this holds for the text around it.
    """
    for end in dict.fromkeys((min(STRETCH, len(text) - SEAM_CONTEXT), len(text) - SEAM_CONTEXT)):
        for pattern in SEAMS:
            for match in list(pattern.finditer(text, end - SEAM_SEARCH, end))[:-9:-1]:  # the last eight
                at = match.end()
                if all(check_seams([(text[at - SEAM_CONTEXT : at], text[at : at + SEAM_CONTEXT])], tokenizer)):
                    return at
    return 0


def check_seams(places: list[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase") -> list[bool]:
    """Return for each pair of consecutive texts whether together they have the tokens of the whole, within another text."""
    stretches = [(text, True) for left, right in places for text in (left + right, left, right)]
    encoded = iter(encode_stretches(stretches, tokenizer))
    return [whole == left + right for whole, left, right in zip(encoded, encoded, encoded, strict=True)]
