"""Source -> tokens on disk -> blocks of equal length for the Trainer.

Running text is one stream: every document is followed by the separator token, which is trained like any other token, so that
the model learns where a text ends. The stream is cut into blocks; only the tail that fills no block is left out. Records (chats,
instructions) stay whole and are packed into blocks (packing.py). Either way labels go by position, and tokens are kept in a
cache, so that the second run with the same data begins at once. Reading: sources.py; tokenizing: encoding.py.
"""

import errno
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from qlora_kit.config import Config, DataSettings
from qlora_kit.data.blocks import RecordBlocks, TextBlocks, TrainingBlocks, build_text_blocks
from qlora_kit.data.documents import Fragments, choose_held_out, hold_out, locate_errors
from qlora_kit.data.formats import Piece
from qlora_kit.data.packing import build_record_blocks
from qlora_kit.data.source import Source, is_file_name, open_source
from qlora_kit.data.token_cache import Tokens, TokenWriter, find_cache_folder, read_tokens, write_tokens
from qlora_kit.data.tokenizing import (
    CHARACTERS_AT_ONCE,
    check_trained,
    encode_documents,
    encode_records,
    find_end_id,
    render_record,
)
from qlora_kit.errors import UserError
from qlora_kit.model.tokenizer import padding_id, separator_id, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS_AT_ONCE = 1024
LAYOUT = 1  # of the cache; counted up when the same source is to be tokenized otherwise


# A source as tokens


def load_blocks(
    config: Config, tokenizer: "PreTrainedTokenizerBase", key: str = "data.dataset"
) -> tuple[TrainingBlocks, TrainingBlocks | None]:
    """Training and evaluation blocks of `data.max_length` tokens.

    Args:
        key: what messages call the data set.

    Raises:
        UserError: a source cannot be read, a record of it is wrong, or it is too short for one block.
    """
    data = config.data
    source = open_source(data, data.names, data.train_split, key)
    if isinstance(data.eval_split, float):
        share = (data.eval_split, config.training.seed)
        train, evaluation = (_hold_out_text if source.is_text else _hold_out_records)(source, data, tokenizer, share)
        return train.take(data.max_train_samples), evaluation.take(data.max_eval_samples)
    train = source_blocks(source, data, tokenizer, key).take(data.max_train_samples)
    if data.eval_split is None:
        return train, None
    names = [data.eval_split] if is_file_name(data.eval_split) else data.names
    other = open_source(data, names, data.eval_split, "data.eval_split")
    return train, source_blocks(other, data, tokenizer, "data.eval_split").take(data.max_eval_samples)


def source_blocks(source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase", key: str) -> TrainingBlocks:
    """All of a source as blocks of `data.max_length` tokens; `key` is what messages call it."""
    if source.is_text:
        return build_text_blocks(tokenize_documents(source, source.documents, tokenizer), data.max_length, key)
    stored = tokenize_records(source, data, tokenizer)
    return build_record_blocks(stored, range(len(stored)), data, padding_id(tokenizer), key)


def _hold_out_text(
    source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase", share: tuple[float, int]
) -> tuple[TextBlocks, TextBlocks]:
    @cache
    def parts() -> tuple[Fragments, Fragments]:  # reads the source, so only when the tokens are not in the cache
        return hold_out(source.documents, *share)

    train = tokenize_documents(source, lambda: parts()[0](), tokenizer, ("train", *share))
    held_out = tokenize_documents(source, lambda: parts()[1](), tokenizer, ("held out", *share))
    return build_text_blocks(train, data.max_length, "data.dataset"), build_text_blocks(
        held_out, data.max_length, "data.eval_split"
    )


def _hold_out_records(
    source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase", share: tuple[float, int]
) -> tuple[RecordBlocks, RecordBlocks]:
    stored = tokenize_records(source, data, tokenizer)
    if len(stored) < 2:
        raise UserError(
            "data.eval_split", share[0], "is a share of a single record, which cannot be divided", "use null, or a file"
        )
    chosen = choose_held_out(len(stored), *share)
    train = [number for number in range(len(stored)) if number not in chosen]
    pad = padding_id(tokenizer)
    return (
        build_record_blocks(stored, train, data, pad, "data.dataset"),
        build_record_blocks(stored, sorted(chosen), data, pad, "data.eval_split"),
    )


def tokenize_documents(
    source: Source, documents: Fragments, tokenizer: "PreTrainedTokenizerBase", part: tuple[Any, ...] = ("all",)
) -> Tokens:
    """Documents as tokens, a separator after each; from the cache where this `part` of the source is there already."""
    separator = separator_id(tokenizer)

    def write(writer: TokenWriter) -> None:
        for ids, ends in encode_documents(documents(), tokenizer, separator):
            writer.append(ids)
            if ends:
                writer.end_document()
        writer.about = {"join_rule": source.find_join_rule()}

    return _read_or_write(_compute_key(source, tokenizer, separator, *part), write)


def tokenize_records(source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Records as tokens, trained or not; from the cache where they are there already.

    Raises:
        UserError: a record of a wrong form, or one that would train on nothing or never its end of turn.
    """

    def write(writer: TokenWriter) -> None:
        ends = set()
        for batch in _render_batches(source, data, tokenizer):
            for rendered, record in zip(batch, encode_records([rendered.pieces for rendered in batch], tokenizer), strict=True):
                with locate_errors(rendered.name, rendered.place):
                    check_trained(record, rendered.end)
                writer.append(record.ids, record.trained)
                writer.end_document()
                ends.add(rendered.end)
        writer.about = {"formats": source.formats, "end_ids": sorted(ends)}

    return _read_or_write(_compute_key(source, tokenizer, tokenizer.eos_token_id, tokenizer.chat_template, data.train_on), write)


class RenderedRecord(NamedTuple):
    """A record ready to be tokenized."""

    name: str  # of its file
    place: str  # in the file
    pieces: list[Piece]
    end: int  # the token that ends its answers


def _render_batches(source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[RenderedRecord]]:
    batch: list[RenderedRecord] = []
    characters = 0
    for part, place, record in source.records():
        with locate_errors(part.name, place):
            pieces = render_record(record, part.format, tokenizer, data.text_field, data.train_on)
            batch.append(RenderedRecord(part.name, place, pieces, find_end_id(part.format, tokenizer)))
        characters += sum(len(piece.text) for piece in pieces)
        if len(batch) == RECORDS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    yield batch


def _read_or_write(key: str, write: Callable[[TokenWriter], None]) -> Tokens:
    folder = find_cache_folder() / key
    if (found := read_tokens(folder)) is None:
        try:
            with write_tokens(folder) as writer, _create_progress(writer):
                write(writer)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR):
                raise
            problem = f"cannot be written ({error.strerror})"
            raise UserError("HF_DATASETS_CACHE", folder.parent, problem, "free space there, or use another folder") from None
        found = read_tokens(folder)
    assert found is not None
    return found


def _create_progress(writer: TokenWriter) -> Progress:
    """Shows on a terminal how far the writer is."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("Tokenizing: {task.fields[writer].tokens:,} tokens"), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    progress.add_task("", writer=writer)
    return progress


def _compute_key(source: Source, tokenizer: "PreTrainedTokenizerBase", *settings: Any) -> str:
    said = (LAYOUT, source.fingerprint, tokenizer_fingerprint(tokenizer), settings)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]
