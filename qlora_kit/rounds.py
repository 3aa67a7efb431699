"""What was said in a conversation, and how training and the chat template read it."""

from dataclasses import dataclass

from qlora_kit.config import GenerationSettings
from qlora_kit.data.chat_template import Message


@dataclass(frozen=True)
class Round:
    """An input and its answer, with all that it takes to ask again."""

    prompt: str
    ids: list[int]
    settings: GenerationSettings
    seed: int
    answer: str
    cut: bool  # by Ctrl+C or at max_new_tokens


def messages(rounds: list[Round], system: str) -> list[Message]:
    """Rounds as training reads them: an answer that was cut is context only, since its end would be no end."""
    said: list[Message] = [{"role": "system", "content": system}] if system else []
    for one in worded(rounds):
        answer = {"role": "assistant", "content": one.answer}
        said += [{"role": "user", "content": one.prompt}, answer | {"weight": 0} if one.cut else answer]
    return said


def worded(rounds: list[Round]) -> list[Round]:
    """Those whose answer has words: training knows no empty answers."""
    return [said for said in rounds if said.answer.strip()]
