"""Micro-steps compiled and captured against the same ones run kernel by kernel; without a GPU, their fallbacks."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional as bnb

from qlora_kit.errors import Failed, UserError
from qlora_kit.fast import nf4
from qlora_kit.fast.micro_step import MicroStep, StepSettings, why_not_compiled, why_not_graphed, why_not_used
from qlora_kit.fast.training_pass import FastDecoder, offload_embedding
from qlora_kit.training.build import fail_without_fallback
from tests.fast.models import adapt, load_base

SETTINGS = StepSettings(2, 20, seed=1, captured=False)


def test_a_technique_that_cannot_work_is_refused_only_if_it_is_required():
    assert "GPU" in why_not_graphed("cpu") and "GPU" in why_not_compiled("cpu")
    assert why_not_used("performance.compile", "auto", "needs a CUDA GPU") == "needs a CUDA GPU"
    assert why_not_used("performance.compile", "auto", None) is why_not_used("performance.compile", True, None) is None
    assert why_not_used("performance.compile", False, None) == "performance.compile is false"
    with pytest.raises(
        UserError, match=r"performance\.cuda_graphs: true: cannot work here \(needs a CUDA GPU\)\. Use auto or false\."
    ):
        why_not_used("performance.cuda_graphs", True, "needs a CUDA GPU")


@pytest.mark.parametrize(
    "missing, expected", [("compiler", "C compiler"), ("headers", "Python.h"), ("triton", "Triton"), (None, None)]
)
def test_what_triton_needs_and_does_not_find_is_the_reason(monkeypatch, tmp_path, missing, expected):
    monkeypatch.setattr(nf4, "triton", None if missing == "triton" else object())
    monkeypatch.setattr(nf4, "_launch_unpack", lambda *rest: None)  # the trial kernel
    monkeypatch.setattr(nf4.bnb, "quantize_4bit", lambda *rest, **more: (SimpleNamespace(), None))
    monkeypatch.setattr(torch, "ones", lambda *rest, **more: None)
    monkeypatch.setattr(torch, "empty", lambda *rest, **more: None)
    monkeypatch.setattr("shutil.which", lambda name: None if missing == "compiler" else f"/usr/bin/{name}")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / ("nothing" if missing == "headers" else "")))
    nf4.why_no_triton.cache_clear()
    reason = why_not_compiled("cuda")
    nf4.why_no_triton.cache_clear()
    assert reason is None if expected is None else expected in reason


@pytest.fixture
def decoder(tiny_dir):
    def make(compiled):
        return FastDecoder(adapt(load_base(tiny_dir), dropout=0.3), 3, compiled)

    return make


def test_if_compiling_fails_the_plain_functions_compute_the_same(decoder, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel\nfor this GPU")

    monkeypatch.setattr("qlora_kit.fast.training_pass.compile_once", lambda function: broken)
    ids, loss_scale, reasons, results = torch.arange(40).view(2, 20), torch.tensor(0.1), [], []
    for compiled in (False, True):
        micro = MicroStep(decoder(compiled), SETTINGS, reasons.append)
        micro.begin_step(0)
        losses = [micro.train(ids, ids, loss_scale).item() for _ in range(2)]
        results.append((losses, micro.decoder.adapters.gradient.clone(), micro.losses(ids, ids)))
    assert reasons == ["no kernel for this GPU"]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    required = MicroStep(decoder(True), SETTINGS)
    with pytest.raises(RuntimeError, match="no kernel"):
        required.losses(ids, ids)
    sharded = MicroStep(decoder(True), SETTINGS, fail_without_fallback)
    with pytest.raises(Failed, match=r"no kernel .*performance\.compile=false"):
        sharded.losses(ids, ids)


def test_out_of_memory_does_not_end_compiling(decoder, monkeypatch):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qlora_kit.fast.training_pass.compile_once", lambda function: full)
    reasons, ids = [], torch.arange(40).view(2, 20)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        MicroStep(decoder(True), SETTINGS, reasons.append).losses(ids, ids)
    assert not reasons


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class TestOnTheGpu:
    pytestmark = needs_gpu

    @pytest.fixture
    def decoder(self, tiny_dir):
        def make(recomputed=3, compiled=False, offloaded=False):
            model = load_base(tiny_dir, torch.bfloat16, device="cuda")
            if offloaded:
                offload_embedding(model)
            return FastDecoder(adapt(model, dropout=0.3, std=0.02), recomputed, compiled)

        return make

    def one_step(self, decoder, captured, packed=False):
        """Loss and gradient of an optimizer step of three micro-batches, and the losses of an evaluation."""
        ids = torch.randint(6000, (3, 4, 64), generator=torch.Generator().manual_seed(0)).pin_memory()
        starts = torch.arange(64).expand(4, 64) // 24 * 24 if packed else None  # records of 24, 24 and 16 tokens
        micro = MicroStep(decoder, StepSettings(4, 64, seed=1, captured=captured, most_records=3 * packed))
        before = micro.losses(ids[0], ids[0], starts).clone()
        micro.begin_step(7)
        loss_scale = torch.tensor(1.0 / ids[:, :, 1:].numel(), device="cuda")
        loss = sum(micro.train(batch, batch, loss_scale, starts).clone() for batch in ids)
        gradient = decoder.adapters.gradient.clone()
        after = micro.losses(ids[0], ids[0], starts)  # of the same weights, from the memory pool that training used in between
        torch.testing.assert_close(after, before)
        return loss.item(), gradient, before

    @pytest.mark.parametrize(
        "compiled, captured, offloaded, packed",
        [(False, True, False, False), (True, False, False, False), (True, True, False, False), (True, True, True, False),
         (True, True, False, True)],
        ids=["captured", "compiled", "both", "both, embedding offloaded", "both, packed blocks"],
    )  # fmt: skip
    def test_a_compiled_or_captured_step_computes_what_the_plain_functions_compute(
        self, decoder, compiled, captured, offloaded, packed
    ):
        expected = self.one_step(decoder(), captured=False, packed=packed)
        actual = self.one_step(decoder(compiled=compiled, offloaded=offloaded), captured, packed)
        assert actual[0] == pytest.approx(expected[0], rel=1e-3)
        # bf16 through six layers, rounded less often in fused steps: the library on the CPU differs as much.
        assert (actual[1] - expected[1]).norm() < 0.08 * expected[1].norm()
        assert (actual[2] - expected[2]).abs().mean() < 0.1

    @pytest.mark.parametrize("recomputed", [0, 6])
    def test_replays_draw_the_same_dropout_with_any_number_of_recomputed_layers(self, decoder, recomputed):
        expected, actual = self.one_step(decoder(3, True), True), self.one_step(decoder(recomputed, True), True)
        assert actual[0] == pytest.approx(expected[0], rel=1e-5)
        assert (actual[1] - expected[1]).norm() < 1e-2 * expected[1].norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_the_kernel_unpacks_the_bits_that_bitsandbytes_unpacks(self, dtype, kind):
        packed, expected = [], []
        for rows in (300, 64):  # 300 is no multiple of the rows of a program
            weight, state = bnb.quantize_4bit(
                torch.randn(rows, 192, device="cuda", dtype=dtype), quant_type=kind, compress_statistics=True
            )
            weight.quant_state = state
            packed.append(weight)
            expected.append(bnb.dequantize_4bit(weight, state))
        assert nf4.why_no_triton() is None
        B = (torch.randn(300, 3, device="cuda"), torch.randn(64, 3, device="cuda"))
        right = torch.nn.functional.pad(torch.block_diag(*B), (0, 2)).to(dtype)
        actual = nf4.unpack_stacked(tuple(packed), B, 3, dtype)
        assert torch.equal(actual, torch.cat([torch.cat(expected), right], 1))
