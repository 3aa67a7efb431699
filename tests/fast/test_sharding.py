"""A base model sharded over two real processes: what each stores, and what it gathers."""

import json

import pytest

from tests import forked

PROCESSES = 2
SCRIPT = """
import json
from pathlib import Path
import torch
import torch.distributed as dist
from qlora_kit.training.processes import connect, read_team
connection = connect(read_team())
connection.__enter__()
from qlora_kit.fast import sharding
from quantization_utils import create_bnb_config, load_model_and_tokenizer
sharding.HEAD_ROWS = 1001  # of 6,144: seven chunks, the last one short, and none that two processes divide evenly
quantization = create_bnb_config(compute_dtype=torch.float32)
whole, _ = load_model_and_tokenizer({model!r}, quantization, device="cpu", dtype=torch.float32)
model = sharding.load_sharded(Path({model!r}), quantization, "cpu", torch.float32, offload=False, embedding=True)
base, found = sharding.sharded_base(model), {{}}
expected = [module for module in whole.model.layers[1].modules() if hasattr(module, "in_features")]
actual = [module for module in model.model.layers[1].modules() if hasattr(module, "in_features")]
before = [module.weight.numel() + module.weight.quant_state.absmax.numel() for module in actual]
with base.gathered(1, then=2):
    found["equal"] = all(torch.equal(a.weight, b.weight) and torch.equal(a.weight.quant_state.absmax, b.weight.quant_state.absmax)
                         for a, b in zip(expected, actual, strict=True))
    found["next one started"] = base.layer_bytes[2].work is not None and base.layer_bytes[3].work is None
found["not empty"] = sum(before) + sum(module.weight.numel() for module in actual)
tensors = [*base.layer_bytes, *base.head.chunks]
addresses = [tensor.gathered.data_ptr() for tensor in tensors]
found["two buffers"] = len(set(addresses)) == 2 and addresses[1] != addresses[2]
packed = sum(module.weight.nbytes + module.weight.quant_state.absmax.nbytes for module in expected)
found["stored share"] = base.layers[1].bytes.shard.nbytes / packed
found["on meta"] = [name for name, value in model.named_parameters() if value.is_meta]
found["biases"] = all(torch.equal(a.bias, b.bias) for a, b in zip(expected, actual, strict=True) if a.bias is not None)
gathers, last = [], len(base.layer_bytes) - 1
def handle(action):  # as a captured pass does: run it now, and again at every replay
    action()
    tensors, number, then = action.args
    gathers.append((action, tensors[number]))
with base.intercept_gathers(handle):
    for number in range(last + 1):
        with base.gathered(number, number + 1):
            pass
    list(base.head)
    for number in reversed(range(last + 1)):
        with base.gathered(number, number - 1):
            pass
first = [(action(), tensor.gathered.clone())[1] for action, tensor in gathers]
second = [(action(), tensor.gathered.clone())[1] for action, tensor in gathers]
found["all intercepted"] = len(gathers) == 2 * (last + 1) + len(base.head.chunks)
found["replays are equal"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
found["both directions are equal"] = all(torch.equal(first[number], first[-1 - number]) for number in range(last + 1))
found["none left unfinished"] = all(tensor.work is None for tensor in tensors)
matrix = whole.get_input_embeddings().weight
found["head"] = torch.equal(torch.cat([rows.clone() for rows in base.head]), matrix) and len(base.head) == len(matrix)
ids = torch.randint(len(matrix), (2, 50), generator=torch.Generator().manual_seed(dist.get_rank()))
found["lookup"] = torch.equal(base.embedding.lookup(ids), matrix[ids])
found["tied"] = base.embedding is base.head
projections = [module for module in whole.get_decoder().modules() if hasattr(module, "in_features")]
found["parameters"] = base.parameters
found["expected parameters"] = sum(module.in_features * module.out_features for module in projections) + matrix.numel()
rank = dist.get_rank()
connection.__exit__(None, None, None)
Path({output!r}, str(rank)).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_each_process_stores_its_shard_and_gathers_the_whole(tmp_path, tiny_dir):
    run = forked.run_ranks(["-c", SCRIPT.format(model=str(tiny_dir), output=str(tmp_path))], PROCESSES)
    assert run.returncode == 0, run.stderr[-3000:]
    for rank in range(PROCESSES):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found.pop("stored share") == pytest.approx(1 / PROCESSES, rel=0.02)
        assert found.pop("parameters") == found.pop("expected parameters")
        assert (found.pop("not empty"), found.pop("on meta")) == (0, [])
        assert all(found.values()), (rank, found)
