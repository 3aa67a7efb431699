"""What the server of tests/forked.py imports before it forks: all that the commands import."""

import gc

from qlora_kit.cli import prepare_libraries

prepare_libraries()

import bitsandbytes  # noqa: E402, F401
import datasets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import transformers.models.qwen2.modeling_qwen2  # noqa: E402, F401

import inference_example  # noqa: E402, F401
import train_qlora  # noqa: E402, F401

gc.collect()
gc.freeze()  # forked processes then share these pages
