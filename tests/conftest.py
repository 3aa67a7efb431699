"""Shared fixtures. Everything runs offline, on the CPU, from the repository alone."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported
# The embedded model's products are too small to share out: a step of 32 tokens takes 28 ms with one thread, and 40 to 71 ms
# with two, which wake each other for every product (two cores of an AMD EPYC, 2026-11-22).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # xdist sets it, and terminals of tests would not have their own width
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="qlora-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

from qlora_kit.cli import prepare_libraries  # noqa: E402

prepare_libraries()

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.tiny_run import TWO_LAYERS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-qwen2"


def pytest_collection_finish():
    """Keep the collector off what the libraries hold: each start of the Trainer has it look through everything, for 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def runs_without_pictures_and_cards():
    """Leave out the curves, a third of a short run, and peft's card, which is removed. Runs in other processes make both."""
    import train_qlora

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_qlora, "plot_training_curves", lambda entries, path, *rest: path.touch())
        if peft := sys.modules.get("peft"):  # else it would be imported for tests that do without
            patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda model, folder: None)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    return TINY


@pytest.fixture(scope="session")
def two_layers_dir() -> Path:
    return TWO_LAYERS


@pytest.fixture(scope="session")
def qwen_tokenizer_dir() -> Path:
    """Return the folder of Qwen2.5's own tokenizer, which QLORA_QWEN_TOKENIZER names; skip the test if it names none."""
    folder = os.environ.get("QLORA_QWEN_TOKENIZER")
    if not folder:
        pytest.skip("QLORA_QWEN_TOKENIZER does not name the folder of Qwen2.5's tokenizer")
    return Path(folder)


@pytest.fixture(scope="session")
def other_models(tmp_path_factory) -> dict[str, Path]:
    """Folders of small random models that are not Qwen2: a Llama with a head of its own, and a GPT-2 with Conv1D layers."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special = {"bos_token_id": 6141, "eos_token_id": 6143, "vocab_size": 6144}
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, tie_word_embeddings=False, **special,
        )
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **special))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    folders = {}
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def adapter_of(tmp_path_factory):
    """Trains in the repository's folder, without evaluation and warm-up; returns the adapter's folder."""
    import train_qlora

    def train(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("trained") / "adapter"
        before = Path.cwd()
        os.chdir(ROOT)
        try:
            always = ["--max_length", "64", "--set", "data.eval_split=null", "--set", "training.warmup_ratio=0"]
            train_qlora.main([*always, *flags, "--output_dir", str(folder)])
        finally:
            os.chdir(before)
        return folder

    return train


@pytest.fixture(scope="session")
def adapter(adapter_of) -> Path:
    """Trained for 4 steps, on two layers: enough to change every answer."""
    flags = ("--config", "configs/tiny.yaml", "--model_name", str(TWO_LAYERS), "--max_steps", "4")
    return adapter_of(*flags, "--set", "data.max_train_samples=32")
