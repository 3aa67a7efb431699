"""An endpoint that is no Hub: one line, and no wait."""

import http.client
import json
import urllib.request

import huggingface_hub
import pytest

from qlora_kit.config import ModelSettings
from qlora_kit.errors import UserError
from qlora_kit.model import hub


@pytest.mark.parametrize(
    "error", [TimeoutError(), http.client.BadStatusLine("SSH-2.0"), http.client.InvalidURL("a b"), ValueError()]
)
def test_what_does_not_answer_as_a_server_is_offline(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    hub.go_offline_if_unreachable()
    assert hub.os.environ["HF_HUB_OFFLINE"] == "1"


def test_an_answer_that_is_not_the_hubs_is_one_line(monkeypatch):
    def fail(*_, **__):
        json.loads("<html>")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"model.name: no/model: cannot be downloaded \(JSONDecodeError: .*Correct HF_ENDPOINT"):
        hub.fetch_tokenizer(ModelSettings(name="no/model"))
