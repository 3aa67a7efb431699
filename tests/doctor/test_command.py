"""The command: table, JSON, exit status, and a real run of all checks."""

import json
import time

import pytest

from qlora_kit.doctor import command
from qlora_kit.doctor.run_checks import Result
from tests import forked

RESULTS = [
    Result("Python", "pass", "3.12.3", None, 0.00012),
    Result("GPU", "skipped", "no GPU", None, 0.1),
    Result("4-bit [product]", "fail", "relative error 2.0e-01", "pip install 'bitsandbytes>=0.50'", 1.0),
]


def test_the_table_has_a_line_for_each_result_and_one_for_each_fix(capsys):
    assert command.print_table(RESULTS) == RESULTS
    assert capsys.readouterr().out.splitlines() == [
        "pass     Python         3.12.3",
        "skipped  GPU            no GPU",
        "fail     4-bit [product] relative error 2.0e-01",
        "         fix: pip install 'bitsandbytes>=0.50'",
        "",
        "1 passed, 1 failed, 1 skipped",
        "Mend what failed, and run the doctor again.",
    ]


@pytest.mark.parametrize("gpu, advice", [
    ("skipped", "This machine can train the laptop model:\n  python train_qlora.py --config configs/tiny.yaml"),
    ("pass", "This machine can train on its GPU. What fits, and how long it takes:\n  python train_qlora.py --plan"),
])  # fmt: skip
def test_the_doctor_ends_with_what_to_do_next(capsys, gpu, advice):
    command.print_table([RESULTS[0], Result("GPU", gpu, "", None, 0.1)])
    assert capsys.readouterr().out.endswith(f"skipped\n{advice}\n")


def test_json_is_one_object():
    shown = json.loads(command.format_json("auto", RESULTS))
    assert (shown["passed"], shown["device"]) == (False, "auto")
    assert [set(check) for check in shown["checks"]] == [{"name", "status", "measured", "fix", "seconds"}] * 3
    assert shown["checks"][2]["fix"] == "pip install 'bitsandbytes>=0.50'"
    assert json.loads(command.format_json("cpu", RESULTS[:2]))["passed"] is True


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_failure_is_exit_status_1(monkeypatch, capsys, flags):
    monkeypatch.setattr(command, "run_checks", lambda checks: (result for result in RESULTS))
    with pytest.raises(SystemExit) as ended:
        command.main(flags)
    assert ended.value.code == 1
    monkeypatch.setattr(command, "run_checks", lambda checks: (result for result in RESULTS[:2]))
    command.main(flags)


@pytest.mark.parametrize(
    ("flags", "line"), [(["--devcie", "cpu"], "did you mean --device?"), (["--device", "tpu"], "--device: tpu: is none")]
)
def test_a_wrong_flag_is_one_line_and_exit_status_2(capsys, flags, line):
    with pytest.raises(SystemExit) as ended:
        command.main(flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and line in error and error.count("\n") == 1


def test_every_check_has_a_fix_and_a_limit():
    checks = command.all_checks("auto")
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.fix and 0 < check.time_limit <= 300 for check in checks)


@pytest.mark.slow
def test_a_real_run_of_all_checks(root, monkeypatch, capfd):
    """Their process has the libraries already."""
    monkeypatch.chdir(root)
    monkeypatch.setattr("multiprocessing.get_context", lambda method: forked.SERVER)
    started = time.perf_counter()
    command.main(["--json", "--device", "cpu"])
    written = capfd.readouterr()
    shown = json.loads(written.out)
    assert (written.err, shown["passed"]) == ("", True)
    status = {check["name"]: check["status"] for check in shown["checks"]}
    computed = ("Python", "torch", "bitsandbytes", "4-bit product", "8-bit Adam", "bfloat16", "attention", "host memory",
                "disk speed", "disk space")  # fmt: skip
    assert {name: status[name] for name in computed} == dict.fromkeys(computed, "pass")
    assert {status[name] for name in ("GPU", "Triton kernel", "torch.compile", "CUDA graph", "Hub")} == {"skipped"}
    assert sum(check["seconds"] for check in shown["checks"]) <= time.perf_counter() - started
