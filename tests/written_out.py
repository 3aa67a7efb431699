"""What several test files spell out: a chat template, and documents as they come in fragments."""

# In the manner of Qwen2.5: a system turn of its own where the conversation has none.
DEFAULT_SYSTEM = """\
{% if messages[0].role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def joined(fragments) -> list[str]:
    documents = [""]
    for text, ends in fragments:
        documents[-1] += text
        documents += [""] * ends
    assert documents.pop() == ""  # the last one ended
    return documents
