"""Which checkpoint a run is resumed from, and when it must not be."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import train_qlora
from qlora_kit.config import Config
from qlora_kit.config_file import load_config, override
from qlora_kit.errors import UserError
from qlora_kit.output.checkpoints import find_newest_valid, staged_checkpoint
from qlora_kit.output.provenance import code_digest, versions
from qlora_kit.training.resume import FILES, check_fingerprints, find_checkpoint
from tests.tiny_run import SMALL, damage, names, result


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


FACTS = {
    "fingerprints": dict.fromkeys(("train_sha256", "eval_sha256", "base_sha256", "tokenizer_sha256"), "0"),
    "prompt_style": "text", "not_packed": None, "plan_inputs": {}, "micro_batch": 1, "recomputed": 0, "processes": 1, "rows": 1,
    "guard": {"skipped": [], "losses": [1.5], "warned": []}, "best": None, "loss_sum": 0.0, "steps_to_log": 0, "eval_loss": None,
    "versions": {"torch": "2.0.0"},
}  # fmt: skip


def write_checkpoint(folder, step: int, **facts):
    """Write a checkpoint of a run with the default settings."""
    with staged_checkpoint(folder / "checkpoints", step, FACTS | facts, needed=0) as staging:
        for name in FILES:
            (staging / name).touch()
        (staging / "config.yaml").write_text(Config().to_yaml())
    return folder / "checkpoints" / f"checkpoint-{step}"


def find(folder, config: Config, wanted: str = ""):
    checkpoint, _ = find_checkpoint(folder, config, wanted)
    return checkpoint.folder


def test_the_checkpoint_written_last_is_resumed(tmp_path):
    for step in (9, 10, 2):  # the run was resumed from an earlier step
        write_checkpoint(tmp_path, step)
    assert find(tmp_path, Config()).name == "checkpoint-2"


def test_a_named_checkpoint_is_resumed(tmp_path):
    wanted = write_checkpoint(tmp_path, 9)
    write_checkpoint(tmp_path, 10)
    assert find(tmp_path, Config(), str(wanted)) == wanted


def test_a_checkpoint_of_a_run_in_another_folder_is_refused(tmp_path):
    wanted = write_checkpoint(tmp_path / "one", 9)
    with pytest.raises(UserError, match=r"checkpoint-9: is not a checkpoint of a run in .*other\. .*--output_dir"):
        find(tmp_path / "other", Config(), str(wanted))


@pytest.mark.parametrize("wanted", ["", "nowhere/checkpoint-5"])
def test_without_a_checkpoint_there_is_one_error(tmp_path, wanted):
    with pytest.raises(
        UserError, match=r"--resume: .*(checkpoints|nowhere/checkpoint-5): has no checkpoint\. Start over with --overwrite"
    ):
        find(tmp_path, Config(), wanted)


def test_changed_settings_are_refused_and_each_changed_key_is_named(tmp_path):
    write_checkpoint(tmp_path, 10)
    changed = {
        "lora.rank": 8,
        "data.max_length": 64,
        "training.learning_rate": 1e-4,
        "training.seed": 7,
        "performance.fused_lora": False,
        "data.max_eval_samples": 3,
    }
    allowed = {"training.num_epochs": 5, "performance.micro_batch": 4, "generation.top_k": 1}
    with pytest.raises(UserError) as caught:
        find(tmp_path, override(Config(), changed | allowed))
    assert {problem.partition(":")[0] for problem in caught.value.lines} == set(changed)
    assert any("lora.rank: 8: differs from 16, the value of the run to resume" in problem for problem in caught.value.lines)


def test_settings_that_do_not_decide_what_is_trained_may_change(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 10)
    changes = {"training.max_steps": 50, "training.save_steps": 5, "training.output_dir": "elsewhere", "generation.top_k": 1}
    assert find(tmp_path, override(Config(), changes)) == checkpoint


def lines_of(folder, config: Config) -> list[str]:
    return find_checkpoint(folder, config, "")[1]


@pytest.mark.parametrize("way", ["link to the folder", "link to the checkpoints", "up and down"])
def test_a_checkpoint_is_found_on_every_way_to_it(tmp_path, way):
    folder, wanted = tmp_path / "out", write_checkpoint(tmp_path / "out", 9)
    if way == "link to the checkpoints":  # on another disk
        (folder / "checkpoints").rename(tmp_path / "elsewhere")
        (folder / "checkpoints").symlink_to(tmp_path / "elsewhere")
        wanted = tmp_path / "elsewhere" / "checkpoint-9"
    elif way == "up and down":
        wanted = folder / ".." / "out" / "checkpoints" / "checkpoint-9"
    else:
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    assert find(folder, Config(), str(wanted)).resolve() == wanted.resolve()


@pytest.mark.parametrize("key, value", [
    ("model.name", "./elsewhere"), ("data.dataset", "moved.txt"), ("data.eval_split", "moved/validation.txt"),
])  # fmt: skip
def test_the_same_content_may_lie_elsewhere_and_is_noted(tmp_path, key, value):
    """Whether it is the same is known when it has been read: then check_fingerprints refuses other content."""
    write_checkpoint(tmp_path, 9)
    lines = lines_of(tmp_path, override(Config(), {key: value}))
    assert any(line.startswith(f"Elsewhere since: {key}: {value}, was ") for line in lines)
    shutil.rmtree(tmp_path / "checkpoints")
    write_checkpoint(tmp_path, 9, fingerprints={"tokenizer_sha256": "0"})  # whose content is not known
    with pytest.raises(UserError, match=rf"^{key}: {value}: differs from"):
        lines_of(tmp_path, override(Config(), {key: value}))


def test_other_versions_of_packages_and_code_are_noted(tmp_path):
    write_checkpoint(tmp_path, 9, versions=versions() | {"peft": "0.1", "code": "0123456789ab"})
    changed = [line for line in lines_of(tmp_path, Config()) if line.startswith("Another")]
    assert changed == [f"Another version since: peft {versions()['peft']}, was 0.1",
                       f"Another version since: code {code_digest()}, was 0123456789ab"]  # fmt: skip


@pytest.mark.parametrize("facts, key", [
    ({"processes": "2"}, "processes"), ({"micro_batch": 0}, "micro_batch"), ({"rows": 10**30}, "rows"),
    ({"guard": []}, "guard"), ({"guard": {"skipped": [], "losses": ["x"], "warned": []}}, "guard.losses.0"),
    ({"best": {"step": 1}}, "best.loss"), ({"fingerprints": {"base_sha256": 5}}, "fingerprints.base_sha256"),
    ({"loss_sum": None}, "loss_sum"), ({"prompt_style": ["text"]}, "prompt_style"),
])  # fmt: skip
def test_a_manifest_of_another_version_or_of_no_run_is_passed_over(tmp_path, facts, key):
    older = write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2, **facts)
    checkpoint, lines = find_checkpoint(tmp_path, Config(), "")
    assert checkpoint.folder == older
    assert lines[0].endswith(f"checkpoint-2: manifest.json is of another version of this toolkit, or damaged (run.{key})")


def test_a_checkpoint_without_a_file_that_is_read_is_passed_over(tmp_path):
    older, newer = write_checkpoint(tmp_path, 1), tmp_path / "checkpoints" / "checkpoint-2"
    with staged_checkpoint(newer.parent, 2, FACTS, needed=0) as staging:
        (staging / "config.yaml").write_text(Config().to_yaml())
    checkpoint, lines = find_checkpoint(tmp_path, Config(), "")
    assert checkpoint.folder == older and "manifest.json does not list adapter_model.safetensors" in lines[0]


@pytest.fixture(scope="module")
def begun(root, tmp_path_factory):
    """Return the output folder of a run that was killed after step 2 of 4, and the result of the whole run."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        flags = [*SMALL, "--max_steps", "4", "--set", "training.save_steps=1", "--output_dir", str(folder)]
        train_qlora.main(flags)
    final = result(folder)
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
    (folder / "adapter_model.safetensors").unlink()
    return folder, final


@pytest.fixture
def resume_run(begun, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(begun[0], out)

    def resume(*arguments: str):
        train_qlora.main(
            [*SMALL, "--max_steps", "4", "--set", "training.save_steps=1", *arguments, "--output_dir", str(out), "--resume"]
        )
        return result(out)

    resume.out = out
    return resume


def test_a_damaged_newest_checkpoint_loses_its_steps_only(begun, resume_run, capsys):
    damage(resume_run.out / "checkpoints" / "checkpoint-2", "optimizer.pt")
    (resume_run.out / "checkpoints" / ".saving" / "checkpoint-3").mkdir(parents=True)
    assert resume_run() == begun[1]
    log = (resume_run.out / "training_log.txt").read_text()
    for text in (capsys.readouterr().err, log):
        assert "checkpoint-2: optimizer.pt was changed after it was written" in text and "Resuming from step 1" in text
    assert names(resume_run.out / "checkpoints") == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert find_newest_valid([resume_run.out / "checkpoints" / "checkpoint-2"])[1] == []  # written again


def test_without_a_valid_checkpoint_each_is_named_and_nothing_is_changed(resume_run):
    for step in (1, 2):
        (resume_run.out / "checkpoints" / f"checkpoint-{step}" / "manifest.json").unlink()
    before = sorted(resume_run.out.rglob("*"))
    with pytest.raises(UserError) as error:
        resume_run()
    assert len(error.value.lines) == 2 and all("has no manifest.json" in problem for problem in error.value.lines)
    assert sorted(resume_run.out.rglob("*")) == before


@pytest.mark.parametrize("wanted, number", [("", 2), (".", 2), ("checkpoints", 2), ("checkpoints/checkpoint-1", 1)])
def test_a_checkpoint_or_any_folder_that_contains_checkpoints_can_be_named(begun, wanted, number):
    folder, config = begun[0], load_config(begun[0] / "config.yaml")
    checkpoint, _ = find_checkpoint(folder, config, wanted and str(folder / wanted))
    assert checkpoint.folder.name == f"checkpoint-{number}"


def test_another_chat_template_under_the_same_name_is_refused():
    before = SimpleNamespace(run={"fingerprints": {"template_sha256": "a", "tokenizer_sha256": "b"}})
    check_fingerprints(before, {"template_sha256": "a", "tokenizer_sha256": "b"})
    with pytest.raises(UserError, match=r"^data\.chat_template: the chat template differ"):
        check_fingerprints(before, {"template_sha256": "c", "tokenizer_sha256": "b"})
    check_fingerprints(SimpleNamespace(run={"fingerprints": {}}), {"template_sha256": "c"})  # of an earlier version


def test_changed_settings_are_written_to_the_log(resume_run):
    resume_run("--set", "training.logging_steps=1", "--set", "training.report_to=none")
    assert "Changed since: training.logging_steps: 1, was 5" in (resume_run.out / "training_log.txt").read_text()


def test_other_data_under_the_same_name_are_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "moved").mkdir()
    data, held_out, moved = tmp_path / "articles.txt", tmp_path / "held_out.txt", tmp_path / "moved" / "a.txt"
    for path in (data, held_out, moved):
        shutil.copy("samples/articles.txt", path)
    flags = [*SMALL, "--set", "training.save_steps=1", "--output_dir", str(tmp_path / "on a copy"),
             "--set", f"data.eval_split={held_out}"]  # fmt: skip
    train_qlora.main([*flags, "--dataset", str(data), "--max_steps", "1"])
    monkeypatch.setattr(train_qlora, "load_adapted_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):  # the same content elsewhere
        train_qlora.main([*flags, "--dataset", str(moved), "--max_steps", "2", "--resume"])
    for path, key, what in ((held_out, "eval_split", "evaluation"), (data, "dataset", "training")):
        before = path.read_text()
        path.write_text(before.replace("the", "a"))
        with pytest.raises(UserError, match=rf"^data\.{key}: the {what} data differ from those of the run to resume"):
            train_qlora.main([*flags, "--dataset", str(data), "--max_steps", "2", "--resume"])
        path.write_text(before)


@pytest.mark.parametrize("file, what", [("model.safetensors", "base weights"), ("tokenizer.json", "tokenizer")])
def test_another_model_under_the_same_name_is_refused_before_it_is_loaded(tiny_dir, tmp_path, monkeypatch, file, what):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    flags = [*SMALL, "--model_name", str(model), "--set", "training.save_steps=1", "--output_dir", str(tmp_path / "out")]
    train_qlora.main([*flags, "--max_steps", "1"])
    if file == "tokenizer.json":
        content = json.loads((model / file).read_text())
        content["model"]["merges"] = content["model"]["merges"][:-1]
        (model / file).write_text(json.dumps(content))
    else:
        weights = load_file(model / file)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, model / file, {"format": "pt"})
    monkeypatch.setattr(train_qlora, "load_adapted_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError) as error:
        train_qlora.main([*flags, "--max_steps", "2", "--resume"])
    assert any(
        problem.startswith(f"model.name: the {what} differ from those of the run to resume") for problem in error.value.lines
    )
