"""The card in an adapter's folder: its front matter as YAML reads it, its figures as run.json has them, and whose file it is."""

import ast
import copy
import re

import pytest
import yaml

from qlora_kit.config import Config
from qlora_kit.output.model_card import MARK, describe, write_model_card

RUN = {
    "base_model": {"name": "Qwen/Qwen2.5-3B-Instruct", "revision": None, "folder": None},
    "base_commit": "aa8e72537993ba99e69dfaafa59ed015b17504d1",
    "base_weights_sha256": "24b13b98d0ff47cc8448f5c94c69f984",
    "base_quantization": None,
    "trust_remote_code": False,
    "quantization": {"load_in_4bit": True, "quant_type": "nf4", "compute_dtype": "bfloat16", "use_double_quant": True},
    "projections": {"projections": 252, "with_lora": 252},
    "prompt_style": "text",
    "data": {"source": "Salesforce/wikitext", "train_blocks": 4670},
    "seed": 42,
    "config": Config().model_dump(),
    "optimizer_steps": 876,
    "perplexity": {
        "base": {"loss": 2.3, "perplexity": 9.974, "standard_error": 0.21},
        "adapter": {"loss": 2.1, "perplexity": 8.166, "standard_error": 0.17},
        "definition": "exp of the mean loss",
    },
    "versions": {"python": "3.11.7", "peft": "0.21.2"},
    "hardware": ["Device: cuda, NVIDIA H100"],
    "seconds": 3723.4,
}


def changed(**values) -> dict:
    return copy.deepcopy(RUN) | values


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def program(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    ast.parse(code)
    return code


def test_the_card_says_what_the_hub_and_a_reader_need():
    card = describe(RUN)
    stated = front_matter(card)
    assert (stated["library_name"], stated["base_model"]) == ("peft", "Qwen/Qwen2.5-3B-Instruct")
    assert stated["datasets"] == ["Salesforce/wikitext"] and "base_model:adapter:Qwen/Qwen2.5-3B-Instruct" in stated["tags"]
    for part in ("9.974 ± 0.210", "8.166 ± 0.170", "876 steps of 16 sequences", "1:02:03 on cuda, NVIDIA H100", "commit aa8e7253",
                 "rank 16, alpha 32, dropout 0.05, on 252 of 252 projections", "(training_curves.png)"):  # fmt: skip
        assert part in card
    assert "no better" not in card


def test_paths_and_signs_of_local_names_stay_out_of_the_card():
    base = {"name": "/home/ann/`x`\n# y/model: |z", "revision": None, "folder": "/home/ann/`x`\n# y/model: |z"}
    card = describe(changed(base_model=base, base_commit=None, data=RUN["data"] | {"source": ["/home/ann/a.txt", "b.txt"]}))
    assert "/home/ann" not in card and "# A LoRA adapter for `model: |z`\n" in card and "`a.txt`, `b.txt`" in card
    assert front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("values", "part", "absent"),
    [
        ({}, 'bnb_4bit_quant_type="nf4"', "trust_remote_code"),
        ({"prompt_style": "chat", "trust_remote_code": True}, "trust_remote_code=True", "River"),
        ({"prompt_style": "instruction"}, "### Instruction:\\nName", "apply_chat_template"),
        ({"base_quantization": {"quant_type": "nf4"}}, 'dtype="bfloat16"', "BitsAndBytesConfig"),
        ({"quantization": RUN["quantization"] | {"load_in_4bit": False}}, 'dtype="bfloat16"', "BitsAndBytesConfig"),
    ],
)
def test_the_program_loads_the_adapter_as_it_was_trained(values, part, absent):
    code = program(describe(changed(**values)))
    assert part in code and absent not in code


def test_a_run_that_learned_nothing_or_measured_nothing_says_so():
    worse = RUN["perplexity"] | {"adapter": {"loss": 2.4, "perplexity": 11.0, "standard_error": None}}
    assert "no better than the base model" in describe(changed(perplexity=worse))
    assert "no evaluation data" in describe(changed(perplexity=None, base_weights_sha256=None))


def test_a_card_of_the_users_is_never_replaced_and_one_of_ours_is(tmp_path):
    new = tmp_path / ".new"
    new.mkdir()
    for content, written in ((None, True), (f"old\n{MARK}\n", True), ("mine", False), (b"\xff\xfe", False)):
        (new / "README.md").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
        write_model_card(new, RUN, tmp_path)
        assert (new / "README.md").exists() == written
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    write_model_card(new, RUN, tmp_path)
    assert not (new / "README.md").exists()
