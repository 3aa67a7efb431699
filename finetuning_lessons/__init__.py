"""Fine-tuning from scratch: one lesson a file. Each runs as `python -m finetuning_lessons.NAME`."""

from qlora_kit.cli import prepare_libraries

prepare_libraries()  # before a lesson imports them, whichever is imported first
