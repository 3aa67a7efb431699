"""The captured micro-step: on the CPU the reasons against it, on a GPU (`-m gpu`) that it computes what the eager one does."""

import pytest
import torch

from qlora_kit.fast.graph import GraphedMicroStep, LayerDropout, why_not_graphed
from qlora_kit.fast.lora import fuse
from qlora_kit.fast.loss import token_losses
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training


def adapted(folder, device="cpu", dropout=0.0, checkpointing=True, fused=True):
    model, _ = load_model_and_tokenizer(str(folder), create_bnb_config(), device=device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = prepare_model_for_training(model, create_lora_config(dropout=dropout), use_gradient_checkpointing=checkpointing)
    if fused:
        fuse(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def test_the_reason_against_capture_is_said(tiny_dir, other_models):
    model = adapted(tiny_dir)
    assert "CUDA" in why_not_graphed(model, "cpu", torch.bfloat16)
    assert why_not_graphed(model, "cuda", torch.bfloat16) is None
    assert "float16" in why_not_graphed(model, "cuda", torch.float16)
    assert "not fused" in why_not_graphed(adapted(tiny_dir, fused=False), "cuda", torch.bfloat16)
    llama, _ = load_model_and_tokenizer(str(other_models["llama"]), create_bnb_config(), device="cpu", dtype=torch.bfloat16)
    llama = prepare_model_for_training(llama, create_lora_config(), use_gradient_checkpointing=False)
    assert "llama" in why_not_graphed(llama, "cuda", torch.bfloat16)


def test_the_recomputation_draws_what_the_forward_pass_drew():
    dropout = LayerDropout(torch.device("cpu"))
    dropout.restart(7)
    drawn = [torch.rand(3, generator=dropout.generator()) for _ in range(2)]
    dropout.recomputing = True
    again = [torch.rand(3, generator=dropout.generator()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.fixture
def batches():
    ids = torch.randint(6000, (3, 2, 64), generator=torch.Generator().manual_seed(0))
    return ids.cuda() if torch.cuda.is_available() else ids


def accumulate(model, batches, step=0):
    """Gradients of one optimizer step through captured micro-steps, and the sum of their losses."""
    graphed = GraphedMicroStep(model, seed=1)
    tokens = batches[:, :, 1:].numel()
    graphed.begin_step(step)
    loss = sum(graphed(ids, ids, tokens).clone() for ids in batches)
    return loss.item(), graphed.flat_gradient.clone()


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


class TestOnTheGpu:
    pytestmark = needs_gpu

    def test_replays_equal_the_eager_step(self, tiny_dir, batches):
        loss, gradient = accumulate(adapted(tiny_dir, "cuda"), batches)
        model = adapted(tiny_dir, "cuda")
        expected = sum(token_losses(model, ids, ids).sum() for ids in batches) / batches[:, :, 1:].numel()
        expected.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert (gradient - flat).norm() / flat.norm() < 1e-2  # bf16 products, summed in another order

    def test_dropout_is_the_same_with_and_without_recomputation(self, tiny_dir, batches):
        first = accumulate(adapted(tiny_dir, "cuda", dropout=0.3, checkpointing=True), batches)
        second = accumulate(adapted(tiny_dir, "cuda", dropout=0.3, checkpointing=False), batches)
        assert first[0] == pytest.approx(second[0], rel=1e-5)
        assert (first[1] - second[1]).norm() / first[1].norm() < 1e-2

    def test_each_replay_and_each_step_draws_its_own_masks_and_a_step_can_be_drawn_again(self, tiny_dir, batches):
        model = adapted(tiny_dir, "cuda", dropout=0.3)
        graphed = GraphedMicroStep(model, seed=1)

        def losses(step):
            graphed.begin_step(step)
            return [graphed(batches[0], batches[0], 100).item() for _ in range(2)]

        losses(0)  # captures
        one, two, again = losses(1), losses(2), losses(1)
        assert one[0] != one[1] and one != two and one == again

    def test_a_smaller_last_micro_batch_runs_eagerly_into_the_same_gradients(self, tiny_dir, batches):
        graphed = GraphedMicroStep(adapted(tiny_dir, "cuda"), seed=1)
        graphed.begin_step(0)
        graphed(batches[0], batches[0], 100)
        before = graphed.flat_gradient.clone()
        loss = graphed(batches[1][:1], batches[1][:1], 100)
        assert loss.isfinite() and not torch.equal(before, graphed.flat_gradient)
