"""The Trainer's overrides and callbacks: real steps with the embedded model, in this process."""

import copy
import inspect
import json
import math
import os
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import train_qlora
from qlora_kit.adapter.save import save_adapter
from qlora_kit.config_file import load_config
from qlora_kit.data.blocks import TextBlocks
from qlora_kit.errors import Failed, Stopped, UserError
from qlora_kit.fast.training_pass import FastDecoder
from qlora_kit.model.loss import token_losses
from qlora_kit.model.perplexity import Perplexity, as_metrics, recorded_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.output.checkpoints import staged_checkpoint
from qlora_kit.output.metrics import read_metrics
from qlora_kit.planning.plan import make_plan
from qlora_kit.training import build, progress
from qlora_kit.training.build import PRIVATE_OVERRIDES, TrainingData, build_store, build_trainer, training_arguments
from qlora_kit.training.machine import Machine, look_at_machine
from qlora_kit.training.processes import ALONE
from qlora_kit.training.progress import SpeedMeter
from qlora_kit.training.report import Run, RunReport
from qlora_kit.training.stop import StopCallback, explaining_interrupt
from qlora_kit.training.trainer import QLoraTrainer
from tests.tiny_run import TWO_LAYERS

T = 16  # block length


@dataclass(frozen=True)
class MaskedBlocks(TextBlocks):
    """The labels of row n are masked up to position `masked[n]`."""

    masked: tuple[int, ...] = ()

    def __getitem__(self, index):
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[: (self.masked or [0] * len(self))[index]] = -100
        return row | {"labels": labels}


def random_rows(count: int, masked: tuple[int, ...] = ()) -> MaskedBlocks:
    ids = np.random.default_rng(7).integers(0, 6000, (count, T), dtype="int32")
    return MaskedBlocks(ids, documents=1, join_rule="", tail_tokens=0, masked=masked)


@pytest.fixture
def make_config(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)

    def make(**changed):
        overrides = {
            "model.name": str(TWO_LAYERS), "data.max_length": T, "lora.rank": 4, "lora.dropout": 0.0, "training.batch_size": 1,
            "training.gradient_accumulation_steps": 4, "training.lr_scheduler": "constant", "training.warmup_ratio": 0.0,
            "training.logging_steps": 1, "training.output_dir": str(tmp_path / "out"), "training.max_steps": 2,
        }  # fmt: skip
        return load_config(root / "configs" / "tiny.yaml", overrides | {k.replace("__", "."): v for k, v in changed.items()})

    return make


@pytest.fixture
def make_trainer(make_config):
    def make(train=None, evaluation=None, **changed):
        config = make_config(**changed)
        machine, plan = look_at_machine(config, None), make_plan(config, None, None)
        report = RunReport(Run(config, machine, plan, ALONE))
        make.tokenizer = load_tokenizer(config.model)
        model = train_qlora.load_adapted_model(config, machine, make.tokenizer, report)
        folder = make.folder = Path(config.training.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        report.log.open(folder, None)
        store = build_store(config, plan, ALONE, {}, "text", report, folder)
        return build_trainer(model, TrainingData(train or random_rows(8), evaluation), config, machine, plan, report, store)

    return make


class Spy(TrainerCallback):
    """The gradients of each optimizer step as the optimizer sees them."""

    def __init__(self, trainer):
        self.trainer, self.gradients = trainer, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **rest):
        (flat,) = self.trainer.optimizer.param_groups[0]["params"]
        self.gradients.append(flat.grad.clone())


class Gradients(TrainerCallback):
    """The norm of all gradients that the optimizer applies in its first step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **rest):
        parameters = [p for group in self.trainer.optimizer.param_groups for p in group["params"]]
        self.norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters]))


class At(TrainerCallback):
    """Calls `act(model)` at the beginning of one step, counted from 1."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, model=None, **rest):
        if state.global_step + 1 == self.step:
            self.act(model)


# --- settings -> TrainingArguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks, changed, steps", [
    (10, {"training__num_epochs": 2}, 6),  # 10 blocks in fours: 3 steps an epoch, the last one short
    (10, {"training__num_epochs": 0.5}, 2),  # half of 3, rounded up
    (8, {"training__num_epochs": 3}, 6),
    (8, {"training__num_epochs": 3, "performance__micro_batch": 4}, 6),  # however the 4 are divided
    (10, {"training__num_epochs": 2, "training__max_steps": 5}, 5),
])  # fmt: skip
def test_total_steps(make_config, blocks, changed, steps):
    assert make_config(**{"training__max_steps": None} | changed).total_steps(blocks) == steps


def test_total_steps_is_what_the_trainer_takes(make_trainer):
    trainer = make_trainer(random_rows(10), training__max_steps=None, training__num_epochs=0.5)
    trainer.train()
    assert trainer.state.global_step == 2 == trainer.report.run.config.total_steps(10)


def arguments(config, steps=100, evaluate=True, dtype=torch.float32):
    rows = make_plan(config, None, None).micro_batch
    return training_arguments(config, Machine("cpu", dtype, []), steps, evaluate, rows, Path("checkpoints"))


def test_a_micro_batch_divides_the_effective_batch_and_leaves_it_as_it_is(make_config):
    plain = arguments(make_config(training__batch_size=2, training__gradient_accumulation_steps=6))
    assert (plain.per_device_train_batch_size, plain.gradient_accumulation_steps) == (2, 6)
    split = arguments(make_config(training__batch_size=2, training__gradient_accumulation_steps=6, performance__micro_batch=4))
    assert (split.per_device_train_batch_size, split.gradient_accumulation_steps) == (4, 3)


@pytest.mark.parametrize("ratio, steps, warmup", [(0.03, 100, 3), (0.03, 10, 1), (0.0, 100, 0), (0.5, 7, 4)])
def test_warm_up_is_a_share_of_all_steps_rounded_up(make_config, ratio, steps, warmup):
    assert arguments(make_config(training__warmup_ratio=ratio), steps).warmup_steps == warmup


def test_settings_reach_the_trainer(make_config, tmp_path):
    made = arguments(
        make_config(
            training__learning_rate=3e-4, training__lr_scheduler="cosine", training__weight_decay=0.01,
            training__max_grad_norm=0.5, training__optim="adamw_8bit", training__logging_steps=7, training__eval_steps=9,
            training__save_steps=18, training__save_total_limit=3, training__seed=5, training__max_steps=None,
            training__num_epochs=1.5,
        )
    )  # fmt: skip
    assert made.output_dir == "checkpoints"
    assert (made.learning_rate, made.lr_scheduler_type, made.weight_decay) == (3e-4, "cosine", 0.01)
    assert made.max_grad_norm == 0  # the library would clip before the gradients of all processes are summed
    assert (made.optim, made.logging_steps, made.eval_steps, made.save_steps) == ("adamw_8bit", 7, 9, 18)
    assert (made.seed, made.max_steps, made.num_train_epochs) == (5, -1, 1.5)
    assert made.save_total_limit is None  # the library would remove by rules of its own
    assert made.eval_strategy == "steps" and not made.load_best_model_at_end


def test_a_diverged_loss_is_not_filtered_and_precision_is_left_to_autocast(make_config):
    made = arguments(make_config(), dtype=torch.bfloat16)
    assert made.logging_nan_inf_filter is False
    assert made.fp16 is False and made.bf16 is False


def test_without_evaluation_data_none_is_planned(make_config):
    assert arguments(make_config(), evaluate=False).eval_strategy == "no"


def test_the_best_evaluation_is_remembered_only_where_the_run_may_return_to_it(make_trainer):
    steps = {"training__eval_steps": 5, "training__save_steps": 5}
    assert make_trainer(training__early_stopping_patience=2, **steps).best.patience == 2
    assert make_trainer(training__keep_best=True, **steps).best.patience is None
    assert make_trainer().best is None


def test_only_the_listed_private_methods_of_the_library_are_overridden_or_used():
    """A renamed one would skip the override, or fail, in a version that requirements.txt allows."""
    own = vars(QLoraTrainer)
    assert {name for name in own if re.match("_[a-z]", name) and hasattr(Trainer, name)} == set(PRIVATE_OVERRIDES)
    used = set(re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(QLoraTrainer)))
    assert used <= own.keys()


def test_a_library_without_them_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(build, "PRIVATE_OVERRIDES", ("_get_output_dir", "_gone"))
    with pytest.raises(UserError, match=r"transformers: [\d.]+: has no Trainer._gone. Install transformers>=5.17,<6"):
        build.check_library()


# --- steps --------------------------------------------------------------------------------------------------------------


def test_accumulation_weights_every_token_alike(make_trainer):
    """Rows with 15, 3, 15 and 8 predicted tokens: a mean of the rows' means would be another loss and another gradient."""
    rows, spies, losses = random_rows(4, masked=(0, 13, 0, 8)), {}, {}
    rows.ids[1] = 300  # the same token throughout: easily predicted
    ids, labels = (torch.stack([rows[n][key] for n in range(4)]) for key in ("input_ids", "labels"))
    for micro in (1, 4):
        trainer = make_trainer(rows, performance__micro_batch=micro, training__max_grad_norm=0, training__max_steps=1)
        for name, parameter in trainer.adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(1e-3)  # non-zero, so that A gets a gradient
        with torch.no_grad():
            logits = trainer.adapted.eval()(ids).logits[:, :-1].float()
        spies[micro] = Spy(trainer)
        trainer.add_callback(spies[micro])
        trainer.train()
        losses[micro] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    by_hand = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    means = [F.cross_entropy(logits[n], labels[n, 1:], ignore_index=-100) for n in range(4)]
    assert abs(by_hand - sum(means) / 4) > 0.05  # else this test could not tell the two apart
    assert losses[1] == pytest.approx(losses[4], rel=1e-5)
    assert losses[1] == pytest.approx(by_hand.item(), rel=1e-5)
    torch.testing.assert_close(spies[1].gradients[0], spies[4].gradients[0], rtol=1e-3, atol=1e-6)
    assert (spies[1].gradients[0].abs() > 1e-6).float().mean() > 0.9


@pytest.mark.parametrize("fused", [True, False], ids=["fast path", "library's layers"])
def test_gradients_are_clipped_to_the_norm_and_their_norm_before_is_logged(make_trainer, fused):
    spies, norms = [], []
    for limit in (0, 1e-3):
        trainer = make_trainer(training__max_grad_norm=limit, training__max_steps=1, performance__fused_lora=fused)
        spies.append(Gradients(trainer))
        trainer.add_callback(spies[-1])
        trainer.train()
        norms.append(logged(trainer, "grad_norm")[1])
    assert norms[0] == norms[1] == pytest.approx(spies[0].norm.item(), rel=1e-5) and norms[0] > 0.01
    assert spies[1].norm.item() == pytest.approx(1e-3, rel=1e-3)


def out_of_memory_beyond(trainer, monkeypatch, rows, from_call):
    """From a call on, more than `rows` sequences at once do not fit: the GPU's own error, which a CPU cannot raise."""
    name = "token_losses" if trainer.micro is None else "accumulate"
    calls, target = 0, "qlora_kit.training.trainer" if trainer.micro is None else "qlora_kit.fast.training_pass.FastDecoder"
    real = token_losses if trainer.micro is None else FastDecoder.accumulate

    def limited(first, inputs, *rest):
        nonlocal calls
        calls += 1
        result = real(first, inputs, *rest)  # its gradients have been added by the time that memory runs out
        if calls >= from_call and len(inputs) > rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(f"{target}.{name}", limited)


@pytest.mark.parametrize("fused", [True, False], ids=["fast path", "library's layers"])
def test_out_of_memory_goes_on_from_the_same_step_with_smaller_micro_batches(make_trainer, monkeypatch, fused):
    """Four rows of unequal length in micro-batches of 2 x 2; at the second of step 2 memory is short, then 1 x 4."""
    settings = {
        "performance__micro_batch": 2, "performance__fused_lora": fused, "training__max_steps": 3, "training__max_grad_norm": 0,
    }  # fmt: skip
    rows = random_rows(8, masked=(0, 13, 0, 8, 3, 0, 9, 0))
    losses, adapters = [], []
    for short in (False, True):
        trainer = make_trainer(rows, **settings)
        if short:
            out_of_memory_beyond(trainer, monkeypatch, rows=1, from_call=4)
        trainer.train()
        assert trainer.rows == (1 if short else 2) and trainer.state.global_step == 3
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        adapters.append(torch.cat([p.data.flatten() for p in trainer.adapted.parameters() if p.requires_grad]))
    # Step 2's first micro-batch had been counted when memory ran out: its loss is logged once, its gradient taken once.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(*adapters, rtol=1e-3, atol=2e-5)
    told = (make_trainer.folder / "training_log.txt").read_text()
    assert told.count("Out of GPU memory in step 2: starting it again with 1 sequence at") == 1


def test_out_of_memory_with_one_sequence_is_not_hidden(make_trainer, monkeypatch):
    trainer = make_trainer(performance__micro_batch=4)
    out_of_memory_beyond(trainer, monkeypatch, rows=0, from_call=1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trainer.train()
    assert trainer.rows == 1


def test_out_of_memory_in_an_evaluation_measures_again_with_less(make_trainer, monkeypatch):
    trainer = make_trainer(performance__micro_batch=4)
    trainer.eval_dataset = random_rows(6)
    expected = trainer.measure()
    real = FastDecoder.losses

    def limited(self, inputs, *rest):
        if len(inputs) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, inputs, *rest)

    monkeypatch.setattr(FastDecoder, "losses", limited)
    assert trainer.measure().loss == pytest.approx(expected.loss, rel=1e-6) and trainer.rows == 2
    told = (make_trainer.folder / "training_log.txt").read_text()
    assert "Out of GPU memory in an evaluation: starting it again with 2 sequences" in told


def flat(trainer):
    return torch.cat([p.data.flatten() for p in trainer.adapted.parameters() if p.requires_grad])


@pytest.mark.parametrize("blocks", [3, 7], ids=["fewer than a step takes", "a short last micro-batch"])
def test_a_short_step_is_what_it_is_through_the_librarys_layers(make_trainer, blocks):
    results = {}
    for fused in (True, False):
        trainer = make_trainer(
            random_rows(blocks),
            training__batch_size=4,
            performance__micro_batch=2,
            training__max_steps=3,
            performance__fused_lora=fused,
        )
        trainer.train()
        assert (trainer.micro is not None) == fused
        results[fused] = ([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], flat(trainer))
    assert results[True][0] == pytest.approx(results[False][0], rel=1e-4)
    assert (results[True][1] - results[False][1]).abs().mean() < 1e-4  # 8-bit Adam takes steps of the size of its rate, 2e-3


def test_early_stopping_ends_with_the_best_evaluated_adapter(make_trainer):
    """At this rate the held-out loss soon rises: training stops, and the weights are those of the checkpoint before."""
    trainer = make_trainer(
        evaluation=random_rows(4), training__early_stopping_patience=2, training__eval_steps=1, training__save_steps=1,
        training__save_total_limit=None, training__max_steps=30, training__learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.kept_step == min(losses, key=losses.get) < trainer.state.global_step == trainer.kept_step + 2 < 30
    assert trainer.ending()["ended"] == "early, as training.early_stopping_patience asks"
    saved = load_file(make_trainer.folder / "checkpoints" / f"checkpoint-{trainer.kept_step}" / "adapter_model.safetensors")
    kept = get_peft_model_state_dict(trainer.adapted)
    assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in saved)
    assert trainer.measure().loss == pytest.approx(min(losses.values()), rel=1e-6)


def test_the_best_evaluated_adapter_can_be_kept_without_stopping_early(make_trainer):
    """No checkpoint was due at the best step."""
    trainer = make_trainer(
        evaluation=random_rows(4), training__keep_best=True, training__eval_steps=1, training__save_steps=3,
        training__max_steps=3, training__learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = min(losses, key=losses.get)
    assert (trainer.kept_step, trainer.state.global_step) == (best, 3) and best < 3
    assert trainer.ending() == {"ended": "after the last step", "skipped_steps": [], "micro_batch": 1}
    assert trainer.measure_final().loss == pytest.approx(losses[best], rel=1e-6)
    save_adapter(trainer.adapted, make_trainer.tokenizer, make_trainer.folder)
    saved, kept = (load_file(folder / "adapter_model.safetensors") for folder in (
        make_trainer.folder, make_trainer.folder / "checkpoints" / f"checkpoint-{best}"))  # fmt: skip
    assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in saved)


@pytest.mark.parametrize("max_grad_norm", [0.3, 0])
def test_a_scaled_loss_as_in_float16_gives_the_same_adapter(make_trainer, monkeypatch, max_grad_norm):
    """accelerate's own unscaling, on the CPU: 1,024 is a power of two, so that not a bit may change."""
    adapters = []
    for scaled in (False, True):
        trainer = make_trainer(training__max_grad_norm=max_grad_norm, training__max_steps=3)
        if scaled:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            trainer.accelerator.native_amp = True
            monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", property(lambda self: "fp16"))
        trainer.train()
        losses = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        adapters.append((losses, flat(trainer)))
    assert adapters[0][0] == adapters[1][0] and torch.equal(adapters[0][1], adapters[1][1])


@pytest.fixture
def two_threads():
    """Sums are split between them, as in a user's run."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_seed_decides_every_byte_of_the_adapter(make_trainer, tmp_path, two_threads):
    files = {}
    for run, seed in (("first", 1), ("again", 1), ("other", 2)):
        trainer = make_trainer(training__seed=seed, lora__dropout=0.1, training__output_dir=str(tmp_path / run))
        trainer.train()
        save_adapter(trainer.adapted, make_trainer.tokenizer, make_trainer.folder)
        files[run] = (make_trainer.folder / "adapter_model.safetensors").read_bytes()
    assert files["first"] == files["again"]
    assert files["first"] != files["other"]


def test_the_seed_decides_where_a_starts(make_trainer):
    starts = []
    for seed in (1, 1, 2):
        adapted = make_trainer(training__seed=seed).adapted
        starts.append(torch.cat([value.flatten() for name, value in adapted.named_parameters() if "lora_A" in name]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_the_base_model_is_not_changed_by_training(make_trainer):
    trainer = make_trainer()
    frozen = {name: value.clone() for name, value in trainer.adapted.named_parameters() if not value.requires_grad}
    trained = {name: value.clone() for name, value in trainer.adapted.named_parameters() if value.requires_grad}
    trainer.train()
    after = dict(trainer.adapted.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(after[name], value) for name, value in trained.items())


def test_a_checkpoint_is_the_adapter_alone_with_what_resuming_needs(make_trainer):
    trainer = make_trainer()
    trainer.train()
    files = {path.name: path.stat().st_size for path in (make_trainer.folder / "checkpoints" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "rng_state.pth", "trainer_state.json"} <= set(
        files
    )
    assert "training_args.bin" not in files  # a pickle
    trained = sum(parameter.numel() for parameter in trainer.adapted.parameters() if parameter.requires_grad)
    assert files["adapter_model.safetensors"] < 4 * trained + 20_000  # fp32 and a header, no base weights


def test_evaluation_measures_perplexity_and_leaves_training_mode_on(make_trainer):
    trainer = make_trainer()
    trainer.eval_dataset = random_rows(3)
    ids = torch.from_numpy(trainer.eval_dataset.ids.astype("int64"))
    trainer.adapted.train()
    result = trainer.measure()
    assert trainer.adapted.training
    with torch.no_grad():
        logits = trainer.adapted.eval()(ids).logits[:, :-1].float()
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert result.loss == pytest.approx(expected, rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-3)
    assert (result.tokens, result.blocks) == (3 * (T - 1), 3)


# --- callbacks ----------------------------------------------------------------------------------------------------------


def no_number(trainer, monkeypatch, steps, where="loss"):
    """In these steps, of four micro-batches each, the second one's loss or gradient is NaN."""
    name = "token_losses" if trainer.micro is None else "accumulate"
    target = "qlora_kit.training.trainer" if trainer.micro is None else "qlora_kit.fast.training_pass.FastDecoder"
    real, calls = (token_losses if trainer.micro is None else FastDecoder.accumulate), 0

    def poisoned(first, *rest):
        nonlocal calls
        step, number = calls // 4 + 1, calls % 4
        calls += 1
        result = real(first, *rest)
        if step not in steps or number != 1:
            return result
        if where == "loss":
            return result * math.nan
        first.adapters.gradient[7] = math.nan
        return result

    monkeypatch.setattr(f"{target}.{name}", poisoned)


def logged(trainer, key="loss"):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


@pytest.mark.parametrize("fused, where", [(True, "loss"), (False, "loss"), (True, "gradient")])
def test_what_is_no_number_ends_the_run_before_the_optimizer_sees_it(make_trainer, monkeypatch, fused, where):
    settings = {"performance__fused_lora": fused, "training__logging_steps": 10, "training__save_steps": 1}
    trainer = make_trainer(training__max_steps=4, **settings)
    no_number(trainer, monkeypatch, [2], where)
    with pytest.raises(Failed) as failure:
        trainer.train()
    line = str(failure.value)
    shuffled = torch.utils.data.RandomSampler(range(8), generator=torch.Generator().manual_seed(42))
    blocks = ", ".join(str(number + 1) for number in list(shuffled)[4:])
    assert f"nan at step 2 (blocks {blocks}, 60 trained tokens, computed in float32)" in line  # 4 x 15 are predicted
    assert "--learning_rate (now 0.002)" in line and "checkpoint-1 is complete" in line
    assert trainer.state.global_step == 1
    saved = load_file(make_trainer.folder / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors")
    kept = get_peft_model_state_dict(trainer.adapted)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)


class Undone(TrainerCallback):
    """Takes one optimizer step back: adapter and optimizer as they were before it."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **rest):
        if state.global_step + 1 == self.step:
            self.before = [(p, p.data.clone()) for p in self.trainer.adapted.parameters() if p.requires_grad]
            self.state = copy.deepcopy(self.trainer.optimizer.state_dict()["state"])

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == self.step:
            for parameter, value in self.before:
                parameter.data.copy_(value)
            self.trainer.optimizer.load_state_dict(self.trainer.optimizer.state_dict() | {"state": self.state})


@pytest.mark.parametrize("fused", [True, False], ids=["fast path", "library's layers"])
def test_a_step_that_is_left_out_leaves_adapter_and_optimizer_as_they_were(make_trainer, monkeypatch, fused):
    settings = {"training__max_steps": 4, "training__lr_scheduler": "linear", "performance__fused_lora": fused}
    reference = make_trainer(random_rows(16), **settings)
    reference.add_callback(Undone(reference, 2))
    reference.train()
    trainer = make_trainer(random_rows(16), training__max_skipped_steps=1, **settings)
    no_number(trainer, monkeypatch, [2])
    trainer.train()
    assert trainer.guard.skipped == [2] and trainer.state.global_step == 4
    assert torch.equal(flat(trainer), flat(reference))
    expected = logged(reference)
    del expected[2]
    assert logged(trainer) == expected
    assert logged(trainer, "learning_rate") == {
        step: rate for step, rate in logged(reference, "learning_rate").items() if step != 2
    }
    assert "NaN" not in (make_trainer.folder / "metrics.jsonl").read_text()
    assert (make_trainer.folder / "training_log.txt").read_text().count("at step 2 (blocks ") == 1


def test_a_step_that_is_left_out_counts_in_no_mean(make_trainer, monkeypatch):
    each, pairs = (make_trainer(random_rows(16), training__max_steps=4, training__max_skipped_steps=2,
                                training__logging_steps=steps) for steps in (1, 2))  # fmt: skip
    for trainer in (each, pairs):
        with monkeypatch.context() as patch:
            no_number(trainer, patch, [1, 4])
            trainer.train()
    assert list(logged(each)) == [2, 3]
    assert logged(pairs) == {2: logged(each)[2], 4: logged(each)[3]}
    assert 4 not in logged(pairs, "grad_norm")  # step 4 had none


def test_more_steps_than_may_be_left_out_end_the_run(make_trainer, monkeypatch):
    trainer = make_trainer(random_rows(16), training__max_steps=4, training__max_skipped_steps=1)
    no_number(trainer, monkeypatch, [2, 3])
    with pytest.raises(Failed, match="nan at step 3"):
        trainer.train()
    assert trainer.guard.skipped == [2]


def test_the_guard_looks_once_a_step_and_not_at_each_micro_batch(make_trainer, monkeypatch):
    trainer, looks = make_trainer(), []
    passes = trainer.guard.passes
    monkeypatch.setattr(trainer.guard, "passes", lambda step, *rest: (looks.append(step), passes(step, *rest))[1])
    trainer.train()
    assert looks == [1, 2]


@pytest.mark.parametrize("fused", [True, False], ids=["fast path", "library's layers"])
def test_a_projection_that_learns_nothing_is_named(make_trainer, monkeypatch, fused):
    trainer = make_trainer(training__max_steps=4, performance__fused_lora=fused)
    dead = next(p for name, p in trainer.adapted.named_parameters() if "layers.1.mlp.up_proj.lora_B" in name)
    if fused:
        real, adapters = FastDecoder.accumulate, trainer.micro.decoder.adapters

        def without(*arguments):
            result = real(*arguments)
            adapters.gradient_of(dead).zero_()
            return result

        monkeypatch.setattr(FastDecoder, "accumulate", without)
    else:
        dead.register_hook(torch.zeros_like)
    trainer.train()
    told = [line for line in (make_trainer.folder / "training_log.txt").read_text().splitlines() if "exactly zero" in line]
    assert len(told) == 1 and "of model.layers.1.mlp.up_proj is exactly zero at step 3" in told[0]


def test_an_adapter_that_is_no_number_is_not_put_into_a_checkpoint(make_trainer):
    """Finite gradients may still make it so, by too high a rate; what stood before is the last good one."""
    trainer = make_trainer(training__save_steps=1)

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **rest):
            if state.global_step == 1:  # within step 2
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = math.inf

    trainer.add_callback(Overflow())
    with pytest.raises(Failed, match=r"NaN or infinity.*; checkpoint-1 is complete"):
        trainer.train()
    assert [path.name for path in (make_trainer.folder / "checkpoints").iterdir()] == ["checkpoint-1"]


def test_an_evaluation_that_is_no_number_ends_the_run(make_trainer):
    trainer = make_trainer(evaluation=random_rows(2))
    next(p for name, p in trainer.adapted.named_parameters() if "lora_B" in name).data.fill_(math.nan)
    with pytest.raises(Failed, match=r"the evaluation loss is nan after step 0: .*--learning_rate"):
        trainer.measure_base()


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def signals_restored():
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, name", [(signal.SIGINT, "Ctrl+C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")])
def test_a_signal_is_answered_at_once_and_finishes_the_step_saves_it_and_stops(make_trainer, signals_restored, number, name):
    """A thread answers, so that it need not wait for the end of the step."""
    said, answered, threads = [], threading.Event(), threading.active_count()

    def stop(model):
        os.kill(os.getpid(), number)
        assert answered.wait(10)

    trainer = make_trainer(training__max_steps=5, training__save_steps=1)
    trainer.stopping.say = lambda line: (said.append(line), answered.set())
    trainer.add_callback(At(2, stop))
    trainer.train()
    assert said == [f"Stopping after step 2 and saving. {name} again stops now and loses the steps since checkpoint 1."]
    assert trainer.state.global_step == 2 and trainer.stopping.signal == number
    assert {path.name for path in (make_trainer.folder / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert {name: signal.getsignal(name) for name in signals_restored} == signals_restored
    assert signal.set_wakeup_fd(-1) == -1 and threading.active_count() == threads


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(make_trainer, signals_restored):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    trainer = make_trainer()
    trainer.add_callback(At(1, lambda model: os.kill(os.getpid(), signal.SIGHUP)))
    trainer.train()
    assert trainer.stopping.signal is None and trainer.state.global_step == 2


def test_a_signal_in_the_last_step_still_leaves_a_checkpoint(make_trainer, signals_restored):
    trainer = make_trainer()
    trainer.add_callback(At(2, lambda model: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert (make_trainer.folder / "checkpoints" / "checkpoint-2" / "optimizer.pt").is_file()


def test_a_second_signal_stops_at_once(make_trainer, signals_restored):
    trainer = make_trainer()

    def twice(model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.add_callback(At(1, twice))
    lost = r"^Stopped at once; everything since the start is lost\.$"
    with pytest.raises(Stopped, match=lost) as stopped, explaining_interrupt(make_trainer.folder):
        trainer.train()
    assert trainer.state.global_step == 0 and stopped.value.status == 130 and not stopped.value.can_resume


def test_an_interrupt_says_which_checkpoint_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), explaining_interrupt(tmp_path):
        raise KeyboardInterrupt  # nothing was written: nothing is lost
    with staged_checkpoint(tmp_path / "checkpoints", 7, {}, needed=0) as folder:
        (folder / "file").touch()
    with pytest.raises(Stopped, match=r"what came after checkpoint 7 is lost") as stopped, explaining_interrupt(tmp_path):
        raise KeyboardInterrupt(143)
    assert stopped.value.status == 143 and stopped.value.can_resume


def test_a_stop_callback_without_a_signal_stops_nothing():
    class Control:
        should_save = should_training_stop = False

    control = Control()
    StopCallback().on_step_end(None, None, control)
    assert not control.should_save and not control.should_training_stop


# --- speed --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_speed_counts_steps_since_the_last_reading(clock):
    meter = SpeedMeter()
    for _ in range(4):
        clock.now += 0.5
        meter.step_done()
    assert meter.steps_per_second() == pytest.approx(2.0)
    clock.now += 0.25
    meter.step_done()
    assert meter.steps_per_second() == pytest.approx(4.0)


def test_speed_leaves_out_evaluations_and_saves(clock):
    meter = SpeedMeter()
    clock.now += 1
    meter.step_done()
    clock.now += 30  # an evaluation and, right after it, a save
    meter.pause()
    clock.now += 5
    meter.pause()
    meter.resume()
    clock.now += 1
    meter.step_done()
    assert meter.steps_per_second() == pytest.approx(1.0)  # 2 steps in 2 s, not in 37 s


def test_speed_leaves_out_an_evaluation_before_any_step_of_a_new_reading(clock):
    meter = SpeedMeter()
    clock.now += 1
    meter.step_done()
    meter.steps_per_second()
    clock.now += 50
    meter.pause()
    meter.resume()
    clock.now += 2
    meter.step_done()
    assert meter.steps_per_second() == pytest.approx(0.5)


def test_remaining_time_is_read_off_the_last_speed(clock):
    meter = SpeedMeter()
    clock.now += 8
    meter.step_done()
    meter.step_done()
    meter.steps_per_second()  # 4 s a step
    assert meter.remaining(1000) == "1:06:40"
    assert meter.remaining(1) == "0:00:04"


# --- the base model's perplexity in an interrupted run ------------------------------------------------------------------


def test_the_base_models_perplexity_survives_metrics_jsonl():
    base, later = Perplexity(2.5, 12.18, 0.4, 510, 2), Perplexity(2.0, 7.39, 0.2, 510, 2)
    lines = [
        json.dumps({"step": 0, "epoch": 0.0, **as_metrics(base)}),
        json.dumps({"step": 1, "epoch": 0.1, "loss": 2.4}),
        json.dumps({"step": 5, "epoch": 0.5, **as_metrics(later)}),
    ]
    assert recorded_base([json.loads(line) for line in lines]) == base


def test_a_run_without_evaluation_recorded_no_base_perplexity():
    assert recorded_base([{"step": 1, "epoch": 0.1, "loss": 2.4}]) is None
    assert recorded_base([]) is None


def test_every_logged_step_reaches_metrics_jsonl_once(make_trainer):
    trainer = make_trainer(training__max_steps=3)
    trainer.train()
    metrics = read_metrics(make_trainer.folder)
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    for entry in metrics:
        assert set(entry) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib"}
        assert entry["learning_rate"] == 2e-3 and entry["tokens_per_second"] > 0
