"""Fine-tuning from scratch: one lesson a file. Each runs as `python -m finetuning_lessons.NAME`."""

from qlora_kit.cli import prepare_libraries

prepare_libraries()  # must run before any lesson imports the libraries
