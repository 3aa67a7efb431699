"""Compare the chunked loss with PyTorch's cross-entropy and with the library's own loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from qlora_kit.model.loss import ChunkedCrossEntropy, chunked_losses, decoder_and_head, token_losses
from qlora_kit.planning.shape import vocabulary_piece
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training


def random_problem(dtype=torch.float64, rows=13, width=8, vocabulary=29):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[[0, 5]] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 4, 13, 100])
def test_losses_and_gradients_equal_pytorchs_for_every_size_of_piece(rows):
    hidden, weight, targets = random_problem(torch.float32)
    upstream = torch.linspace(-1, 2, len(targets))  # weights other than those of a mean
    (chunked_losses(hidden, weight, targets, rows) * upstream).sum().backward()
    gradient, hidden.grad = hidden.grad, None
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none", ignore_index=-100)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(chunked_losses(hidden, weight, targets, rows), expected)
    torch.testing.assert_close(gradient, hidden.grad)


def test_ignored_targets_have_no_loss_and_no_gradient():
    hidden, weight, targets = random_problem(torch.float32)
    losses = chunked_losses(hidden, weight, targets)
    losses.sum().backward()
    assert losses[[0, 5]].tolist() == [0, 0] and hidden.grad[[0, 5]].abs().max() == 0
    assert hidden.grad[1].abs().max() > 0


def test_bf16_agrees_with_fp32_within_bf16_rounding():
    hidden, weight, targets = random_problem(torch.float32, rows=64, width=32, vocabulary=500)
    rounded = hidden.detach().bfloat16().requires_grad_()
    chunked_losses(rounded, weight.bfloat16(), targets).sum().backward()
    exact = rounded.detach().float().requires_grad_()
    F.cross_entropy(F.linear(exact, weight.bfloat16().float()), targets, reduction="sum").backward()
    relative = (rounded.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert relative < 2**-7  # bf16 keeps 8 bits


def test_nothing_is_saved_for_backward_under_no_grad():
    hidden, weight, targets = random_problem(torch.float32)
    with torch.no_grad():
        assert not chunked_losses(hidden, weight, targets).requires_grad


@pytest.fixture(scope="module")
def adapted(two_layers_dir):
    model, _ = load_model_and_tokenizer(
        str(two_layers_dir), create_bnb_config(compute_dtype=torch.float32), device="cpu", dtype=torch.float32
    )
    model = prepare_model_for_training(model, create_lora_config(dropout=0.0), use_gradient_checkpointing=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def lora_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_quantized_model_trains_as_with_the_librarys_loss(adapted):
    ids = torch.randint(6000, (2, 40), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :7] = -100
    count = (labels[:, 1:] != -100).sum()
    library = adapted(input_ids=ids, labels=labels).loss
    lean = token_losses(adapted, ids, labels).sum() / count
    torch.testing.assert_close(lean, library)
    expected, actual = lora_gradients(adapted, library), lora_gradients(adapted, lean)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_full_logits_never_exist(adapted, monkeypatch):
    """No tensor has tokens x vocabulary elements, neither in training nor in evaluation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[0] == 4 * 199:
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr("qlora_kit.planning.shape.PIECE_LOGITS", 2**20)
    ids = torch.randint(6000, (4, 200), generator=torch.Generator().manual_seed(2))  # 796 predicted tokens
    with Largest():
        token_losses(adapted, ids, ids)
        with torch.no_grad():
            token_losses(adapted, ids, ids)
    assert 796 * 1000 < largest <= 2**20 < 796 * 6144


@pytest.mark.parametrize("tokens, pieces", [(1, 1), (441, 1), (442, 2), (512, 2), (8192, 19)])
def test_a_piece_has_at_most_2_to_the_26_logits(tokens, pieces):
    rows = vocabulary_piece(tokens, 151_936)  # 441 x 151,936 is just below 2^26
    assert math.ceil(151_936 / rows) == pieces and rows % 64 == 0 and (rows - 64) * tokens < 2**26


def test_a_model_that_is_not_llama_like_uses_the_librarys_logits(other_models):
    from transformers import AutoModelForCausalLM

    gpt2 = AutoModelForCausalLM.from_pretrained(other_models["gpt2"]).eval().requires_grad_(False)
    llama = AutoModelForCausalLM.from_pretrained(other_models["llama"]).eval().requires_grad_(False)
    assert decoder_and_head(gpt2) is None and decoder_and_head(llama) is not None
    ids = torch.randint(6000, (2, 20), generator=torch.Generator().manual_seed(3))
    for model in (gpt2, llama):
        torch.testing.assert_close(token_losses(model, ids, ids).mean(), model(input_ids=ids, labels=ids).loss)


def test_a_trained_head_uses_the_librarys_logits(other_models):
    from transformers import AutoModelForCausalLM

    assert decoder_and_head(AutoModelForCausalLM.from_pretrained(other_models["llama"])) is None  # its head requires grad


def test_a_large_logit_in_a_late_piece_does_not_overflow():
    """The running maximum rises by hundreds, and the earlier sums are scaled down."""
    hidden, weight, targets = random_problem(torch.float32)
    weight = weight * torch.linspace(1, 400, len(weight))[:, None]
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(chunked_losses(hidden, weight, targets, 5), expected)


def test_gradcheck_in_fp64():
    hidden, weight, targets = random_problem()
    assert torch.autograd.gradcheck(lambda x: ChunkedCrossEntropy.apply(x, weight, targets, 4), (hidden,))


def test_the_loss_is_computed_on_the_heads_device(other_models, monkeypatch):
    """A model on several GPUs may have its head on another GPU than its layers; here the head is on the meta device."""
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(other_models["llama"]).requires_grad_(False)
    llama.lm_head.to("meta")
    ids = torch.arange(40).reshape(2, 20)
    given = []
    monkeypatch.setattr("qlora_kit.model.loss.chunked_losses", lambda *tensors: (given.extend(tensors), tensors[2])[1])
    assert token_losses(llama, ids, ids).shape == (2, 19)
    assert [tensor.device.type for tensor in given] == ["meta"] * 3
