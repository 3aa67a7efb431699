"""What the lessons that compare short runs of the embedded model share beside lesson.py: the text split, and one thread."""

from typing import NamedTuple

import torch

from finetuning_lessons.lesson import load_blocks

LENGTH = 128  # tokens of a block
HELD_OUT = 16  # blocks at the end of the text


class Text(NamedTuple):
    """Token ids in blocks, (blocks, LENGTH) each."""

    train: torch.Tensor
    held_out: torch.Tensor


def load_split() -> Text:
    """The articles, the last of them held out for evaluation."""
    blocks = load_blocks(LENGTH)
    return Text(blocks[:-HELD_OUT], blocks[-HELD_OUT:])


def use_one_thread() -> None:
    """The embedded model's products are too small to share out: two threads wait for each other longer than they compute."""
    torch.set_num_threads(1)
