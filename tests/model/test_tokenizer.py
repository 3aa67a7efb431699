"""Find what a tokenizer puts around a text, and the separator of documents; give it another chat template."""

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model.tokenizer import find_frame, load_tokenizer, read_chat_template, separator_id


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


# data.chat_template


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory). Use a Jinja file, or null"),
        (b"", "is empty. Use a Jinja file, or null"),
        (b"caf\xe9", "is not UTF-8 text (byte 3). Save it as UTF-8."),
        (b"one\n{% if %}", "is no Jinja template (line 2: Expected an expression"),
        (b"{{ messages | nothing }}", "is no Jinja template (line 1: No filter named 'nothing'"),
        (b"{{" + b"(" * 5000 + b"1" + b")" * 5000 + b"}}", "is no Jinja template (maximum recursion depth"),
        (b"{{ '" + b"x" * 2**20 + b"' }}", "cannot be read (more than 1,048,576 bytes)"),
    ],
)
def test_a_file_that_is_no_template_is_one_problem(tmp_path, content, reason):
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_chat_template(str(file))
    (line,) = caught.value.lines
    assert line.startswith(f"data.chat_template: {file}: {reason}")


def test_a_template_of_ones_own_replaces_that_of_the_tokenizer(tmp_path, tiny_dir, monkeypatch):
    template = "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    (tmp_path / "own.jinja").write_bytes(b"\xef\xbb\xbf" + template.encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer = load_tokenizer(ModelSettings(name=str(tiny_dir)), "~/own.jinja")
    assert tokenizer.chat_template == template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}] * 2, tokenize=False) == "[user]Hi"
