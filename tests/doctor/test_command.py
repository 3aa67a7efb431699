"""The doctor: each check passes here for real where it can, and fails when what it looks at is broken."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_kit.config import GIB
from qlora_kit.doctor import command, machine_checks
from qlora_kit.doctor.run_checks import Check, Problem, Result, Skipped, examine, outcome

# Checks that end in other ways; a process beside this one finds them here by name.


def passes() -> str:
    print("what a library prints")
    return "measured"


def hangs() -> str:
    time.sleep(60)
    return "too late"


def dies() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def leaves() -> str:
    os._exit(3)


def crashes() -> str:
    raise RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA\n")


def test_a_check_that_hangs_or_dies_is_a_failure_and_the_next_one_runs(capfd):
    checks = [Check(function.__name__, function, (), "mend it", 30.0) for function in (passes, dies, passes, leaves, crashes)]
    checks.append(Check("hangs", hangs, (), "mend it", 0.3))
    started = time.perf_counter()
    results = list(examine(checks))
    assert time.perf_counter() - started < 30
    assert [(result.name, result.status, result.measured, result.fix) for result in results] == [
        ("passes", "pass", "measured", None),
        ("dies", "fail", "its process died (SIGSEGV)", "mend it"),
        ("passes", "pass", "measured", None),
        ("leaves", "fail", "its process died (exit status 3)", "mend it"),
        ("crashes", "fail", "RuntimeError: CUDA error: no kernel image", "mend it"),
        ("hangs", "fail", "no result after 0 s", "mend it"),
    ]
    assert capfd.readouterr() == ("", "")


def fails(problem: str, fix: str, function, *arguments) -> None:
    with pytest.raises(Problem) as failed:
        function(*arguments)
    assert problem in failed.value.measured
    assert fix in failed.value.fix
    assert "\n" not in failed.value.measured + failed.value.fix


def skips(reason: str, function, *arguments) -> None:
    with pytest.raises(Skipped, match=reason):
        function(*arguments)


# Versions


def test_an_old_python_fails(monkeypatch):
    assert machine_checks.python_version().startswith("3.")
    monkeypatch.setattr(machine_checks.sys, "version_info", (3, 10, 14))
    fails("needs 3.11 or newer", "python3.11 -m venv", machine_checks.python_version)


def test_the_installed_packages_are_within_the_bounds_of_the_file():
    requirements = machine_checks.read_requirements()
    named = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pyyaml", "matplotlib"}
    assert named <= set(requirements)
    for requirement in requirements.values():
        assert "within" in machine_checks.package_version(requirement)


def test_a_version_below_or_above_the_bounds_fails_with_the_command(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# raised\npytest>=99   # a test runner\npyyaml>=1,<2\nno-such-package-here>=1\n")
    newer, older, missing = machine_checks.read_requirements(file).values()
    fails("needs >=99", "pip install 'pytest>=99'", machine_checks.package_version, newer)
    fails("needs >=1,<2", "pip install 'pyyaml>=1,<2'", machine_checks.package_version, older)
    fails("not installed", "pip install 'no-such-package-here>=1'", machine_checks.package_version, missing)


@pytest.mark.parametrize(("found", "inside"), [("2.13.0+cpu", True), ("2.8.0", True), ("2.14.0", False), ("2.7.9+cu126", False)])
def test_builds_of_a_version_count_as_that_version(monkeypatch, found, inside):
    monkeypatch.setattr(machine_checks, "version", lambda name: found)
    if inside:
        machine_checks.package_version("torch>=2.8,<2.14")
    else:
        fails(found, "pip install", machine_checks.package_version, "torch>=2.8,<2.14")


def test_a_missing_requirements_file_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_checks, "REQUIREMENTS", tmp_path / "none.txt")
    fails("none.txt", "git checkout", machine_checks.requirements_file, tmp_path / "none.txt")


# The GPU, as torch and the driver answer on other machines


@pytest.fixture
def machine(monkeypatch):
    import torch

    def answer(driver: str | None, built: str | None, available: bool = False) -> None:
        monkeypatch.setattr(machine_checks, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return answer


def test_a_cpu_build_beside_a_driver_and_a_cuda_build_without_one_are_told_apart(machine, monkeypatch):
    machine(driver="570.86", built=None)
    fails("CPU build, beside an NVIDIA driver 570.86", "--force-reinstall --no-deps 'torch>=", machine_checks.gpu, "auto")
    machine(driver=None, built="12.8")
    skips("built for CUDA 12.8, and no NVIDIA driver", machine_checks.gpu, "auto")
    fails("built for CUDA 12.8, and no NVIDIA driver", "install the NVIDIA driver", machine_checks.gpu, "cuda")
    machine(driver="470.1", built="12.8")
    fails("finds no GPU beside the driver 470.1", "nvidia-smi", machine_checks.gpu, "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fails("CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES", machine_checks.gpu, "auto")


def test_without_gpu_and_driver_or_when_asked_to_the_gpu_is_left_out(machine):
    machine(driver=None, built=None)
    skips("runs compute on the CPU", machine_checks.gpu, "auto")
    fails("CPU build, and no NVIDIA driver", "training.device=cpu", machine_checks.gpu, "cuda")
    skips("was asked for", machine_checks.gpu, "cpu")


def test_a_gpu_that_cannot_compute_is_a_failure_of_one_line(machine):
    machine(driver="570.86", built="12.8", available=True)  # and it answers nothing, for there is none
    result = outcome(Check("GPU", machine_checks.gpu, ("auto",), "nvidia-smi", 1.0))
    assert (result.status, result.fix) == ("fail", "nvidia-smi")
    assert result.measured and "\n" not in result.measured


def test_the_drivers_version_is_what_nvidia_smi_prints(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_checks.driver_version() is None
    program.write_text("#!/bin/sh\necho 570.86.10\necho 570.86.10\n")
    program.chmod(0o755)
    assert machine_checks.driver_version() == "570.86.10"
    program.write_text("#!/bin/sh\necho 'could not talk to the driver'\nexit 9\n")
    assert machine_checks.driver_version() is None


def test_the_compiler_is_tried(tmp_path):
    import shutil

    if not shutil.which("gcc"):
        pytest.skip("no gcc here")
    assert "Python.h" in machine_checks.compile_header("gcc")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'header.c:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    fails("Python.h: No such file", "python3-dev", machine_checks.compile_header, str(broken))


def test_a_gpu_without_a_compiler_fails(machine, tmp_path, monkeypatch):
    machine(driver="570.86", built="12.8", available=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    fails("none found", "install gcc", machine_checks.c_compiler, "auto")


# Arithmetic, for real on the CPU, then with one part perturbed


@pytest.mark.parametrize("name", ["four_bit_product", "eight_bit_adam", "bfloat16", "attention"])
def test_what_is_computed_here_is_right(name):
    assert command.compute(name, "cpu").startswith("relative error")


@pytest.mark.parametrize("name", ["triton_kernel", "compiled_function", "captured_graph"])
def test_what_needs_a_gpu_is_skipped_without_one(name):
    skips("needs a CUDA GPU", command.compute, name, "cpu")


@pytest.mark.parametrize("name", ["four_bit_product", "eight_bit_adam", "bfloat16", "attention", "captured_graph"])
def test_nothing_is_computed_on_the_cpu_when_a_gpu_was_asked_for(name, machine):
    machine(driver=None, built=None)
    skips("torch sees no GPU", command.compute, name, "cuda")


def test_a_wrong_4_bit_kernel_fails(monkeypatch):
    import bitsandbytes

    right = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda x, w, quant_state: 1.02 * right(x, w, quant_state=quant_state))
    fails("2.0e-02", "'bitsandbytes>=", command.compute, "four_bit_product", "cpu")
    # A kernel of its own serves a single token: one that is wrong there only is found as well.
    monkeypatch.setattr(
        bitsandbytes, "matmul_4bit", lambda x, w, quant_state: right(x, w, quant_state=quant_state) * (1.02 if len(x) == 1 else 1)
    )
    fails("2.0e-02", "'bitsandbytes>=", command.compute, "four_bit_product", "cpu")


def test_a_product_that_is_no_number_fails(monkeypatch):
    import bitsandbytes

    right = bitsandbytes.matmul_4bit
    monkeypatch.setattr(
        bitsandbytes, "matmul_4bit", lambda x, w, quant_state: right(x, w, quant_state=quant_state) * float("nan")
    )
    fails("nan", "bitsandbytes", command.compute, "four_bit_product", "cpu")


def test_a_4_bit_table_that_is_not_nf4_fails(monkeypatch):
    from bitsandbytes import functional

    right = functional.quantize_4bit
    monkeypatch.setattr(functional, "quantize_4bit", lambda *given, **named: right(*given, **named | {"quant_type": "fp4"}))
    fails("relative error", "bitsandbytes", command.compute, "four_bit_product", "cpu")


def test_a_wrong_or_wider_optimizer_state_fails(monkeypatch):
    from bitsandbytes import optim

    right = optim.AdamW8bit
    with monkeypatch.context() as broken:
        broken.setattr(optim, "AdamW8bit", lambda *given, **named: right(*given, betas=(0.0, 0.999), **named))
        fails("update of four steps", "bitsandbytes", command.compute, "eight_bit_adam", "cpu")
    monkeypatch.setattr(optim, "AdamW8bit", optim.AdamW32bit)
    fails("held in float32", "bitsandbytes", command.compute, "eight_bit_adam", "cpu")


def test_wrong_bfloat16_and_wrong_attention_fail(monkeypatch):
    import torch.nn.functional as F

    linear, attend = F.linear, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "linear", lambda x, weight: 1.02 * linear(x, weight))
    fails("2.", "'torch>=", command.compute, "bfloat16", "cpu")
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attend(q, k, v))  # sees what comes later
    fails("relative error", "'torch>=", command.compute, "attention", "cpu")


def test_an_attention_whose_gradient_alone_is_wrong_fails(monkeypatch):
    import torch.nn.functional as F

    attend = F.scaled_dot_product_attention

    def wrong_backward(q, k, v, is_causal):
        y = attend(q, k, v, is_causal=is_causal)
        return y.detach() + 0.98 * (y - y.detach())

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong_backward)
    fails("2.0e-02", "'torch>=", command.compute, "attention", "cpu")


def test_the_4_bit_reference_is_near_the_weights_it_stands_for():
    """By the levels alone: the largest gap is 0.3038, so that a value is off by 0.152 of its block's largest at most."""
    import torch

    from qlora_kit.doctor import compute_checks

    _, _, reference = compute_checks.packed_weight("cpu", torch.float32)
    weight = compute_checks._random(compute_checks.OUT, compute_checks.IN)
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    off = ((reference - weight).view(-1, 64) / largest).abs()
    assert 0.1 < off.max() < 0.152 + 0.03  # 0.03: the scales are quantized too


# Disk, memory, the Hub


def test_the_disk_is_written_and_left_as_it_was(tmp_path):
    assert str(tmp_path) in machine_checks.disk_speed(tmp_path / "not" / "there" / "yet")
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_fails(tmp_path):
    fails("each save would wait", "--output_dir", machine_checks.disk_speed, tmp_path, 1e9)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/version").exists(), reason="needs a folder that nobody may write")
def test_a_folder_that_cannot_be_written_fails(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    # To root every folder is open, but for those that the kernel makes.
    fails("cannot be written", "--output_dir", machine_checks.disk_speed, Path("/proc/self") if os.geteuid() == 0 else closed)


def test_too_little_space_or_memory_fails_with_what_is_missing(tmp_path, monkeypatch):
    import psutil

    assert "GiB free" in machine_checks.free_space(tmp_path)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB // 4))
    fails("0.25 GiB free", "free 0.75 GiB", machine_checks.free_space, tmp_path)
    assert "available" in machine_checks.host_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB // 2, total=8 * GIB))
    fails("0.5 of 8.0 GiB", "ps aux", machine_checks.host_memory)


def test_a_cache_too_small_for_the_default_model_fails_where_a_gpu_would_use_it(machine, monkeypatch):
    machine(driver=None, built=None)
    skips("for a GPU", machine_checks.room_for_model, "auto")
    machine(driver="570.86", built="12.8", available=True)
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * GIB))
    # 3,085,938,688 parameters of 2 bytes are 5.75 GiB.
    fails("5.0 GiB free", "HF_HOME", machine_checks.room_for_model, "auto")
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=6 * GIB))
    assert "takes 5.7" in machine_checks.room_for_model("auto")


def test_offline_is_skipped_with_what_it_means(monkeypatch):
    skips("HF_HUB_OFFLINE is set: .*cache or from local", machine_checks.hub_answers)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")  # nothing listens there
    with pytest.raises(Skipped, match=r"^127\.0\.0\.1 does not answer") as skipped:
        machine_checks.hub_answers()
    assert "secret" not in str(skipped.value)
    monkeypatch.delenv("HF_HUB_OFFLINE")  # which the check has set


def test_a_hub_that_answers_passes(monkeypatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers 501
    Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert machine_checks.hub_answers().startswith("127.0.0.1 answers in")
    server.server_close()


def test_the_default_model_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *given, **named: str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (tmp_path / "model-1.safetensors").touch()
    skips("but for 1 of 2 files", machine_checks.default_model)
    (tmp_path / "model-2.safetensors").touch()
    assert str(tmp_path) in machine_checks.default_model()


def test_a_model_that_is_not_in_the_cache_is_skipped(monkeypatch, tmp_path):
    import functools

    import huggingface_hub

    there = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", functools.partial(there, cache_dir=tmp_path))
    skips("first run with it downloads 5.7 GiB", machine_checks.default_model)


# The command


RESULTS = [
    Result("Python", "pass", "3.12.3", None, 0.00012),
    Result("GPU", "skipped", "no GPU", None, 0.1),
    Result("4-bit [product]", "fail", "relative error 2.0e-01", "pip install 'bitsandbytes>=0.50'", 1.0),
]


def test_the_table_has_a_line_for_each_result_and_one_for_each_fix(capsys):
    assert command.show_table(RESULTS) == RESULTS
    assert capsys.readouterr().out.splitlines() == [
        "pass     Python         3.12.3",
        "skipped  GPU            no GPU",
        "fail     4-bit [product] relative error 2.0e-01",
        "                        fix: pip install 'bitsandbytes>=0.50'",
        "",
        "1 passed, 1 failed, 1 skipped",
    ]


def test_json_is_one_object():
    shown = json.loads(command.as_json("auto", RESULTS))
    assert (shown["passed"], shown["device"]) == (False, "auto")
    assert [set(check) for check in shown["checks"]] == [{"name", "status", "measured", "fix", "seconds"}] * 3
    assert shown["checks"][2]["fix"] == "pip install 'bitsandbytes>=0.50'"
    assert json.loads(command.as_json("cpu", RESULTS[:2]))["passed"] is True


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_failure_is_exit_status_1(monkeypatch, capsys, flags):
    monkeypatch.setattr(command, "examine", lambda checks: (result for result in RESULTS))
    with pytest.raises(SystemExit) as ended:
        command.main(flags)
    assert ended.value.code == 1
    monkeypatch.setattr(command, "examine", lambda checks: (result for result in RESULTS[:2]))
    command.main(flags)


@pytest.mark.parametrize(("flags", "line"), [(["--devcie", "cpu"], "did you mean --device?"), (["--device", "tpu"], "'tpu'")])
def test_a_wrong_flag_is_one_line_and_exit_status_2(capsys, flags, line):
    with pytest.raises(SystemExit) as ended:
        command.main(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1


def test_every_check_has_a_fix_and_a_limit():
    checks = command.all_checks("auto")
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.fix and 0 < check.seconds <= 300 for check in checks)


def test_a_real_run_of_all_checks(root):
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "qlora_kit.doctor", "--json", "--device", "cpu"],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    shown = json.loads(done.stdout)
    assert (done.returncode, done.stderr, shown["passed"]) == (0, "", True)
    status = {check["name"]: check["status"] for check in shown["checks"]}
    computed = ("Python", "torch", "bitsandbytes", "4-bit product", "8-bit Adam", "bfloat16", "attention", "host memory",
                "disk speed", "disk space")  # fmt: skip
    assert {name: status[name] for name in computed} == dict.fromkeys(computed, "pass")
    assert {status[name] for name in ("GPU", "Triton kernel", "torch.compile", "CUDA graph", "Hub")} == {"skipped"}
    assert sum(check["seconds"] for check in shown["checks"]) <= time.perf_counter() - started
