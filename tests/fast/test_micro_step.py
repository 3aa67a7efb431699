"""Micro-steps compiled and captured beside the same ones run kernel by kernel; without a GPU, the reasons why not."""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional as bnb

from qlora_kit.errors import Failed, UserError
from qlora_kit.fast import nf4
from qlora_kit.fast.micro_step import MicroStep, StepSettings, why_not_compiled, why_not_graphed, why_not_used
from qlora_kit.fast.training_pass import FastDecoder, offload_embedding
from qlora_kit.training.build import fail_without_fallback
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training

SETTINGS = StepSettings(2, 20, seed=1, captured=False)


def test_what_cannot_work_is_said_where_it_was_insisted_on():
    assert "GPU" in why_not_graphed("cpu") and "GPU" in why_not_compiled("cpu")
    assert why_not_used("performance.compile", "auto", "needs a CUDA GPU") == "needs a CUDA GPU"
    assert why_not_used("performance.compile", "auto", None) is why_not_used("performance.compile", True, None) is None
    assert why_not_used("performance.compile", False, None) == "performance.compile is false"
    with pytest.raises(
        UserError, match=r"performance\.cuda_graphs: true: cannot work here \(needs a CUDA GPU\)\. Use auto or false\."
    ):
        why_not_used("performance.cuda_graphs", True, "needs a CUDA GPU")


@pytest.mark.parametrize(
    "lacking, told", [("compiler", "C compiler"), ("headers", "Python.h"), ("triton", "Triton"), (None, None)]
)
def test_what_triton_lacks_is_said(monkeypatch, tmp_path, lacking, told):
    monkeypatch.setattr(nf4, "triton", None if lacking == "triton" else object())
    monkeypatch.setattr(nf4, "_launch_unpack", lambda *rest: None)  # the trial kernel
    monkeypatch.setattr(nf4.bnb, "quantize_4bit", lambda *rest, **more: (SimpleNamespace(), None))
    monkeypatch.setattr(torch, "ones", lambda *rest, **more: None)
    monkeypatch.setattr(torch, "empty", lambda *rest, **more: None)
    monkeypatch.setattr("shutil.which", lambda name: None if lacking == "compiler" else f"/usr/bin/{name}")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / ("nothing" if lacking == "headers" else "")))
    nf4.why_no_triton.cache_clear()
    reason = why_not_compiled("cuda")
    nf4.why_no_triton.cache_clear()
    assert reason is None if told is None else told in reason


@pytest.fixture
def decoder(tiny_dir):
    def make(compiled):
        bnb_config = create_bnb_config(compute_dtype=torch.float32)
        model, _ = load_model_and_tokenizer(str(tiny_dir), bnb_config, device="cpu", dtype=torch.float32)
        torch.manual_seed(0)
        model = prepare_model_for_training(model, create_lora_config(dropout=0.3), use_gradient_checkpointing=False)
        return FastDecoder(model, 3, compiled)

    return make


def test_where_compiling_fails_the_plain_functions_take_over_and_lose_nothing(decoder, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel\nfor this GPU")

    monkeypatch.setattr("qlora_kit.fast.training_pass.compile_once", lambda function: broken)
    ids, share, told, results = torch.arange(40).view(2, 20), torch.tensor(0.1), [], []
    for compiled in (False, True):
        micro = MicroStep(decoder(compiled), SETTINGS, told.append)
        micro.begin_step(0)
        losses = [micro.train(ids, ids, share).item() for _ in range(2)]
        results.append((losses, micro.decoder.adapters.gradient.clone(), micro.losses(ids, ids)))
    assert told == ["no kernel for this GPU"]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    insisted = MicroStep(decoder(True), SETTINGS)
    with pytest.raises(RuntimeError, match="no kernel"):
        insisted.losses(ids, ids)
    divided = MicroStep(decoder(True), SETTINGS, fail_without_fallback)
    with pytest.raises(Failed, match=r"no kernel .*performance\.compile=false"):
        divided.losses(ids, ids)


def test_out_of_memory_is_no_reason_to_give_compiling_up(decoder, monkeypatch):
    def full(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qlora_kit.fast.training_pass.compile_once", lambda function: full)
    told, ids = [], torch.arange(40).view(2, 20)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        MicroStep(decoder(True), SETTINGS, told.append).losses(ids, ids)
    assert not told


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class TestOnTheGpu:
    pytestmark = needs_gpu

    @pytest.fixture
    def decoder(self, tiny_dir):
        def make(recomputed=3, compiled=False, offloaded=False):
            model, _ = load_model_and_tokenizer(str(tiny_dir), create_bnb_config(), device="cuda", dtype=torch.bfloat16)
            if offloaded:
                offload_embedding(model)
            torch.manual_seed(0)
            model = prepare_model_for_training(model, create_lora_config(dropout=0.3), use_gradient_checkpointing=False)
            generator = torch.Generator("cuda").manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02, generator=generator)
            return FastDecoder(model, recomputed, compiled)

        return make

    def one_step(self, decoder, captured, packed=False):
        """Loss of three micro-batches, gradient, and evaluation, of an optimizer step."""
        ids = torch.randint(6000, (3, 4, 64), generator=torch.Generator().manual_seed(0)).pin_memory()
        starts = torch.arange(64).expand(4, 64) // 24 * 24 if packed else None  # records of 24, 24 and 16 tokens
        micro = MicroStep(decoder, StepSettings(4, 64, seed=1, captured=captured, packed=packed))
        before = micro.losses(ids[0], ids[0], starts).clone()
        micro.begin_step(7)
        share = torch.tensor(1.0 / ids[:, :, 1:].numel(), device="cuda")
        loss = sum(micro.train(batch, batch, share, starts).clone() for batch in ids)
        gradient = decoder.adapters.gradient.clone()
        torch.testing.assert_close(
            micro.losses(ids[0], ids[0], starts), before
        )  # of the same weights, from the same pool as training
        return loss.item(), gradient, before

    @pytest.mark.parametrize(
        "compiled, captured, offloaded, packed",
        [(False, True, False, False), (True, False, False, False), (True, True, False, False), (True, True, True, False),
         (True, True, False, True)],
        ids=["captured", "compiled", "both", "both, embedding offloaded", "both, packed blocks"],
    )  # fmt: skip
    def test_it_computes_what_the_plain_functions_compute(self, decoder, compiled, captured, offloaded, packed):
        expected = self.one_step(decoder(), captured=False, packed=packed)
        actual = self.one_step(decoder(compiled=compiled, offloaded=offloaded), captured, packed)
        assert actual[0] == pytest.approx(expected[0], rel=1e-3)
        # bf16 through six layers, rounded less often where steps are fused: the CPU and the library are as far apart.
        assert (actual[1] - expected[1]).norm() < 0.08 * expected[1].norm()
        assert (actual[2] - expected[2]).abs().mean() < 0.1

    @pytest.mark.parametrize("recomputed", [0, 6])
    def test_replays_draw_the_same_dropout_whatever_is_recomputed(self, decoder, recomputed):
        expected, actual = self.one_step(decoder(3, True), True), self.one_step(decoder(recomputed, True), True)
        assert actual[0] == pytest.approx(expected[0], rel=1e-5)
        assert (actual[1] - expected[1]).norm() < 1e-2 * expected[1].norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_the_kernel_unpacks_bitsandbytes_bits(self, dtype, kind):
        packed, expected = [], []
        for rows in (300, 64):  # no multiple of what a program takes
            weight, state = bnb.quantize_4bit(
                torch.randn(rows, 192, device="cuda", dtype=dtype), quant_type=kind, compress_statistics=True
            )
            weight.quant_state = state
            packed.append(weight)
            expected.append(bnb.dequantize_4bit(weight, state))
        assert nf4.why_no_triton() is None
        B = (torch.randn(300, 3, device="cuda"), torch.randn(64, 3, device="cuda"))
        beside = torch.nn.functional.pad(torch.block_diag(*B), (0, 2)).to(dtype)
        actual = nf4.unpack_stacked(tuple(packed), B, 3, dtype)
        assert torch.equal(actual, torch.cat([torch.cat(expected), beside], 1))
