"""Compare a tokenizer with a model's embedding, which must have a row for each token; imports no torch by itself."""

from typing import TYPE_CHECKING, Any

from qlora_kit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens that stand for what is no text. Gemma 3 1B, which reads text alone, has the tokenizer of its larger sisters with them.
NO_TEXT = ("image_token", "video_token", "audio_token")
RESIZE = "call resize_token_embeddings(len(tokenizer)) on the model and save it, or"  # the beginning of a remedy


def tokens_beyond(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> tuple[list[str], int]:
    """Return the tokens that the model's embedding has no row for, in the order of their ids, and its number of rows."""
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)  # may be more than the tokenizer has tokens, for speed
    named = {str(token) for name, token in tokenizer.special_tokens_map.items() if name in NO_TEXT}
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [token for token, number in tokens if number >= rows and token not in named], rows


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", name: str) -> None:
    """Check that a base model has an embedding for each token of its tokenizer; raises UserError if not.

    Args:
        model: the base model, or its skeleton.
    """
    beyond, rows = tokens_beyond(tokenizer, model)
    if beyond:
        raise UserError("model.name", name, f"has {describe_beyond(beyond, rows)}", f"{RESIZE} restore the tokenizer's files")


def describe_beyond(beyond: list[str], rows: int) -> str:
    """Return the words of an error message for tokens that have no row."""
    more = f" and {len(beyond) - 3:,} more" if len(beyond) > 3 else ""
    number = f"{len(beyond):,} token{'s' * (len(beyond) > 1)} ({', '.join(beyond[:3])}{more})"
    return f"{number} beyond the {rows:,} rows of the embedding"
