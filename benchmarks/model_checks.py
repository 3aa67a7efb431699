"""What model_matrix.py compares of one model: losses, gradients, answers, merged weights, and what 4 bits and LoRA reach.

The reference is plain transformers with plain peft, in 32 bits and without bitsandbytes' layers: the weights that the product
packs go through the same 4 bits and back, and each record is computed alone.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import inference_example
import quantization_utils
from qlora_kit.merge import merge
from qlora_kit.training.trainer import QLoraTrainer

PROMPTS = ["A lighthouse is a tower which shows the way to ships that come in from the sea", "The history of the city begins"]
SAMPLING = {"temperature": 0, "repetition_penalty": 1, "max_new_tokens": 12}

NOT_TEXT = re.compile(r"vision|visual|audio|multi_modal")  # towers of models that see and hear as well


class Step(NamedTuple):
    """An optimizer step of a run: the LoRA matrices before it and their gradients, by name; and the data of the run."""

    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    training: Any
    evaluation: Any


@contextmanager
def record_steps() -> Iterator[list[Step]]:
    """Yield a list that gets each optimizer step of a run; every step must take all of the training data."""
    steps: list[Step] = []
    original = QLoraTrainer.check_step

    def check_step(trainer: Any) -> None:
        flat = trainer.micro and trainer.micro.decoder.adapters
        matrices = {name: matrix for name, matrix in trainer.adapted.named_parameters() if matrix.requires_grad}
        gradients = {name: flat.gradient_of(matrix) if flat else matrix.grad for name, matrix in matrices.items()}
        steps.append(
            Step(
                {name: matrix.detach().clone() for name, matrix in matrices.items()},
                {name: torch.zeros_like(matrices[name]) if g is None else g.clone() for name, g in gradients.items()},
                trainer.train_dataset,
                trainer.eval_dataset,
            )
        )
        original(trainer)

    QLoraTrainer.check_step = check_step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        QLoraTrainer.check_step = original  # type: ignore[method-assign]


def find_packed(folder: Path) -> list[str]:
    """Return the names of the weights that the product packs to 4 bits."""
    model, _ = quantization_utils.load_model_and_tokenizer(str(folder), device="cpu")
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, bitsandbytes.nn.Params4bit)]


def load_plain(folder: Path, **options: Any) -> Any:
    """Load a model with transformers alone, in 32 bits."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    except ValueError:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()


def round_weights(model: Any, packed: Iterable[str]) -> Any:
    """Return a copy of a plain model in which the weights named in `packed` went through NF4 and back."""
    model = copy.deepcopy(model)
    for name in packed:
        module_name, _, last = name.rpartition(".")
        module = model.get_submodule(module_name)
        weight = getattr(module, last).data
        turned = weight.T if isinstance(module, Conv1D) else weight  # a Conv1D is packed as the linear layer that it is
        values, state = quantize_4bit(turned.contiguous(), quant_type="nf4", blocksize=64, compress_statistics=True)
        weight.copy_(dequantize_4bit(values, state).T if isinstance(module, Conv1D) else dequantize_4bit(values, state))
    return model


def records_of(blocks: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the ids and labels of each record of some blocks, (1, tokens) each, without padding."""
    for number in range(len(blocks)):
        block = blocks[number]
        ids, labels = block["input_ids"], block["labels"]
        starts = block.get("starts", torch.zeros_like(ids))
        for start in starts.unique().tolist():
            where = starts == start
            counted = (labels[where] != -100).nonzero()
            if len(counted):
                stop = int(counted[-1]) + 1  # padding, and whatever follows the last answer, changes no loss
                yield ids[where][None, :stop], labels[where][None, :stop]


def mean_loss(model: Any, blocks: Any, backward: bool = False) -> float:
    """Return the mean loss of all records in nats a token, each computed alone; add its gradient if asked."""
    records = list(records_of(blocks))
    tokens = sum(int((labels[:, 1:] != -100).sum()) for _, labels in records)
    total = 0.0
    for ids, labels in records:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = F.cross_entropy(logits, labels[0, 1:], reduction="sum") / tokens
        if backward:
            loss.backward()
        total += loss.item()
    return total


def compare_losses(model: Any, step: Step, output: Path) -> tuple[dict[str, float], Any]:
    """Return how far the evaluation loss is from a plain model's before and after the run, in nats; and the plain model.

    Args:
        model: from round_weights; returned with the run's adapter.
    """
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [entry["eval_loss"] for entry in map(json.loads, lines) if "eval_loss" in entry]
    with torch.no_grad():
        figures = {"base": abs(measured[0] - mean_loss(model, step.evaluation))}
        adapted = PeftModel.from_pretrained(model, str(output), is_trainable=True)
        figures["adapter"] = abs(measured[-1] - mean_loss(adapted.eval(), step.evaluation))
    return figures, adapted


def compare_gradients(adapted: Any, step: Step, limit: float) -> float | None:
    """Return the largest relative error of a LoRA matrix's gradient in a step of a run without dropout.

    None where it is above the limit and the plain model's own is random: Phi-3.5-MoE draws its experts in training.

    Args:
        adapted: a plain model with the run's adapter, whose weights become those before the step.

    Raises:
        ValueError: a run trains other matrices than peft, or one that gets no gradient.
    """
    matrices = {name: matrix for name, matrix in adapted.named_parameters() if matrix.requires_grad}
    if matrices.keys() != step.weights.keys():
        raise ValueError(f"trains other matrices than peft: {sorted(matrices.keys() ^ step.weights.keys())[:3]}")
    for name, matrix in matrices.items():
        matrix.data.copy_(step.weights[name])
    adapted.train()
    expected = compute_gradients(adapted, step.training)
    if idle := [name for name, matrix in matrices.items() if not expected[name].any()]:
        raise ValueError(f"LoRA without a gradient: {', '.join(kinds_of(idle))}")
    error = largest_error(step.gradients, expected)
    if error > limit and largest_error(compute_gradients(adapted, step.training), expected) > limit:
        return None
    return error


def compute_gradients(adapted: Any, blocks: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of each LoRA matrix, by its name."""
    adapted.zero_grad()
    mean_loss(adapted, blocks, backward=True)
    matrices = [(name, matrix) for name, matrix in adapted.named_parameters() if matrix.requires_grad]
    return {name: torch.zeros_like(matrix) if matrix.grad is None else matrix.grad for name, matrix in matrices}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest error of a tensor relative to its norm."""
    norms = {name: tensor.norm().item() for name, tensor in expected.items()}
    least = 1e-4 * max(norms.values())  # a gradient of rounding errors alone has no relative error
    return max((found[name] - tensor).norm().item() / max(norms[name], least) for name, tensor in expected.items())


def compare_answers(model: Any, output: Path, without: Iterable[bool] = (False, True)) -> str:
    """Return where greedy answers differ from those of `generate`; empty if they are the same.

    Args:
        model: from round_weights; gets the adapter.
        without: whether the product leaves the adapter out, for each comparison.
    """
    adapted = PeftModel.from_pretrained(model, str(output)).eval()
    for base_only in without:
        generator = inference_example.load_generator(output, device="cpu", settings=SAMPLING, base_only=base_only)
        prompts = [generator.encode(prompt) for prompt in PROMPTS]
        if base_only:
            with adapted.disable_adapter():
                expected = [answer_plainly(adapted, ids, generator.encoder) for ids in prompts]
        else:
            expected = [answer_plainly(adapted, ids, generator.encoder) for ids in prompts]
        whose = "base" if base_only else "adapter"
        if (alone := generator.answer(PROMPTS[0]).text.rstrip("\ufffd")) != expected[0]:
            return f"{whose}: {alone!r}, expected {expected[0]!r}"
        if (together := [answer.text.rstrip("\ufffd") for answer in generator.complete(prompts)]) != expected:
            return f"{whose}, two at once: {together!r}, expected {expected!r}"
    return ""


def answer_plainly(model: Any, ids: list[int], encoder: Any) -> str:
    """Return the greedy answer of `generate`."""
    prompt = torch.tensor([ids])
    answer = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=SAMPLING["max_new_tokens"],
        eos_token_id=encoder.stop_ids, pad_token_id=encoder.tokenizer.pad_token_id,
    )[0, len(ids) :]  # fmt: skip
    text = encoder.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")  # a character that the last token leaves incomplete


def compare_merge(model: Any, output: Path, folder: Path, base: Any) -> tuple[float, str]:
    """Return the largest relative difference of a merged weight from peft's, and the weight's name.

    Args:
        model: from round_weights, with the packed weights for `base` = dequantized; gets the adapter.
        folder: for the merged model.

    Raises:
        ValueError: a weight is missing.
    """
    merge(output, folder, base, check=False, device="cpu")
    expected = PeftModel.from_pretrained(model, str(output)).merge_and_unload().state_dict()
    found = load_plain(folder).state_dict()
    if expected.keys() != found.keys():
        raise ValueError(f"other weights than peft's: {sorted(expected.keys() ^ found.keys())[:3]}")
    of_text = {name: weight for name, weight in expected.items() if weight.numel() and not NOT_TEXT.search(name)}
    pairs = {name: (weight.float(), found[name].float()) for name, weight in of_text.items()}
    return max((((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item(), name) for name, (a, b) in pairs.items())


def measure_reach(model: Any, packed: list[str], output: Path) -> dict[str, Any]:
    """Return the shares of a decoder's projections that are packed, and that LoRA reaches; and the kinds that are not."""
    sizes = {
        f"{name}.{key}": parameter.numel()
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and key != "A_log" and not isinstance(module, torch.nn.Embedding | torch.nn.modules.conv._ConvNd)
        if module is not model.get_output_embeddings() and not NOT_TEXT.search(name)
    }
    modules = dict(PeftModel.from_pretrained(model, str(output)).named_modules())
    adapted = [re.sub(r"^base_model\.model\.", "", name) for name, module in modules.items() if hasattr(module, "lora_A")]
    reached = [_weight_of(modules[f"base_model.model.{name}"], name) for name in adapted]
    result = {}
    for key, names in (("packed", packed), ("adapted", reached)):
        result[key] = sum(sizes.get(name, 0) for name in set(names)) / sum(sizes.values())
        result[f"not_{key}"] = kinds_of(sizes.keys() - set(names))
    return result


def _weight_of(module: Any, name: str) -> str:
    """Return the name that a weight with LoRA has in the base model."""
    parameter = getattr(module, "parameter_name", "weight")  # of peft's wrapper around experts
    return f"{name.replace('.base_layer', '')}.{parameter}"


def kinds_of(names: Iterable[str]) -> list[str]:
    """Return the names of weights without the numbers of layers, each once: mlp.experts.gate_up_proj."""
    short = (re.sub(r"^.*?(layers|h|blocks)\.\d+\.|\.weight$|\.lora_[AB]\..*$", "", name) for name in names)
    return sorted({re.sub(r"\.\d+", "", name) for name in short})


def why_peft_cannot_train(folder: Path) -> str | None:
    """Return why plain transformers, bitsandbytes and peft cannot train LoRA on all linear layers of a causal model, or None."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"})
        config = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config).train()
        ids = torch.arange(32)[None]
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    trained = any(matrix.grad is not None and bool(matrix.grad.any()) for matrix in adapted.parameters())
    return None if trained else "no LoRA matrix gets a gradient"
