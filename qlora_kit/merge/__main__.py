"""python -m qlora_kit.merge"""

from qlora_kit.merge.command import run

if __name__ == "__main__":
    run()
