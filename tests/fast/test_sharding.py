"""A base model divided over processes (performance.fsdp): what each holds and finds, in two processes of a real group."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.config import GIB, Config, ModelSettings, PerformanceSettings
from qlora_kit.errors import UserError
from qlora_kit.planning.fit import cheapest_change
from qlora_kit.planning.memory import estimate_memory
from qlora_kit.planning.plan import check_division, make_plan
from qlora_kit.planning.shape import KNOWN_CONFIGS, read_shape
from qlora_kit.training.machine import read_fast_shape
from qlora_kit.training.processes import check_launcher

PROCESSES = 2
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}")
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from qlora_kit.training.processes import connect, read_team
together = connect(read_team())
together.__enter__()
import torch  # and the libraries when all are connected, as train_qlora.py does
import torch.distributed as dist
from transformers import Trainer
from qlora_kit.fast import sharding
from quantization_utils import create_bnb_config, load_model_and_tokenizer
sharding.HEAD_ROWS = 1001  # of 6,144: seven runs, the last one short, and none that two processes divide evenly
options = dict(device="cpu", dtype=torch.float32)
packing = create_bnb_config(compute_dtype=torch.float32)
whole, _ = load_model_and_tokenizer({model!r}, packing, **options)
model = sharding.load_sharded(Path({model!r}), packing, "cpu", torch.float32, offload=False, embedding=True)
base, found = sharding.sharded_base(model), {{}}
projections = [module for module in whole.model.layers[1].modules() if hasattr(module, "in_features")]
others = [module for module in model.model.layers[1].modules() if hasattr(module, "in_features")]
empty = [module.weight.numel() + module.weight.quant_state.absmax.numel() for module in others]
with base.whole(1, then=2):
    found["same"] = all(torch.equal(a.weight, b.weight) and torch.equal(a.weight.quant_state.absmax, b.weight.quant_state.absmax)
                        for a, b in zip(projections, others, strict=True))
    found["next begun"] = base.runs[2].work is not None and base.runs[3].work is None
found["empty"] = sum(empty) + sum(module.weight.numel() for module in others)
places = set(run.whole.data_ptr() for run in [*base.runs, *base.head.runs])
found["two places"] = len(places) == 2 and base.runs[1].whole.data_ptr() != base.runs[2].whole.data_ptr()
packed = sum(module.weight.nbytes + module.weight.quant_state.absmax.nbytes for module in projections)
found["share"] = base.layers[1].run.part.nbytes / packed
found["rest"] = [name for name, value in model.named_parameters() if value.is_meta]
found["biases"] = all(torch.equal(a.bias, b.bias) for a, b in zip(projections, others, strict=True) if a.bias is not None)
steps, last = [], len(base.runs) - 1
def step(action):  # as a captured pass steps out, and later does the same again
    action()
    steps.append((action, action.args[0][action.args[1]]))
with base.gathering(step):
    for number in range(last + 1):
        with base.whole(number, number + 1):
            pass
    list(base.head)
    for number in reversed(range(last + 1)):
        with base.whole(number, number - 1):
            pass
first = [(action(), run.whole.clone())[1] for action, run in steps]
again = [(action(), run.whole.clone())[1] for action, run in steps]
found["steps"] = len(steps) == 2 * (last + 1) + len(base.head.runs)
found["replayed"] = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
found["there and back"] = all(torch.equal(first[number], first[-1 - number]) for number in range(last + 1))
found["none under way"] = all(run.work is None for run in [*base.runs, *base.head.runs])
matrix = whole.get_input_embeddings().weight
found["head"] = torch.equal(torch.cat([rows.clone() for rows in base.head]), matrix) and len(base.head) == len(matrix)
ids = torch.randint(len(matrix), (2, 50), generator=torch.Generator().manual_seed(dist.get_rank()))
found["lookup"] = torch.equal(base.embedding.lookup(ids), matrix[ids])
found["tied"] = base.embedding is base.head
found["parameters"] = base.parameters
packed = [module for module in whole.get_decoder().modules() if hasattr(module, "in_features")]
found["expected"] = sum(module.in_features * module.out_features for module in packed) + matrix.numel()
rank = dist.get_rank()
def threads():
    return {{path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}} & {{"pt_gloo_runloop"}}
before = threads()
together.__exit__(None, None, None)
found["threads"] = [len(before), len(threads())]
Path({output!r}, str(rank)).write_text(json.dumps(found))
"""


def test_each_process_keeps_its_part_and_finds_the_whole(root, tmp_path, tiny_dir):
    script = tmp_path / "script.py"
    output = tmp_path / "found"
    output.mkdir()
    script.write_text(SCRIPT.format(root=str(root), model=str(tiny_dir), output=str(output)))
    run = subprocess.run([*LAUNCH, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(PROCESSES):
        found = json.loads((output / str(rank)).read_text())
        assert found.pop("share") == pytest.approx(1 / PROCESSES, rel=0.02)
        assert found.pop("parameters") == found.pop("expected")
        assert (found.pop("empty"), found.pop("rest")) == (0, [])
        # One that frees a tensor while Python exits takes the process with it: an abort after all is saved, in 2 of 25 runs.
        assert found.pop("threads") == [int(Path("/proc/self/task").is_dir()), 0]
        assert all(found.values()), (rank, found)


QWEN_32B = KNOWN_CONFIGS["Qwen/Qwen2.5-32B-Instruct"]


def settings(**performance):
    return Config(performance=PerformanceSettings(**performance))


def test_the_frozen_part_is_predicted_divided_and_nothing_else():
    shape = read_shape(QWEN_32B)
    whole = estimate_memory(shape, settings(), 1, 64)
    divided = estimate_memory(shape, settings(fsdp=True), 1, 64, processes=4)
    hosted = estimate_memory(shape, settings(fsdp="offload"), 1, 64, processes=4)
    assert divided["projection weights"] == whole["projection weights"] / 4 and hosted["projection weights"] == 0
    norms_and_biases = 2 * ((2 * 64 + 1) * 5120 + 64 * (40 + 2 * 8) * 128)
    head_and_embedding = 2 * 2 * 152064 * 5120
    assert whole["embedding and norms"] == norms_and_biases + head_and_embedding
    assert divided["embedding and norms"] == norms_and_biases + head_and_embedding / 4
    assert divided["gathered weights"] == 2 * whole["projection weights"] / 64
    same = ("adapters (fp32)", "gradients (fp32)", "kept activations", "largest layer's workspace")
    assert all(divided[name] == whole[name] for name in same)


def test_dividing_is_offered_where_several_processes_cannot_hold_the_whole():
    shape = read_shape(QWEN_32B)
    for processes, expected in ((1, None), (2, True)):
        change = cheapest_change(settings(), shape, 16 * GIB, processes)
        assert (change or {}).get("performance.fsdp") is expected
    plan = make_plan(settings(fsdp=True), shape, 80 * GIB, 2)
    assert not plan.keep_weights and plan.peak < make_plan(settings(), shape, 80 * GIB, 2).peak


@pytest.mark.parametrize(
    ("model", "performance", "reason"),
    [
        ({"model_type": "gpt2"}, {}, "gpt2 is not built like Llama"),
        (QWEN_32B, {"fused_lora": False}, "performance.fused_lora is false"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_read(tmp_path, model, performance, reason):
    (tmp_path / "config.json").write_text(json.dumps(model))
    config = Config(model=ModelSettings(name=str(tmp_path)), performance=PerformanceSettings(fsdp=True, **performance))
    with pytest.raises(UserError, match=re.escape(f"performance.fsdp: cannot work here ({reason}); use false")):
        read_fast_shape(config)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_other_ways_to_divide_are_named(monkeypatch, variable):
    check_launcher()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"{variable}: true: .*performance.fsdp=true"):
        check_launcher()


@pytest.mark.parametrize("fsdp", [True, "offload"])
def test_one_process_alone_divides_nothing(fsdp):
    check_division(settings(fsdp=fsdp), 2)
    with pytest.raises(UserError, match=f"performance.fsdp: {str(fsdp).lower()}: needs several processes"):
        check_division(settings(fsdp=fsdp), 1)
