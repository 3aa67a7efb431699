"""Test the training command as users run it: as a process for streams and signals, through main() otherwise."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)

import inference_example
import train_qlora
from qlora_kit import cli
from qlora_kit.config import GenerationSettings
from qlora_kit.config_file import load_config
from qlora_kit.errors import Failed, UserError
from tests import forked
from tests.tiny_run import TWO_LAYERS, result

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
# Two layers of the embedded model and a few short blocks; an in-process run takes about a second.
SMALL = [
    "--config", "configs/tiny.yaml", "--model_name", str(TWO_LAYERS), "--max_length", "32", "--batch_size", "2",
    "--set", "training.gradient_accumulation_steps=1", "--set", "data.max_train_samples=8", "--set", "data.max_eval_samples=2",
    "--set", "training.logging_steps=1",
]  # fmt: skip
TRAINED = ["--config", "configs/tiny.yaml", "--max_steps", "12", "--max_length", "128", "--batch_size", "1",
           "--set", "data.max_train_samples=32", "--set", "data.max_eval_samples=8"]  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


def train(*arguments: str) -> None:
    train_qlora.main([*SMALL, *arguments])


@pytest.fixture
def run_here(capsys):
    """Run the command in this process: its messages, its exit status, and what it leaves."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            cli.run(lambda: train_qlora.main([*arguments]))
        return subprocess.CompletedProcess(arguments, ending.value.code, *capsys.readouterr())

    return call


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- a whole run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    result = forked.run(["train_qlora.py", *TRAINED, "--output_dir", str(folder)], COLUMNS="500")  # wide enough for every line
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_leaves_adapter_curves_log_metrics_config_and_provenance(trained):
    folder, _ = trained
    expected = {
        "adapter_config.json", "adapter_model.safetensors", "training_curves.png", "training_log.txt", "metrics.jsonl",
        "config.yaml", "run.json", "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "checkpoints",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == expected  # nothing half-written is left either
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_training_lowers_the_perplexity_of_text_it_did_not_see(trained):
    provenance = json.loads((trained[0] / "run.json").read_text())
    before, after = provenance["perplexity"]["base"], provenance["perplexity"]["adapter"]
    assert after["perplexity"] + 3 * after["standard_error"] < before["perplexity"]
    assert before["tokens"] == after["tokens"] == 8 * 127  # each block predicts all but its first token


def test_the_log_and_the_provenance_state_the_same_perplexities(trained):
    folder, result = trained
    provenance = json.loads((folder / "run.json").read_text())["perplexity"]
    for text in (result.stderr, (folder / "training_log.txt").read_text()):
        match = re.search(r"base model ([\d.]+) ± ([\d.]+) +-> +adapter ([\d.]+) ± ([\d.]+)", text)
        shown = [float(group) for group in match.groups()]
        stated = [provenance[who][what] for who in ("base", "adapter") for what in ("perplexity", "standard_error")]
        assert shown == pytest.approx(stated, abs=0.0005)


def test_text_for_people_goes_to_standard_error_alone(trained):
    _, result = trained
    assert result.stdout == ""
    assert "LoRA: rank 16" in result.stderr and "325,632 trainable" in result.stderr
    assert "python inference_example.py" in result.stderr  # the next step


def test_no_library_prints_to_the_user(trained):
    lower = trained[1].stderr.lower()
    for noise in ("warning", "deprecat", "traceback", "kernels-community", "huggingface/tokenizers", "site-packages"):
        assert noise not in lower


def test_every_metrics_line_has_the_documented_keys(trained):
    lines = metrics(trained[0])
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert len(training) + len(evaluations) == len(lines)
    for line in training:
        assert set(line) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib"}
    assert [line["step"] for line in training] == [1, 5, 10]  # the first, then every logging_steps
    assert [line["step"] for line in evaluations] == [0, 12]  # the base model, and the end


def test_the_written_config_is_the_one_that_ran_and_runs_again(trained):
    config = load_config(trained[0] / "config.yaml")
    assert config.training.max_steps == 12 and config.data.max_length == 128 and config.data.max_train_samples == 32
    assert config.lora.rank == 16 and config.training.output_dir == str(trained[0])


def test_the_provenance_says_where_the_adapter_comes_from(trained, tiny_dir):
    provenance = json.loads((trained[0] / "run.json").read_text())
    assert provenance["base_model"] == {"name": "assets/tiny-qwen2", "revision": None, "folder": str(tiny_dir)}
    assert provenance["quantization"]["quant_type"] == "nf4" and provenance["quantization"]["compute_dtype"] == "float32"
    assert (provenance["seed"], provenance["optimizer_steps"]) == (42, 12)
    assert provenance["versions"]["torch"] == torch.__version__
    assert "--max_steps 12" in provenance["command"]
    assert provenance["data"]["train_blocks"] == 32 and provenance["data"]["eval_blocks"] == 8
    assert provenance["config"] == load_config(trained[0] / "config.yaml").model_dump()
    assert (provenance["last_step"], provenance["ended"], provenance["skipped_steps"]) == (12, "after the last step", [])


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(trained, tiny_dir):
    folder, _ = trained
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == tiny_dir  # absolute, so that peft finds it from any folder
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=packing, dtype=torch.float32, device_map="cpu")
    for module in plain.modules():  # where the processor has AVX512-BF16, bitsandbytes would compute in bfloat16 all the same
        module.support_avx512bf16_for_cpu = False
    ids = AutoTokenizer.from_pretrained(folder)("The river is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        without = plain(ids).logits.clone()
        expected = PeftModel.from_pretrained(plain, folder).eval()(ids).logits
    generator = inference_example.load_generator(folder, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(generator.engine.model(ids).logits, expected)
    assert (expected - without).abs().max() > 0.1  # the adapter does something


# --- flags and settings -------------------------------------------------------------------------------------------------


def test_named_flags_reach_the_adapter(tmp_path):
    train("--rank", "8", "--alpha=16", "--num-epochs", "1", "--dropout", "0.1", "--seed", "3", "--learning_rate", "1e-3",
          "--output_dir", str(tmp_path / "r8"))  # fmt: skip
    config = json.loads((tmp_path / "r8" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.1)
    provenance = json.loads((tmp_path / "r8" / "run.json").read_text())
    assert provenance["optimizer_steps"] == 4  # 8 blocks in batches of 2, once
    assert provenance["seed"] == 3
    for tensor in load_file(tmp_path / "r8" / "adapter_model.safetensors").values():
        assert 8 in tensor.shape


def test_attention_alone_in_fp4(tmp_path, capsys):
    train("--max_steps", "2", "--set", "lora.target_modules=[q_proj, k_proj, v_proj, o_proj]", "--set",
          "quantization.quant_type=fp4", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(names) == 2 * 4 * 2 and all("self_attn" in name for name in names)  # layers, projections, A and B
    assert json.loads((tmp_path / "out" / "run.json").read_text())["quantization"]["quant_type"] == "fp4"
    assert "4-bit FP4" in capsys.readouterr().err


def test_without_4_bit_and_without_evaluation(tmp_path, capsys):
    train("--max_steps", "1", "--set", "quantization.load_in_4bit=false", "--set", "data.eval_split=null", "--set",
          "training.gradient_checkpointing=true", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert json.loads((tmp_path / "out" / "run.json").read_text())["perplexity"] is None
    assert "16-bit" in capsys.readouterr().err


@pytest.mark.parametrize("name, targets, tensors", [
    ("llama", "[q_proj, v_proj, down_proj]", 2 * 3 * 2),
    ("gpt2", "[c_attn, c_proj, c_fc]", 2 * 4 * 2),  # attention and MLP have a c_proj each
    ("gpt2", "all-linear", 2 * 4 * 2),
])  # fmt: skip
def test_another_architecture_trains(other_models, tmp_path, name, targets, tensors):
    train("--max_steps", "3", "--model_name", str(other_models[name]), "--set", f"lora.target_modules={targets}", "--set",
          "training.lr_scheduler=constant", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(saved) == tensors
    assert all(tensor.any() for tensor in saved.values())  # every B moved away from zero
    perplexity = json.loads((tmp_path / "out" / "run.json").read_text())["perplexity"]
    assert perplexity["adapter"]["loss"] < perplexity["base"]["loss"]


def test_the_micro_batch_divides_the_work_and_nothing_else(tmp_path, capsys):
    losses = []
    for micro_batch in ("4", "1"):
        out = tmp_path / micro_batch
        train("--max_steps", "2", "--batch_size", "4", "--dropout", "0", "--set", f"performance.micro_batch={micro_batch}",
              "--set", "training.lr_scheduler=constant", "--output_dir", str(out))  # fmt: skip
        assert f"Each optimizer step: {micro_batch} sequence" in capsys.readouterr().err
        losses.append([line.get("loss", line.get("eval_loss")) for line in metrics(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- the plan -----------------------------------------------------------------------------------------------------------


def plan(capsys, *arguments: str) -> list[str]:
    train_qlora.main(["--plan", *arguments])
    shown = capsys.readouterr()
    assert shown.err == ""
    return [line for line in shown.out.splitlines() if not line.startswith("Time")]


def test_the_plan_is_answered_at_once_and_without_torch(root):
    """The plan of the default run for a card of 8 GiB needs no weights, no network and no GPU."""
    code = """
import sys, time
started = time.perf_counter()
import train_qlora
train_qlora.main(["--plan", "--gpu", "RTX 4060"])
seconds = time.perf_counter() - started
heavy = {"torch", "transformers", "datasets", "peft", "huggingface_hub"}
print(seconds, sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    quickest = 60.0
    for _ in range(3):  # a busy machine may be slow once
        result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
        seconds, _, imported = result.stderr.partition(" ")
        assert imported.strip() == "[]", result.stderr
        verdict, time = result.stdout.splitlines()[-2:]
        assert verdict.startswith("Fits: ") and time.startswith("Time on RTX 4060")
        quickest = min(quickest, float(seconds))
        if quickest < 1:
            break
    assert quickest < 1


def test_the_plan_of_a_card_that_is_too_small_ends_with_the_remedy(capsys):
    title, *_, verdict = plan(capsys, "--set", "performance.vram_limit_gib=2.2")
    assert title.startswith("Qwen/Qwen2.5-3B-Instruct: 1 x 16 sequences of 512 tokens, rank 16, 36 of 36 layers")
    assert verdict.startswith("Does not fit: ") and "2.20 are available (performance.vram_limit_gib)" in verdict
    assert verdict.endswith("Add --set performance.offload_embedding=true, the cheapest change that fits.")
    assert plan(capsys, "--config", "configs/lean.yaml", "--set", "performance.vram_limit_gib=2.2")[-1].startswith("Fits: ")


@NO_GPU
def test_without_a_gpu_and_a_limit_the_plan_is_for_8_gib_and_says_so(capsys):
    assert plan(capsys)[-1].endswith("of 7.40 GiB (no GPU here: a card of 8 GiB assumed, less CUDA's own).")


def test_a_plan_needs_the_models_config_alone(capsys, tmp_path, tiny_dir):
    shape = json.loads((tiny_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(shape))
    title, *_, verdict = plan(capsys, "--model_name", str(tmp_path), "--set", "performance.vram_limit_gib=1")
    assert title.startswith(f"{tmp_path}: 16 x 1 sequences of 512 tokens, rank 16, 0 of {shape['num_hidden_layers']} layers")
    assert verdict.startswith("Fits: ")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_plan_asks_for_neither_the_data_nor_a_free_folder(capsys, trained):
    verdict = plan(capsys, *TRAINED, "--output_dir", str(trained[0]), "--dataset", "not/there.txt", "--set",
                   "performance.vram_limit_gib=8")[-1]  # fmt: skip
    assert verdict.startswith("Fits: ")


def test_a_plan_for_another_architecture_is_refused_in_one_line(run_here, other_models):
    result = run_here("--plan", "--model_name", str(other_models["gpt2"]))
    assert result.returncode == 2
    assert_one_line(result, f"--plan: {other_models['gpt2']}: has no prediction", "not built like Llama", "--max_steps")


@pytest.mark.parametrize("arguments, words", [
    (["--set", "performance.fused_lora=false"], ["has no prediction", "performance.fused_lora is false"]),
    (["--model_name", "./no-such-model"], ["model.name", "./no-such-model"]),
    (["--rank", "0"], ["lora.rank"]),
])  # fmt: skip
def test_a_plan_that_cannot_be_made(capsys, arguments, words):
    with pytest.raises(UserError) as error:
        train_qlora.main(["--plan", *arguments])
    (problem,) = error.value.lines
    assert all(word in problem for word in words) and "\n" not in problem
    assert capsys.readouterr().out == ""


# --- stopping and going on ----------------------------------------------------------------------------------------------

STOPPED = [*SMALL, "--max_steps", "8", "--max_length", "64", "--batch_size", "4", "--set", "data.max_train_samples=16",
           "--set", "training.eval_steps=3", "--set", "training.save_steps=5"]  # fmt: skip


@pytest.fixture(scope="module")
def stopped_and_resumed(root, tmp_path_factory):
    """Stop a run by SIGTERM after its first logged step, then run the resume command that it printed."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    reading, writing = os.pipe()
    process = forked.start(["train_qlora.py", *STOPPED, "--output_dir", str(folder)], (reading, writing, writing), COLUMNS="500")
    os.close(writing)
    shown = []
    with os.fdopen(reading) as output:
        for line in output:
            shown.append(line)
            if line.startswith("step 1/"):
                os.kill(process.pid, signal.SIGTERM)
    status = forked.wait(process)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    recorded, log = metrics(folder), (folder / "training_log.txt").read_text()
    message = shown[-1].strip()
    python, script, *again = shlex.split(message.partition("Continue with: ")[2])
    assert (python, script) == ("python", "train_qlora.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train_qlora.main(again)
    return status, "".join(shown), left, recorded, log, message, folder


def test_sigterm_saves_and_prints_the_resume_command(stopped_and_resumed):
    status, stderr, left, _, log, message, folder = stopped_and_resumed
    assert status == 143
    assert "Traceback" not in stderr
    step = int(re.search(r"after step (\d+)", message).group(1))
    assert 1 <= step < 8
    assert f"checkpoints/checkpoint-{step}/adapter_model.safetensors" in left
    assert "training_curves.png" in left
    assert "adapter_model.safetensors" not in left and "run.json" not in left  # an unfinished run is not taken for a finished one
    assert message.endswith("--resume") and str(folder) in message
    assert f"  Stopped after step {step}; everything is saved." in log.splitlines()[-1]
    assert f"\nStopping after step {step} and saving. SIGTERM again stops now and loses everything since the start.\n" in stderr


def test_the_log_of_a_resumed_run_does_not_mention_the_stop(stopped_and_resumed):
    assert "Stopped after" not in (stopped_and_resumed[-1] / "training_log.txt").read_text()


def test_the_printed_command_finishes_the_run(stopped_and_resumed):
    *_, recorded, _, _, folder = stopped_and_resumed
    lines = metrics(folder)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))  # each once
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6, 8]
    assert metrics(folder)[: len(recorded)] == recorded
    base = json.loads((folder / "run.json").read_text())["perplexity"]["base"]
    assert base["loss"] == recorded[0]["eval_loss"]  # not measured again
    assert json.loads((folder / "run.json").read_text())["optimizer_steps"] == 8


def test_a_resumed_run_gives_the_adapter_of_an_uninterrupted_one(stopped_and_resumed, tmp_path):
    """Data order, dropout, optimizer state and schedule continue: on the CPU the adapters are equal byte for byte."""
    folder = stopped_and_resumed[-1]
    train_qlora.main([*STOPPED, "--output_dir", str(tmp_path / "straight")])
    assert weights(folder) == weights(tmp_path / "straight")

    def losses(run):
        return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in metrics(run)]

    assert losses(folder) == losses(tmp_path / "straight")


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    """The Trainer alone would train one step too many after a stop in the last step."""
    arguments = ["--max_steps", "2", "--set", "training.lr_scheduler=constant", "--output_dir", str(tmp_path / "out")]
    train(*arguments)
    before = weights(tmp_path / "out"), metrics(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    train(*arguments, "--resume")
    assert (weights(tmp_path / "out"), metrics(tmp_path / "out")) == before
    assert json.loads((tmp_path / "out" / "run.json").read_text())["optimizer_steps"] == 2


def test_resuming_from_an_earlier_checkpoint_logs_later_steps_once(tmp_path):
    out = tmp_path / "out"
    arguments = ["--max_steps", "3", "--set", "training.save_steps=1", "--set", "training.eval_steps=2", "--output_dir", str(out)]
    train(*arguments, "--set", "training.save_total_limit=null")
    before = weights(out), [(line["step"], line.get("loss")) for line in metrics(out)]
    train(*arguments, "--resume", str(out / "checkpoints" / "checkpoint-1"))
    assert (weights(out), [(line["step"], line.get("loss")) for line in metrics(out)]) == before


def test_resuming_with_more_steps_continues(tmp_path):
    arguments = ["--set", "training.lr_scheduler=constant", "--output_dir", str(tmp_path / "out")]
    train(*arguments, "--max_steps", "2")
    train(*arguments, "--max_steps", "3", "--resume")
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == [1, 2, 3]


def test_more_epochs_on_a_finished_run(tmp_path):
    """8 blocks in batches of 2 are 4 steps per epoch. Earlier log lines stay, and the log names the changed setting."""
    arguments = ["--set", "data.eval_split=null", "--set", "training.lr_scheduler=constant", "--max_length", "16",
                 "--output_dir", str(tmp_path / "out")]  # fmt: skip
    train(*arguments, "--num_epochs", "1")
    before = metrics(tmp_path / "out")
    train(*arguments, "--num_epochs", "2", "--resume")
    after = metrics(tmp_path / "out")
    assert after[: len(before)] == before and [line["step"] for line in after if "loss" in line] == list(range(1, 9))
    assert "Changed since: training.num_epochs: 2.0, was 1.0" in (tmp_path / "out" / "training_log.txt").read_text()


def test_more_steps_follow_the_schedule_of_the_longer_run(tmp_path):
    """A cosine of 2 steps ends at 0; the 4 steps added to them have the rates of steps 3 to 6 of 6, not 0."""
    arguments = ["--set", "data.eval_split=null", "--set", "training.warmup_ratio=0", "--learning_rate", "1e-3",
                 "--set", "training.save_steps=1", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    train(*arguments, "--max_steps", "2")
    train(*arguments, "--max_steps", "6", "--set", "training.save_total_limit=null", "--resume")
    rates = [line["learning_rate"] for line in metrics(tmp_path / "out") if "loss" in line]
    cosine = [1e-3 * (1 + math.cos(math.pi * done / 6)) / 2 for done in range(2, 6)]
    assert rates == pytest.approx([1e-3, 0.5e-3, *cosine])
    third, second = (weights(tmp_path / "out" / "checkpoints" / f"checkpoint-{step}") for step in (3, 2))
    assert third != second


def test_a_run_with_more_steps_than_asked_for_is_left_unchanged(trained):
    files = {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match=r"training\.max_steps: 1: ends the run at step 1, before .*checkpoint-\d+\. Raise it"):
        train_qlora.main([*TRAINED, "--output_dir", str(trained[0]), "--max_steps", "1", "--resume"])
    assert {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file() and path.name != ".lock"} == files


def test_resuming_refuses_a_setting_that_would_make_it_another_run(trained):
    before = weights(trained[0])
    with pytest.raises(UserError, match=r"lora\.rank: 8: differs from 16, the value of the run to resume"):
        train_qlora.main([*TRAINED, "--output_dir", str(trained[0]), "--rank", "8", "--resume"])
    assert weights(trained[0]) == before


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--resume: .*: has no checkpoint"):
        train("--output_dir", str(tmp_path / "nothing"), "--resume")
    assert not (tmp_path / "nothing").exists()


def test_a_run_that_diverges_while_it_replaces_another_one_costs_nothing(tmp_path):
    out = tmp_path / "out"
    train("--max_steps", "1", "--output_dir", str(out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(Failed, match="step"):
        train("--max_steps", "4", "--learning_rate", "1e30", "--set", "training.max_grad_norm=0", "--set",
              "training.warmup_ratio=0", "--overwrite", "--output_dir", str(out))  # fmt: skip
    assert {path: path.read_bytes() for path in before} == before
    last = (out / ".new" / "training_log.txt").read_text().splitlines()[-1]
    assert "ended without an adapter: the loss is nan at step 2 (blocks " in last


def test_a_run_that_replaces_another_one_is_resumed_where_it_stopped(run_here, tmp_path, monkeypatch):
    """Killed before its adapter stands, it leaves the old one; resumed, it gives the adapter of its undisturbed run."""
    out = tmp_path / "out"
    flags = ["--set", "training.save_steps=1", "--max_steps", "2", "--output_dir", str(out)]
    train(*flags)
    before = weights(out), (out / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("qlora_kit.training.finish.save_adapter", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train(*flags, "--seed", "7", "--overwrite")
    assert (weights(out), (out / "run.json").read_bytes()) == before
    assert_one_line(run_here(*SMALL, *flags), ".new", "Continue that with --resume, start it anew with --overwrite")
    undisturbed = weights(out / ".new" / "checkpoints" / "checkpoint-2")
    shutil.rmtree(out / ".new" / "checkpoints" / "checkpoint-2")
    train(*flags, "--seed", "7", "--resume", str(out))
    assert weights(out) == undisturbed != before[0] and not (out / ".new").exists()


# --- a folder that is taken ---------------------------------------------------------------------------------------------


def test_a_second_run_leaves_a_finished_one_alone(run_here, trained):
    folder, _ = trained
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}, weights(folder)
    result = run_here(*TRAINED, "--output_dir", str(folder))
    assert result.returncode == 2
    assert_one_line(result, "training.output_dir", str(folder), "--resume", "--overwrite", "--output_dir")
    assert ({path.name: path.stat().st_mtime_ns for path in folder.iterdir()}, weights(folder)) == before


def test_overwrite_replaces_the_run_and_only_when_the_new_one_can_start(tmp_path):
    out = str(tmp_path / "out")
    train("--max_steps", "3", "--output_dir", out)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = weights(tmp_path / "out")
    with pytest.raises(UserError):  # found out after the model is loaded
        train("--max_steps", "2", "--output_dir", out, "--overwrite", "--set", "lora.target_modules=[nothing]")
    assert weights(tmp_path / "out") == before
    train("--max_steps", "2", "--output_dir", out, "--overwrite", "--seed", "1")
    assert weights(tmp_path / "out") != before
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert {line["step"] for line in metrics(tmp_path / "out")} == {0, 1, 2}
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


# --- mistakes -----------------------------------------------------------------------------------------------------------


def assert_one_line(result: subprocess.CompletedProcess, *words: str, after_loading: bool = False) -> None:
    lines = result.stderr.strip().splitlines()
    assert result.stdout == ""
    assert lines[-1].startswith("error: ") and sum(line.startswith("error:") for line in lines) == 1
    assert after_loading or len(lines) == 1
    for word in words:
        assert word in lines[-1]


@pytest.mark.parametrize("arguments, words", [
    (["--config", "no/such.yaml"], ["no/such.yaml", "config.yaml"]),
    (["--rnak", "8"], ["--rnak", "--rank"]),
    (["--alpha", "high"], ["lora.alpha", "high"]),
    (["--set", "training.learning_rat=1"], ["training.learning_rat", "training.learning_rate"]),
    (["--dataset", "no/such/file.txt"], ["data.dataset", "no/such/file.txt"]),
    (["--output_dir", "README.md/below"], ["training.output_dir", "--output_dir"]),
    (["--model_name", "./no-such-model"], ["model.name", "./no-such-model"]),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(run_here, tmp_path, arguments, words):
    taken = tmp_path / "file"
    taken.write_text("")
    given = [word.replace("README.md", str(taken)) for word in arguments]
    base = [] if "--config" in given else ["--config", "configs/tiny.yaml"]
    output = [] if "--output_dir" in given else ["--output_dir", str(tmp_path / "out")]
    result = run_here(*base, *output, *given)
    assert result.returncode == 2
    assert_one_line(result, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_mistake_found_after_loading_is_one_line_and_status_2_too(run_here, tmp_path):
    result = run_here(*SMALL, "--set", "lora.target_modules=[c_attn]", "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 2
    assert_one_line(result, "lora.target_modules: c_attn", "q_proj", "all-linear", after_loading=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refuses(tmp_path):
    """Check that a run is refused in one line with these words, and that nothing is written."""

    def check(*arguments: str, words: list[str]) -> None:
        before = {path for path in tmp_path.rglob("*")}
        with pytest.raises(UserError) as error:
            train("--output_dir", str(tmp_path / "out"), *arguments)
        (problem,) = error.value.lines
        assert "\n" not in problem
        for word in words:
            assert word in problem
        assert {path for path in tmp_path.rglob("*")} == before

    return check


@pytest.mark.parametrize("text, word", [
    ("", "empty"),
    ("# nothing\n", "empty"),
    ("lora: [1, 2\n", "YAML"),
    ("- rank\n", "mapping"),
    ("lora:\n  rnak: 8\n", "lora.rank"),
    ("lroa:\n  rank: 8\n", "lora"),
    ("lora:\n  rank: 0\n", "lora.rank"),
    ("lora:\n  alpha: high\n", "'high'"),
])  # fmt: skip
def test_a_config_file_with_a_mistake(tmp_path, text, word):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        train_qlora.main(["--config", str(path), "--output_dir", str(tmp_path / "out")])
    (problem,) = error.value.lines
    assert word in problem and "mine.yaml" in problem
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", ["empty.txt: is empty"]),
    ("blank.txt", b"\n \n", ["blank.txt: is empty"]),
    ("binary.txt", b"\x00\x01\x02" * 50, ["binary.txt: ", "not text"]),
    ("picture.png", b"\x89PNG\r\n", ["picture.png: ", ".txt"]),
    ("latin1.txt", "Ein Gerät ".encode("latin-1") * 300, ["latin1.txt: ", "UTF-8"]),
    ("short.txt", b"three short words", ["data.dataset", "max_length"]),
])  # fmt: skip
def test_a_dataset_file_with_a_mistake(tmp_path, refuses, name, content, words):
    (tmp_path / name).write_bytes(content)
    refuses("--dataset", str(tmp_path / name), words=words)


def copy_model(tiny_dir: Path, folder: Path, leave_out: str) -> Path:
    folder.mkdir()
    for file in tiny_dir.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja") and not file.name.startswith(leave_out):
            (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("missing, words", [
    ("config.json", ["model.name", "no config.json"]),
    ("tokenizer", ["model.name", "tokenizer"]),
    ("model", ["model.name", "safetensors"]),
])  # fmt: skip
def test_a_model_folder_that_is_not_whole(tiny_dir, tmp_path, refuses, missing, words):
    refuses("--model_name", str(copy_model(tiny_dir, tmp_path / "model", missing)), words=words)


def test_damaged_weights(tiny_dir, tmp_path, refuses):
    folder = copy_model(tiny_dir, tmp_path / "model", "model.safetensors")
    (folder / "model.safetensors").write_bytes((tiny_dir / "model.safetensors").read_bytes()[:100_000])
    refuses("--model_name", str(folder), words=["model.name", str(folder), "damaged"])


def test_a_block_longer_than_the_models_context(refuses):
    refuses("--max_length", "1025", words=["data.max_length: 1025", "1024"])


def test_a_hub_dataset_without_a_network(refuses):
    refuses("--dataset", "Salesforce/wikitext", "--set", "data.subset=wikitext-2-raw-v1", "--set", "data.eval_split=validation",
            words=["data.dataset: Salesforce/wikitext", "hf download", "--dataset"])  # fmt: skip


def test_a_hub_model_without_a_network(run_here, tmp_path):
    result = run_here(*SMALL, "--model_name", "nobody/no-such-model", "--output_dir", str(tmp_path / "out"))
    assert result.returncode == 2
    assert_one_line(result, "model.name: nobody/no-such-model", "hf download nobody/no-such-model", "local folder")
    assert not (tmp_path / "out").exists()


@NO_GPU
def test_cuda_without_a_gpu(refuses):
    refuses("--set", "training.device=cuda", words=["training.device: cuda", "or use auto"])


@NO_GPU
def test_the_default_run_without_a_gpu_offers_the_laptop_model(run_here, tmp_path):
    result = run_here("--output_dir", str(tmp_path / "out"))
    assert result.returncode == 2
    assert_one_line(result, "training.device", "configs/tiny.yaml", "training.device=cpu")
    assert not (tmp_path / "out").exists()


@NO_GPU
@pytest.mark.parametrize("key", ["performance.compile", "performance.cuda_graphs", "performance.offload_embedding"])
def test_a_technique_of_the_gpu_without_one(refuses, tmp_path, key):
    refuses("--set", f"{key}=true", words=[f"{key}: true: ", "CUDA GPU", "false"])
    (tmp_path / "out").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        (tmp_path / "out" / name).write_text("an earlier run's")
    refuses("--overwrite", "--set", f"{key}=true", words=[f"{key}: true: "])
    assert weights(tmp_path / "out") == b"an earlier run's"


@NO_GPU
def test_a_technique_of_the_gpu_without_one_is_one_line_and_status_2_before_the_model_is_loaded(run_here, trained):
    folder, _ = trained
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}, weights(folder)
    result = run_here(*TRAINED, "--output_dir", str(folder), "--overwrite", "--set", "performance.cuda_graphs=true")
    assert result.returncode == 2
    assert_one_line(result, "performance.cuda_graphs: true: cannot work here (needs a CUDA GPU). Use auto or false.")
    assert ({path.name: path.stat().st_mtime_ns for path in folder.iterdir()}, weights(folder)) == before


def test_a_mistake_that_only_the_loaded_model_shows_costs_no_earlier_run(tmp_path, monkeypatch):
    """A switch set to true may fail only with the loaded model: without a compiler, or in an architecture without graphs."""
    train("--max_steps", "1", "--output_dir", str(tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def cannot(*_):
        raise UserError("performance.compile", True, "cannot work here (needs a C compiler)", "use auto or false")

    monkeypatch.setattr("qlora_kit.training.build.build_micro_step", cannot)
    for arguments in (["--overwrite", "--seed", "1"], ["--max_steps", "2", "--resume"]):
        with pytest.raises(UserError, match=r"performance\.compile"):
            train("--max_steps", "1", "--output_dir", str(tmp_path / "out"), *arguments)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_float16_needs_a_gpu(refuses):
    refuses("--set", "quantization.compute_dtype=float16", "--set", "training.device=cpu",
            words=["quantization.compute_dtype", "float16", "bfloat16"])  # fmt: skip


def test_a_mistake_in_the_data_is_reported_before_weights_are_searched(tmp_path, tiny_dir):
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "data.csv").write_text("words\na\n")
    flags = ["--config", "configs/tiny.yaml", "--model_name", str(model), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"data\.csv: record 1: the keys are words, expected .* or text \(data\.text_field\)"):
        train_qlora.main([*flags, "--dataset", str(tmp_path / "data.csv")])
    with pytest.raises(UserError, match="safetensors"):
        train_qlora.main(flags)


# --- records ------------------------------------------------------------------------------------------------------------


def test_a_run_on_instructions_says_what_it_read_and_how_prompts_are_to_be_given(root, tmp_path, capsys):
    flags = ["--config", "configs/instruct.yaml", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    train_qlora.main([*flags, "--max_length", "64", "--batch_size", "2", "--set", "data.max_eval_samples=2"])
    log = capsys.readouterr().err
    assert "Training data: samples/alpaca.jsonl: 130 alpaca records, answers trained (format recognised by its keys); " in log
    assert "Evaluation data: 33 alpaca records, answers trained, 2 blocks" in log
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    assert provenance["prompt_style"] == "chat" and len(provenance["data"]["train_sha256"]) == 64
    assert provenance["optimizer_steps"] == 2


def test_a_mistake_in_the_data_is_one_line_and_status_2_and_leaves_nothing(run_here, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text('{"prompt": "Hi", "completion": "Hello"}\n{"prompt": "Hi", "completion": Hello}\n')
    flags = ["--config", "configs/tiny.yaml", "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    result = run_here(*flags)
    assert result.returncode == 2 and result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {data}: line 2 is not valid JSON (Expecting value). Correct the line."]
    assert result.stderr.splitlines()[-1] == errors[0] and not (tmp_path / "out").exists()


def test_what_was_trained_on_instructions_ends_its_answers_itself(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    folder = str(tmp_path / "chat")
    train_qlora.main([
        "--config", "configs/instruct.yaml", "--max_steps", "28", "--max_length", "64", "--batch_size", "1", "--dropout", "0",
        "--learning_rate", "5e-3", "--set", "data.eval_split=null", "--set", "data.max_train_samples=4", "--output_dir", folder,
    ])  # fmt: skip
    settings = GenerationSettings(max_new_tokens=40, temperature=0.0, repetition_penalty=1.0)
    generator = inference_example.load_generator(folder, device="cpu", settings=settings)
    prompts = [generator.encode(prompt) for prompt in ("What color is grass?", "What is a Boolean?", "Name three things.")]
    answers = generator.complete(prompts)
    assert answers[0].text == "Grass is green."
    assert [answer.stop for answer in answers] == ["end"] * 3
    with generator.adapter_off():
        assert [answer.stop for answer in generator.complete(prompts)] == ["length"] * 3


@pytest.mark.parametrize("called", ["../outside", "a/b", "..", ""])
def test_a_chat_template_called_like_a_path_is_refused_before_training(tmp_path, tiny_dir, called):
    """The template would be written to that path after training."""
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    templates = [{"name": name, "template": "{{ messages }}"} for name in ("default", called)]
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": templates}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"model\.name: .*which is no file name.*tokenizer_config\.json"):
        train_qlora.main([*SMALL, "--model_name", str(model), "--max_steps", "1", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_several_chat_templates_is_saved_over_an_earlier_one(tmp_path, tiny_dir):
    model = Path(shutil.copytree(tiny_dir, tmp_path / "model"))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    flags = [*SMALL, "--model_name", str(model), "--max_steps", "1", "--set", "data.eval_split=null"]
    for again in ([], ["--overwrite"]):
        train_qlora.main([*flags, *again, "--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("fused", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_answers_to_prompts_are_logged_and_change_nothing(tmp_path, fused):
    always = ["--max_steps", "2", "--set", "training.eval_steps=1", "--set", f"performance.fused_lora={fused}"]
    for name, prompts in (("without", "null"), ("with", "[The river, A lake]")):
        train(*always, "--set", f"training.sample_prompts={prompts}", "--output_dir", str(tmp_path / name))
    assert result(tmp_path / "with") == result(tmp_path / "without")
    log = (tmp_path / "with" / "training_log.txt").read_text()
    assert re.findall(r"^step (\d): '(The river|A lake)' -> '", log, re.MULTILINE) == [
        (step, prompt) for step in "012" for prompt in ("The river", "A lake")
    ]


@pytest.mark.slow
def test_the_showcase_of_instructions_does_not_overfit(tmp_path):
    train_qlora.main(["--config", "configs/instruct.yaml", "--output_dir", str(tmp_path)])
    base, *_, last = evaluations = [line for line in metrics(tmp_path) if "eval_loss" in line]
    best = min(evaluations, key=lambda line: line["eval_loss"])
    assert last["eval_perplexity"] <= best["eval_perplexity"] + best["eval_standard_error"]
    assert last["eval_perplexity"] + 3 * last["eval_standard_error"] < base["eval_perplexity"]
