"""Find what a tokenizer puts around a text, and the separator of documents, which is not always the end-of-sequence token."""

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.errors import UserError
from qlora_kit.model.tokenizer import find_frame, separator_id


def test_the_separator_ends_a_text_and_not_a_turn(tiny_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    assert tokenizer.eos_token == "<|im_end|>"  # as in Qwen's chat models: it ends a turn
    assert tokenizer.decode([separator_id(tokenizer)]) == "<|endoftext|>"


def plain_tokenizer(*added: str, around: str = "$A", **ends):
    """Return a tokenizer without <|endoftext|>; unknown words have the id of <unk>.

    Args:
        around: what the tokenizer puts around a text `$A`.
    """
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    words.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    special = [(token, words.token_to_id(token)) for token in added]
    words.post_processor = TemplateProcessing(single=around, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **ends)


@pytest.mark.parametrize(
    ("added", "eos", "separator"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),  # Llama 3, Instruct
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>", "<|end_of_text|>"),  # Llama 3
        (["<s>", "</s>", "<|im_end|>"], "<|im_end|>", "</s>"),  # Mistral, trained on ChatML
        (["</s>", "<|endoftext|>", "<|end|>"], "<|endoftext|>", "<|endoftext|>"),  # Phi 3
        (["<bos>", "<eos>", "<end_of_turn>"], "<end_of_turn>", "<eos>"),  # Gemma
        (["<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"], "<|END_OF_TURN_TOKEN|>", "<EOS_TOKEN>"),  # Command R
        (["<|endoftext|>", "<|return|>", "<|end|>"], "<|return|>", "<|endoftext|>"),  # gpt-oss
        (["<｜end▁of▁sentence｜>", "<｜User｜>"], "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # DeepSeek
        (["[|endofturn|]"], "[|endofturn|]", "[|endofturn|]"),  # no other end is known
    ],
)
def test_the_end_of_a_text_is_found_by_name(added, eos, separator):
    tokenizer = plain_tokenizer(*added, eos_token=eos)
    assert tokenizer.convert_ids_to_tokens(separator_id(tokenizer)) == separator


def test_what_the_tokenizer_puts_around_a_text_is_found_and_its_end_is_the_separator():
    tokenizer = plain_tokenizer("[CLS]", "[SEP]", "</s>", around="[CLS] $A [SEP]", eos_token="</s>")
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in find_frame(tokenizer)] == [["[CLS]"], ["[SEP]"]]
    assert tokenizer.convert_ids_to_tokens(separator_id(tokenizer)) == "[SEP]"
    assert find_frame(plain_tokenizer("<s>", bos_token="<s>")) == ([], [])  # it has the token and does not put it there


def test_without_endoftext_the_end_of_sequence_token_is_the_separator():
    assert separator_id(plain_tokenizer(eos_token="</s>")) == 2


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused():
    with pytest.raises(UserError, match=r"model\.name: .*end-of-sequence"):
        separator_id(plain_tokenizer())
