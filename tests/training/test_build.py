"""A whole run on a model whose layers carry a state along a block: records get blocks of their own."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

import inference_example
import train_qlora
from qlora_kit.config import Config
from qlora_kit.config_file import override
from qlora_kit.errors import UserError
from qlora_kit.merge.command import merge
from qlora_kit.model import packing_check
from qlora_kit.training import build
from qlora_kit.training.machine import Machine
from qlora_kit.training.processes import Team
from tests.data.builders import record_blocks
from tests.model.random_models import build_model
from tests.tiny_run import names, result

FLAGS = [
    "--config", "configs/instruct.yaml", "--max_length", "64", "--max_steps", "2", "--batch_size", "2", "--dropout", "0.1",
    "--set", "lora.target_modules=all-linear", "--set", "quantization.load_in_4bit=false", "--set", "training.save_steps=1",
    "--set", "training.logging_steps=1", "--set", "training.eval_steps=1", "--set", "data.max_eval_samples=3",
]  # fmt: skip
LINE = "Records are not packed, each has a block of its own: the library's lfm2 computes a record differently beside another one"


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def recurrent(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lfm2")
    build_model("lfm2").save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(recurrent, tmp_path_factory):
    """Return a function that trains with these flags and returns the output folder."""

    def run(*flags: str, folder=None):
        folder = folder or tmp_path_factory.mktemp("run") / "out"
        train_qlora.main([*FLAGS, "--model_name", str(recurrent), "--output_dir", str(folder), *flags])
        return folder

    return run


@pytest.fixture(scope="module")
def unpacked(root, train):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return train()


def test_such_a_run_is_the_one_without_packing_and_says_why(unpacked, train):
    assert result(unpacked) == result(train("--set", "data.packing=false"))
    log = (unpacked / "training_log.txt").read_text()
    assert log.count(LINE) == 1
    packed, apart = (int(count) for count in re.findall(r"^Training data: .* (\d+) blocks", log, re.MULTILINE))
    data = json.loads((unpacked / "run.json").read_text())["data"]
    assert packed < apart == data["train_blocks"] and data["eval_blocks"] == 3
    assert data["packed"] is False and data["not_packed"] in log


def test_a_resumed_run_does_not_decide_anew(unpacked, train, tmp_path, monkeypatch):
    manifest = json.loads((unpacked / "checkpoints" / "checkpoint-1" / "manifest.json").read_text())
    assert LINE.partition(": ")[2] in manifest["run"]["not_packed"]
    monkeypatch.setattr(packing_check, "why_not_packed", lambda *rest: pytest.fail("tried"))
    monkeypatch.setattr("qlora_kit.training.build.why_not_packed", lambda *rest: pytest.fail("tried"))
    (tmp_path / "checkpoints").mkdir()
    (unpacked / "checkpoints" / "checkpoint-1").rename(tmp_path / "checkpoints" / "checkpoint-1")
    train("--resume", folder=tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-1").rename(unpacked / "checkpoints" / "checkpoint-1")
    assert result(tmp_path) == result(unpacked)
    assert (tmp_path / "training_log.txt").read_text().count(LINE) >= 1


def test_a_run_that_insists_on_packing_is_refused(train, tmp_path):
    with pytest.raises(UserError) as refused:
        train("--set", "data.packing=true", folder=tmp_path / "out")
    (line,) = refused.value.lines
    assert line.startswith("data.packing: true: cannot work here (the library's lfm2 computes") and "Use auto or false" in line
    assert not (tmp_path / "out").exists()


def test_its_perplexity_is_measured_again_as_in_the_run(unpacked, capsys):
    """Once by the run's decision and once, where that is unknown, by a trial."""
    run = json.loads((unpacked / "run.json").read_text())
    for decision in (False, None):
        (unpacked / "run.json").write_text(json.dumps(run | {"data": run["data"] | {"packed": decision}}))
        capsys.readouterr()
        flags = ["--adapter", str(unpacked), "--device", "cpu", "--perplexity", run["data"]["source"], "--json"]
        inference_example.main(flags)
        out, err = capsys.readouterr()
        found = json.loads(out)["perplexity"]
        for who in ("base", "adapter"):
            assert found[who]["loss"] == pytest.approx(run["perplexity"][who]["loss"], rel=1e-6)
        assert (LINE in err) == (decision is None)
    (unpacked / "run.json").write_text(json.dumps(run))


def test_its_merge_is_checked_on_one_record_a_block(unpacked, tmp_path):
    run = json.loads((unpacked / "run.json").read_text())
    check = merge(unpacked, tmp_path / "merged", device="cpu").check
    assert check.adapter.loss == pytest.approx(run["perplexity"]["adapter"]["loss"], rel=1e-6)
    assert check.data.startswith("3 blocks of 64 tokens") and names(tmp_path / "merged")


def test_rank_0_decides_for_all_ranks(monkeypatch):
    monkeypatch.setattr(Team, "broadcast", lambda team, value: "as rank 0 found")
    data, machine = build.TrainingData(record_blocks("pa", "pa"), None), Machine("cpu", torch.float32, [])
    found = [build.find_why_not_packed(build_model(name), data, Config(), machine, Team(1, 2)) for name in ("gemma3", "lfm2")]
    assert found == ["as rank 0 found"] * 2
    assert build.find_why_not_packed(build_model("lfm2"), data.unpack(), Config(), machine, Team(1, 2)) is None


@pytest.mark.parametrize("key", ["performance.fsdp", "performance.offload_embedding"])
def test_what_only_the_fast_path_can_do_is_refused_before_other_layers_are_tried(key):
    with pytest.raises(UserError, match=rf"{key}: true: cannot work here \(lfm2 is not built like Llama\). Use false."):
        build.why_not_on_fast_path(build_model("lfm2"), override(Config(), {key: True}))
