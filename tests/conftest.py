"""Shared fixtures. Everything runs offline, on the CPU, from the repository alone."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="qlora-tests-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

from qlora_kit.cli import prepare_libraries  # noqa: E402

prepare_libraries()

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-qwen2"


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    return TINY
