"""Turn the data settings into training and evaluation blocks of one length.

Running text is one stream: the separator token follows every document, and is trained like any other token, so that the model
learns where a text ends. The stream is cut into blocks. Records (chats, instructions) stay whole and are packed into blocks. The
tokens are kept in a cache on disk, so that a second run with the same data begins at once.
"""

import hashlib
import os
import pickle
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from qlora_kit.config import Config, DataSettings
from qlora_kit.data.apply_template import call_limited
from qlora_kit.data.blocks import RecordBlocks, TextBlocks, TrainingBlocks, build_text_blocks
from qlora_kit.data.chat_template import find_left_out_thought
from qlora_kit.data.documents import Fragments, choose_held_out, hold_out, locate_errors
from qlora_kit.data.encoding import CHARACTERS_AT_ONCE
from qlora_kit.data.notes import NoteCollector
from qlora_kit.data.packing import build_record_blocks
from qlora_kit.data.rendering import Rendering, TrainOn
from qlora_kit.data.source import Source, open_source
from qlora_kit.data.splits import is_file_name
from qlora_kit.data.token_cache import DamagedTokens, Tokens, TokenWriter, find_cache_folder, read_tokens, write_tokens
from qlora_kit.data.tokenizing import (
    EncodedRecord,
    check_trained,
    encode_documents,
    encode_records,
    find_all_end_ids,
    render_record,
)
from qlora_kit.errors import BadRecord, UserError
from qlora_kit.model.tokenizer import find_frame, padding_id, separator_id, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS_AT_ONCE = 1024
MOST_WORKERS = 4
SECONDS_AT_ONCE = 1.0  # of rendering
LAYOUT = 4  # version of the cache; increase it when the same source would be tokenized differently


def load_blocks(
    config: Config, tokenizer: "PreTrainedTokenizerBase", key: str = "data.dataset"
) -> tuple[TrainingBlocks, TrainingBlocks | None]:
    """Return training and evaluation blocks of `data.max_length` tokens; no evaluation blocks if `data.eval_split` is null.

    Args:
        key: the flag or config key of the data set, for messages.

    Raises:
        UserError: a source cannot be read, a record is wrong, or a source is too short for one block.
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
    """Return all of a source as blocks of `data.max_length` tokens; `key` is its flag or config key, for messages."""
    if source.is_text:
        return build_text_blocks(tokenize_documents(source, source.documents, tokenizer), data.max_length, key)
    stored = tokenize_records(source, data, tokenizer)
    return build_record_blocks(stored, range(len(stored)), data, padding_id(tokenizer), key)


def _hold_out_text(
    source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase", share: tuple[float, int]
) -> tuple[TextBlocks, TextBlocks]:
    @cache
    def split() -> tuple[Fragments, Fragments]:  # reads the source, so only if the tokens are not in the cache
        return hold_out(source.documents, *share)

    train = tokenize_documents(source, lambda: split()[0](), tokenizer, ("train", *share))
    held_out = tokenize_documents(source, lambda: split()[1](), tokenizer, ("held out", *share))
    length = data.max_length
    return build_text_blocks(train, length, "data.dataset"), build_text_blocks(held_out, length, "data.eval_split")


def _hold_out_records(
    source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase", share: tuple[float, int]
) -> tuple[RecordBlocks, RecordBlocks]:
    stored = tokenize_records(source, data, tokenizer)
    if len(stored) < 2:
        problem = "is a share of a single record, which cannot be divided"
        raise UserError("data.eval_split", share[0], problem, "use null, or a file")
    held_out = choose_held_out(len(stored), *share)
    train = [number for number in range(len(stored)) if number not in held_out]
    pad = padding_id(tokenizer)
    return (
        build_record_blocks(stored, train, data, pad, "data.dataset"),
        build_record_blocks(stored, sorted(held_out), data, pad, "data.eval_split"),
    )


def tokenize_documents(
    source: Source, documents: Fragments, tokenizer: "PreTrainedTokenizerBase", part: tuple[str | float, ...] = ("all",)
) -> Tokens:
    """Return documents as tokens, with a separator after each; from the cache if this `part` of the source is in it."""
    separator = separator_id(tokenizer)

    def write(writer: TokenWriter) -> None:
        for ids, ends in encode_documents(documents(), tokenizer, separator):
            writer.append(ids)
            if ends:
                writer.end_document()
        unused = set().union(*(file.unused for file in source.files))
        writer.about = {"join_rule": source.find_join_rule(), "unused_keys": sorted(unused)}

    return _read_or_write(_compute_key(source, tokenizer, separator, find_frame(tokenizer), *part), write)


def tokenize_records(source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Return records as tokens, trained or not; from the cache if they are in it.

    Raises:
        UserError: a record is malformed, or trains no token or no end of turn.
    """

    def write(writer: TokenWriter) -> None:
        ends: set[int] = set()
        notes = NoteCollector()
        for name, place, prepared in _prepare_records(source, data, tokenizer):
            writer.append(prepared.record.ids, prepared.record.trained)
            writer.end_document()
            ends.update(prepared.ends)
            notes.add(prepared.rendering, name, place)
        thought = find_left_out_thought(tokenizer) if source.formats != ["instruction"] else ""
        writer.about = {"formats": source.formats, "end_ids": sorted(ends), "left_out_thought": thought} | notes.as_json()

    return _read_or_write(_compute_key(source, tokenizer, tokenizer.eos_token_id, tokenizer.chat_template, data.train_on), write)


class WaitingRecord(NamedTuple):
    """A record as it was read."""

    name: str  # of its file
    place: str  # in the file
    kind: str  # its format
    record: bytes  # pickled


class PreparedRecord(NamedTuple):
    """A record as it is trained."""

    record: EncodedRecord
    ends: tuple[int, ...]  # ids of the tokens that end its answers
    rendering: Rendering  # without its pieces


def _prepare_records(
    source: Source, data: DataSettings, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, str, PreparedRecord]]:
    """Yield each record with its file and place. Batches are prepared in several processes at a time, one for a core."""
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, MOST_WORKERS)
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[list[tuple[str, str, PreparedRecord]]]] = deque()
        try:
            for number, batch in enumerate(_read_batches(source)):
                # No more are under way than there are workers, so that each has a worker of its own.
                under_way.append(pool.submit(_prepare_batch, batch, data, tokenizer, number % workers))
                if len(under_way) == workers:
                    yield from under_way.popleft().result()
        except UserError:  # the source cannot be read any further; a mistake further up comes first
            for future in under_way:
                future.result()
            raise
        for future in under_way:
            yield from future.result()


def _read_batches(source: Source) -> Iterator[list[WaitingRecord]]:
    waiting: list[WaitingRecord] = []
    size = 0
    for file, place, record in source.records():
        waiting.append(WaitingRecord(file.name, place, file.format, pickle.dumps(record)))
        size += len(waiting[-1].record)
        if len(waiting) == RECORDS_AT_ONCE or size > CHARACTERS_AT_ONCE:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _prepare_batch(
    waiting: list[WaitingRecord], data: DataSettings, tokenizer: "PreTrainedTokenizerBase", worker: int
) -> list[tuple[str, str, PreparedRecord]]:
    """Return the records prepared, in as many calls of the worker as their sizes ask for."""
    done: list[tuple[str, str, PreparedRecord]] = []
    while rest := waiting[len(done) :]:
        records = [(one.kind, one.record) for one in rest]
        with locate_errors(rest[0].name, f"{rest[0].place} or a later record"):
            results = call_limited(_prepare, tokenizer, records, data.text_field, data.train_on, worker=worker)
        for one, result in zip(rest, results, strict=False):
            with locate_errors(one.name, one.place):
                if isinstance(result, BadRecord):
                    raise result
                done.append((one.name, one.place, result))
    return done


def _prepare(
    tokenizer: "PreTrainedTokenizerBase", records: list[tuple[str, bytes]], text_field: str, train_on: TrainOn
) -> list[PreparedRecord | BadRecord]:
    """Return the first records rendered and encoded, and the error that ends them.

    They are as many as are rendered in SECONDS_AT_ONCE and have CHARACTERS_AT_ONCE: the limits of a worker are those of a call.
    """
    rendered: list[Rendering] = []
    end_ids: list[tuple[int, ...]] = []
    found: BadRecord | None = None
    characters, begun = 0, time.monotonic()
    for kind, record in records:
        try:
            text = render_record(pickle.loads(record), kind, tokenizer, text_field, train_on)
            end_ids.append(find_all_end_ids(kind, tokenizer))
            rendered.append(text)
        except BadRecord as error:
            found = error
            break
        characters += sum(len(piece.text) for piece in text.pieces)
        if characters > CHARACTERS_AT_ONCE or time.monotonic() - begun > SECONDS_AT_ONCE:
            break
    done: list[PreparedRecord | BadRecord] = []
    for encoded, ends, text in zip(encode_records(rendered, tokenizer), end_ids, rendered, strict=True):
        try:
            check_trained(encoded, ends)
        except BadRecord as error:
            return [*done, error]
        done.append(PreparedRecord(encoded, ends, text._replace(pieces=[])))
    return [*done, found] if found else done


def _read_or_write(key: str, write: Callable[[TokenWriter], None]) -> Tokens:
    """Return the tokens that the cache has under `key`; if it has none, or damaged ones, let `write` store them first.

    Raises:
        UserError: the cache's folder cannot be used.
    """
    folder, damage = find_cache_folder() / key, {}
    try:
        try:
            found = read_tokens(folder)
        except DamagedTokens as error:
            damage = {"damaged_cache": str(error)}
            shutil.rmtree(folder)
            found = None
        if found is None:
            with write_tokens(folder) as writer, _create_progress(writer):
                write(writer)
            found = read_tokens(folder)
            assert found is not None
    except (OSError, DamagedTokens) as error:
        place = Path(getattr(error, "filename", None) or folder)
        if not folder.is_relative_to(place) and not place.is_relative_to(folder.parent):
            raise  # of a data file
        problem = f"cannot be used for the cache of tokens ({getattr(error, 'strerror', error)})"
        raise UserError("HF_DATASETS_CACHE", folder.parent, problem, "free space there, or use another folder") from None
    return replace(found, about=found.about | damage)


def _create_progress(writer: TokenWriter) -> Progress:
    """Return a display of the writer's progress, for a terminal only."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("Tokenizing: {task.fields[writer].tokens:,} tokens"), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    progress.add_task("", writer=writer)
    return progress


def _compute_key(source: Source, tokenizer: "PreTrainedTokenizerBase", *settings: object) -> str:
    decisive = (LAYOUT, source.fingerprint, tokenizer_fingerprint(tokenizer), settings)
    return hashlib.sha256(repr(decisive).encode()).hexdigest()[:32]
