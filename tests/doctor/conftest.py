"""Fixtures for checks: how they must end, and a machine with another GPU."""

import pytest

from qlora_kit.doctor import machine_checks
from qlora_kit.doctor.run_checks import CheckFailed, CheckSkipped


@pytest.fixture
def fails():
    """fails(problem, fix, function, *arguments): the check fails in one line, and its measurement and fix contain these words."""

    def run(problem: str, fix: str, function, *arguments) -> None:
        with pytest.raises(CheckFailed) as failed:
            function(*arguments)
        assert problem in failed.value.measured
        assert fix in failed.value.fix
        assert "\n" not in failed.value.measured + failed.value.fix

    return run


@pytest.fixture
def skips():
    """skips(reason, function, *arguments): the check is skipped for that reason."""

    def run(reason: str, function, *arguments) -> None:
        with pytest.raises(CheckSkipped, match=reason):
            function(*arguments)

    return run


@pytest.fixture
def machine(monkeypatch):
    """machine(driver, built, available): torch and the driver answer as on another machine."""
    import torch

    def answer(driver: str | None, built: str | None, available: bool = False) -> None:
        monkeypatch.setattr(machine_checks, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return answer
