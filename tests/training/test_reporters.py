"""What only reports a run cannot end it."""

from types import SimpleNamespace

from qlora_kit.training.reporters import guard_reporters


class Failing:
    """As a TensorBoard whose disk is full."""

    def __init__(self):
        self.calls = 0

    def on_log(self, args, state, control, **rest):
        self.calls += 1
        raise OSError(28, "No space left on device\nin a second line")


class Working:
    def on_log(self, args, state, control, **rest):
        return "control"


def test_a_reporter_that_fails_is_named_once_and_left_out():
    Failing.__module__ = "transformers.integrations.integration_utils"
    trainer, said = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[Failing(), Working()])), []
    guard_reporters(trainer, said.append)
    failing, working = trainer.callback_handler.callbacks
    assert [callback.on_log(None, None, None) for callback in (failing, failing, working)] == [None, None, "control"]
    assert said == ["Failing failed (OSError: [Errno 28] No space left on device): going on without it"]
    assert failing.callback.calls == 1 and isinstance(working, Working)
