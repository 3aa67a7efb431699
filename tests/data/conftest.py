"""Fixtures of the tests of data/."""

import copy

import numpy as np
import pytest
from transformers import AutoTokenizer

from qlora_kit.data.dataset import tokenize_documents
from qlora_kit.data.formats import from_messages
from qlora_kit.data.rendering import render_chat
from tests.data.builders import as_jsonl, source_of


@pytest.fixture(scope="session")
def tokenizer(tiny_dir):
    """Return the embedded model's tokenizer."""
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a new file in the test's folder and returns its path."""

    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def stream_of(write, tokenizer):
    """Return a function that gives the ids of documents as one stream, through a file of records and the cache."""

    def stream_of(documents: list[str], tokenizer=tokenizer) -> np.ndarray:
        source = source_of(write("documents.jsonl", as_jsonl(*({"text": document} for document in documents))))
        return tokenize_documents(source, source.documents, tokenizer).ids

    return stream_of


@pytest.fixture
def render(tokenizer):
    """Return a function that renders turns and other keys of a record with a template, and gives the text and the Rendering."""

    def render(template: str, *turns: dict, **keys):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        rendering = render_chat(from_messages({"messages": list(turns)} | keys), other)
        return "".join(piece.text for piece in rendering.pieces), rendering

    return render
