"""Run python -m qlora_kit.doctor."""

from qlora_kit import cli
from qlora_kit.doctor.command import main

if __name__ == "__main__":
    cli.run(main)
