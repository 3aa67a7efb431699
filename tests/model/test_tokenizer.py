"""Find the separator of documents, which is not always the tokenizer's end-of-sequence token."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.errors import UserError
from qlora_kit.model.tokenizer import separator_id


def test_the_separator_ends_a_text_and_not_a_turn(tiny_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    assert tokenizer.eos_token == "<|im_end|>"  # as in Qwen's chat models: it ends a turn
    assert tokenizer.decode([separator_id(tokenizer)]) == "<|endoftext|>"


def plain_tokenizer(**ends):
    """Return a tokenizer like Llama's, without <|endoftext|>; unknown words have the id of <unk>."""
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **ends)


def test_without_endoftext_the_end_of_sequence_token_is_the_separator():
    assert separator_id(plain_tokenizer(eos_token="</s>")) == 2


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused():
    with pytest.raises(UserError, match=r"model\.name: .*end-of-sequence"):
        separator_id(plain_tokenizer())
