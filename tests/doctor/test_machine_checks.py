"""Versions, GPU, compiler, disk, memory and the Hub: real where possible, then as on other machines."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_kit.config import GIB
from qlora_kit.doctor import machine_checks
from qlora_kit.doctor.run_checks import Check, CheckSkipped, run_check


def test_an_old_python_fails(monkeypatch, fails):
    assert machine_checks.python_version().startswith("3.")
    monkeypatch.setattr(machine_checks.sys, "version_info", (3, 10, 14))
    fails("needs 3.11 or newer", "python3.11 -m venv", machine_checks.python_version)
    monkeypatch.setattr(machine_checks.sys, "platform", "win32")
    fails("on Windows", "wsl --install", machine_checks.python_version)


def test_the_installed_packages_are_within_the_bounds_of_requirements_txt():
    requirements = machine_checks.read_requirements()
    named = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pyyaml", "matplotlib"}
    assert named <= set(requirements)
    for requirement in requirements.values():
        assert "within" in machine_checks.package_version(requirement)


def test_a_version_below_or_above_the_bounds_fails_with_the_command(tmp_path, fails):
    file = tmp_path / "requirements.txt"
    file.write_text("# raised\npytest>=99   # a test runner\npyyaml>=1,<2\nno-such-package-here>=1\n")
    newer, older, missing = machine_checks.read_requirements(file).values()
    fails("needs >=99", "pip install 'pytest>=99'", machine_checks.package_version, newer)
    fails("needs >=1,<2", "pip install 'pyyaml>=1,<2'", machine_checks.package_version, older)
    fails("not installed", "pip install 'no-such-package-here>=1'", machine_checks.package_version, missing)


@pytest.mark.parametrize(("found", "inside"), [("2.13.0+cpu", True), ("2.8.0", True), ("2.14.0", False), ("2.7.9+cu126", False)])
def test_builds_of_a_version_count_as_that_version(monkeypatch, found, inside, fails):
    monkeypatch.setattr(machine_checks, "version", lambda name: found)
    if inside:
        machine_checks.package_version("torch>=2.8,<2.14")
    else:
        fails(found, "pip install", machine_checks.package_version, "torch>=2.8,<2.14")


def test_a_missing_requirements_file_is_a_failure(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(machine_checks, "REQUIREMENTS", tmp_path / "none.txt")
    fails("none.txt", "git checkout", machine_checks.read_requirements, tmp_path / "none.txt")


def test_a_cpu_build_with_a_driver_and_a_cuda_build_without_one_are_different_failures(machine, monkeypatch, fails, skips):
    machine(driver="570.86", built=None)
    fails(
        "CPU build, although the NVIDIA driver 570.86 is installed",
        "--force-reinstall --no-deps 'torch>=",
        machine_checks.gpu,
        "auto",
    )
    machine(driver=None, built="12.8")
    skips("built for CUDA 12.8, and no NVIDIA driver", machine_checks.gpu, "auto")
    fails("built for CUDA 12.8, and no NVIDIA driver", "install the NVIDIA driver", machine_checks.gpu, "cuda")
    machine(driver="470.1", built="12.8")
    fails("finds no GPU, although the NVIDIA driver 470.1 is installed", "nvidia-smi", machine_checks.gpu, "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fails("CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES", machine_checks.gpu, "auto")


def test_the_gpu_is_skipped_without_a_driver_and_with_device_cpu(machine, fails, skips):
    machine(driver=None, built=None)
    skips("runs compute on the CPU", machine_checks.gpu, "auto")
    fails("CPU build, and no NVIDIA driver", "training.device=cpu", machine_checks.gpu, "cuda")
    skips("left out by --device cpu", machine_checks.gpu, "cpu")


def test_a_gpu_that_cannot_compute_is_a_failure_of_one_line(machine):
    machine(driver="570.86", built="12.8", available=True)  # but there is none, so every call fails
    result = run_check(Check("GPU", machine_checks.gpu, ("auto",), "nvidia-smi", 1.0))
    assert (result.status, result.fix) == ("fail", "nvidia-smi")
    assert result.measured and "\n" not in result.measured


def test_the_drivers_version_is_read_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_checks.driver_version() is None
    program.write_text("#!/bin/sh\necho 570.86.10\necho 570.86.10\n")
    program.chmod(0o755)
    assert machine_checks.driver_version() == "570.86.10"
    program.write_text("#!/bin/sh\necho 'could not talk to the driver'\nexit 9\n")
    assert machine_checks.driver_version() is None


def test_the_compiler_compiles_a_file_with_python_h(machine, tmp_path, monkeypatch, fails):
    import shutil

    if not shutil.which("gcc"):
        pytest.skip("no gcc here")
    machine(driver="570.86", built="12.8", available=True)
    monkeypatch.setenv("CC", "gcc")
    assert "Python.h" in machine_checks.c_compiler("auto")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'header.c:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    fails("Python.h: No such file", "python3-dev", machine_checks.c_compiler, "auto")


def test_a_gpu_without_a_compiler_fails(machine, tmp_path, monkeypatch, fails):
    machine(driver="570.86", built="12.8", available=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    fails("none found", "install gcc", machine_checks.c_compiler, "auto")


def test_the_speed_test_leaves_no_file(tmp_path):
    assert str(tmp_path) in machine_checks.disk_speed(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_fails(tmp_path, fails):
    fails("each save would wait", "--output_dir", machine_checks.disk_speed, tmp_path, 1e9)


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs a folder that not even root may write"
)
def test_a_folder_that_cannot_be_written_fails(tmp_path, fails):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    # Root may write to every folder except those of the kernel.
    fails("cannot be written", "--output_dir", machine_checks.disk_speed, Path("/proc/self") if os.geteuid() == 0 else closed)


def test_too_little_space_or_memory_fails_with_the_missing_amount(tmp_path, monkeypatch, fails):
    import psutil

    assert "GiB free" in machine_checks.free_space(tmp_path)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB // 4))
    fails("0.25 GiB free", "free 0.75 GiB", machine_checks.free_space, tmp_path)
    assert "available" in machine_checks.host_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB // 2, total=8 * GIB))
    fails("0.5 of 8.0 GiB", "ps aux", machine_checks.host_memory)


def test_a_cache_too_small_for_the_default_model_fails_on_a_machine_with_a_gpu(machine, monkeypatch, fails, skips):
    machine(driver=None, built=None)
    skips("needs a GPU", machine_checks.room_for_model, "auto")
    machine(driver="570.86", built="12.8", available=True)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * GIB))
    # 3,085,938,688 parameters of 2 bytes are 5.75 GiB.
    fails("5.0 GiB free", "HF_HOME", machine_checks.room_for_model, "auto")
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=6 * GIB))
    assert "takes 5.7" in machine_checks.room_for_model("auto")


def test_an_unreachable_hub_is_skipped_with_the_consequence(monkeypatch, skips):
    skips("HF_HUB_OFFLINE is set: .*cache or from local", machine_checks.hub_answers)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")  # nothing listens there
    with pytest.raises(CheckSkipped, match=r"^127\.0\.0\.1 does not answer") as skipped:
        machine_checks.hub_answers()
    assert "secret" not in str(skipped.value)
    monkeypatch.delenv("HF_HUB_OFFLINE")  # the check has set it


def test_a_hub_that_answers_passes(monkeypatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501
    Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert machine_checks.hub_answers().startswith("127.0.0.1 answers in")
    server.server_close()


def test_the_default_model_is_found_in_the_cache_when_no_file_is_missing(tmp_path, monkeypatch, skips):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **named: str(tmp_path))
    skips("lacks 1 of 1 weight files", machine_checks.default_model)  # config and tokenizer are there
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (tmp_path / "model-1.safetensors").touch()
    skips("lacks 1 of 2 weight files", machine_checks.default_model)
    (tmp_path / "model-2.safetensors").touch()
    assert str(tmp_path) in machine_checks.default_model()


def test_a_model_that_is_not_in_the_cache_is_skipped(monkeypatch, tmp_path, skips):
    import functools

    import huggingface_hub

    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", functools.partial(original, cache_dir=tmp_path))
    skips("first run with it downloads 5.7 GiB", machine_checks.default_model)
