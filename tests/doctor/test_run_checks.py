"""Checks that hang, crash or kill their process."""

import os
import signal
import time

from qlora_kit.doctor.run_checks import Check, run_checks

# The checks: the other process imports them from this module.


def passes() -> str:
    print("what a library prints")
    return "measured"


def hangs() -> str:
    time.sleep(60)
    return "too late"


def dies() -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def exits() -> str:
    os._exit(3)


def crashes() -> str:
    raise RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA\n")


def test_a_check_that_hangs_or_dies_fails_and_the_next_one_runs(capfd):
    checks = [Check(function.__name__, function, (), "fix it", 30.0) for function in (passes, dies, passes, exits, crashes)]
    checks.append(Check("hangs", hangs, (), "fix it", 0.3))
    started = time.perf_counter()
    results = list(run_checks(checks))
    assert time.perf_counter() - started < 30
    assert [(result.name, result.status, result.measured, result.fix) for result in results] == [
        ("passes", "pass", "measured", None),
        ("dies", "fail", "its process died (SIGSEGV)", "fix it"),
        ("passes", "pass", "measured", None),
        ("exits", "fail", "its process died (exit status 3)", "fix it"),
        ("crashes", "fail", "RuntimeError: CUDA error: no kernel image", "fix it"),
        ("hangs", "fail", "no result after 0 s", "fix it"),
    ]
    assert capfd.readouterr() == ("", "")
