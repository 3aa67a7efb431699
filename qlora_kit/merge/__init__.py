"""Merge an adapter into its base model: `merge(adapter, output)`, or python -m qlora_kit.merge."""

from qlora_kit.merge.command import MergeResult, merge

__all__ = ["MergeResult", "merge"]
