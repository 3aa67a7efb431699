"""A worker answers, and ends a call that takes too long or too much memory."""

import os
import time

import pytest

from qlora_kit.errors import BadRecord, UserError
from qlora_kit.limited_worker import LimitedWorker, LimitExceeded


def answer(question: str) -> object:
    match question:
        case "who":
            return os.getpid()
        case "wrong":
            raise BadRecord("turn 1 is wrong")
        case "mistake":
            raise UserError("data.dataset", "x", "does not exist", "use another")
        case "time":
            return 10**10**9  # one operation, which no signal interrupts
        case "memory":
            return len("a" * 2**33)
        case "death":
            os._exit(1)
    return question


@pytest.fixture
def worker():
    worker = LimitedWorker(answer, seconds=1.0, extra_bytes=2**28)
    yield worker
    worker.close()


def test_calls_are_answered_by_one_other_process(worker):
    assert worker.call("text") == "text"
    assert worker.call("who") == worker.call("who") != os.getpid()


def test_an_exception_arrives_and_the_process_lives_on(worker):
    process = worker.call("who")
    with pytest.raises(BadRecord, match="turn 1 is wrong"):
        worker.call("wrong")
    with pytest.raises(UserError) as error:
        worker.call("mistake")
    assert error.value.lines == ["data.dataset: x: does not exist. Use another."]
    assert worker.call("who") == process


@pytest.mark.parametrize(("question", "reason"), [("time", "1 seconds"), ("memory", "0.25 GiB"), ("death", "0.25 GiB")])
def test_what_exceeds_a_limit_ends_and_the_next_call_is_answered(worker, question, reason):
    begun = time.monotonic()
    with pytest.raises(LimitExceeded, match=reason):
        worker.call(question)
    assert time.monotonic() - begun < 10
    assert worker.call("text") == "text"
