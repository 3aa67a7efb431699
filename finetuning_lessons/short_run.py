"""The text split and the thread setting of the lessons that compare short runs of the embedded model."""

from typing import NamedTuple

import torch

from finetuning_lessons.lesson import load_blocks

LENGTH = 128  # tokens of a block
HELD_OUT = 16  # blocks at the end of the text


class Text(NamedTuple):
    """Blocks of token ids to train and to evaluate on, (blocks, LENGTH) each."""

    train: torch.Tensor
    held_out: torch.Tensor


def load_split(seed: int | None = None) -> Text:
    """Return the articles' blocks, the last HELD_OUT of them for evaluation, the others in the order of the seed or the text."""
    blocks = load_blocks(LENGTH)
    train = blocks[:-HELD_OUT]
    if seed is not None:
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    return Text(train, blocks[-HELD_OUT:])


def use_one_thread() -> None:
    """Compute with one thread: the embedded model's products are so small that two would mostly wait for each other."""
    torch.set_num_threads(1)
