"""Chat templates that write tools, calls and thoughts, with what public templates do differently as parts."""

HEAD = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}WORDS"
    "{% for call in m.tool_calls %}<tool_call>CALL</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUOTED = "{{ m.content | tojson if m.role == 'tool' else m.content or '' }}"  # a tool's result as JSON
OBJECT = "{{ call.function.name }} {{ call.function.arguments | tojson }}"
TEXT = "{{ call.function.name + ' ' + call.function.arguments }}"
ALWAYS_WORDS = "{{ m['content'] + '' }}"  # fails for null
ONLY_WORDS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ tools[:0] if tools }}"


def template(words: str = "{{ m.content or '' }}", call: str = OBJECT) -> str:
    return HEAD + TURN.replace("WORDS", words).replace("CALL", call)
