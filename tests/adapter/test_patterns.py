"""Patterns of an adapter are matched in this process if they are literal, else in one that is ended."""

import os
import re
from pathlib import Path

import pytest

from qlora_kit.adapter.patterns import match_in_time
from qlora_kit.adapter.settings import LoraFile
from qlora_kit.errors import UserError

ENDLESS = "((a|[a-z_.0-9])+)+!"


@pytest.mark.parametrize("settings, here", [
    (LoraFile(target_modules=["q_proj"], rank_pattern={"layers.0.q_proj": 2}), True),
    (LoraFile(target_modules=r".*\.q_proj"), False),
    (LoraFile(alpha_pattern={r"layers\.[01]\.x": 2}), False),
    (LoraFile(target_modules=[f"x{number}" for number in range(1001)]), False),
])  # fmt: skip
def test_only_literal_patterns_are_matched_in_this_process(settings, here):
    assert (match_in_time(os.getpid, settings, range(1000), Path("a")) == os.getpid()) is here


def test_a_pattern_that_never_ends_is_one_line():
    settings, name = LoraFile(exclude_modules=ENDLESS), "model.layers.0.self_attn.q_proj"
    with pytest.raises(UserError, match=r"^--adapter: a: has patterns .* \(it takes more than 0.2 seconds\)\. Name its modules"):
        match_in_time(lambda: re.fullmatch(ENDLESS, name), settings, [name], Path("a"), seconds=0.2)
