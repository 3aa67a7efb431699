"""A tokenizer with tokens that the embedding has no row for."""

import pytest
from transformers import AutoTokenizer

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.skeleton import build_skeleton
from qlora_kit.model.vocabulary import check_vocabulary
from tests.model.saved_models import TINY


def check(tokenizer) -> None:
    check_vocabulary(tokenizer, build_skeleton(ModelSettings(name=str(TINY))), "base")


def test_tokens_beyond_the_embedding_are_named_with_the_way_out():
    """Their ids raised IndexError in training, or a device assert on a GPU."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    check(tokenizer)
    tokenizer.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    with pytest.raises(UserError) as error:
        check(tokenizer)
    (line,) = error.value.lines
    assert line.startswith(
        "model.name: base: has 2 tokens (<tool>, </tool>) beyond the 6,144 rows of the embedding. Call resize_"
    )


def test_an_added_padding_token_counts_too():
    tokenizer = AutoTokenizer.from_pretrained(TINY, pad_token="[PAD]")
    with pytest.raises(UserError, match=r"1 token \(\[PAD\]\) beyond"):
        check(tokenizer)


def test_a_token_that_stands_for_an_image_does_not_count():
    """Gemma 3 1B reads text alone, and has the tokenizer of the models that read images: no text contains that token."""
    check(AutoTokenizer.from_pretrained(TINY, extra_special_tokens={"image_token": "<image_soft_token>"}))
