"""Several processes on several GPUs, as torchrun starts them, compared with one GPU; needs two."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SETTINGS = (
    "--config", "configs/tiny.yaml", "--max_length", "64", "--max_steps", "7", "--set", "training.device=cuda",
    "--set", "training.logging_steps=1", "--set", "training.eval_steps=7", "--set", "data.max_train_samples=50",
    "--set", "training.optim=paged_adamw_8bit", "--dropout", "0.1",
    "--set", "performance.micro_batch=4",
)  # fmt: skip


def train(root, folder, processes, *more):
    """Train on as many GPUs as processes; return the logged losses and the log."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    visible = ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:processes])
    run = subprocess.run(
        [sys.executable, *launcher, "train_qlora.py", *SETTINGS, "--output_dir", str(folder), *more],
        cwd=root, capture_output=True, text=True, timeout=240, env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    log = (folder / "training_log.txt").read_text()
    losses = [float(line.split("loss ")[1][:6]) for line in log.splitlines() if "/7: loss" in line]
    assert len(losses) == 7
    return losses, log


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return *train(root, folder, 1), folder


@pytest.mark.parametrize("fsdp", ["false", "true", "offload"])
def test_two_gpus_train_what_one_does(root, tmp_path, alone, fsdp):
    losses, log = train(root, tmp_path / "two", 2, "--set", f"performance.fsdp={fsdp}")
    assert losses == pytest.approx(alone[0], rel=5e-3)
    assert "CUDA graphs: yes" in log
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (alone[2], tmp_path / "two"))
    trained = torch.cat([value.flatten() for name, value in one.items() if "lora_B" in name])
    again = torch.cat([two[name].flatten() for name in one if "lora_B" in name])
    assert trained.any() and torch.nn.functional.cosine_similarity(trained, again, dim=0) > 0.95
