"""Try a model's layers once before training, so that what the library cannot compute is one line and no traceback."""

import traceback
from pathlib import Path
from typing import Any

import torch

from qlora_kit.errors import UserError
from qlora_kit.model.device import is_out_of_memory
from qlora_kit.model.loss import token_losses

TOKENS = 8
KIT = Path(__file__).resolve().parent.parent


def try_layers(model: Any, name: str, device: str, dtype: torch.dtype) -> None:
    """Compute a few tokens forward and backward as training does, through the library's layers; changes no weight.

    Args:
        model: the PEFT model.
        dtype: that training computes in.

    Raises:
        UserError: the layers fail. An error in the project's own code is raised as it is, and so is a full memory.
    """
    ids = torch.arange(TOKENS, device=device)[None]
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # dropout draws numbers
        try:
            with autocast:
                loss = token_losses(model.train(), ids, ids).sum()
            loss.backward()
        except Exception as error:  # every architecture has its own
            if is_out_of_memory(error) or _is_ours(error):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            problem = f"cannot be trained with these settings: its layers fail ({words}, in {Path(where.filename).name})"
            raise UserError("model.name", name, problem, "use another model, or other lora.target_modules") from error
        finally:
            model.zero_grad(set_to_none=True)
            model.eval()


def _is_ours(error: Exception) -> bool:
    """Return whether an error was raised in a file of the project, not in a library below it."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(KIT)
