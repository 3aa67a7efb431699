"""An attached adapter that can be switched off so that the base model's own weights answer.

peft switches off what stands beside the base's weights. Some adapters bring tensors that take the place of the base's own
(trained biases, a saved embedding); the base's are kept, and put back while the adapter is off.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftConfig, PeftModelForCausalLM
from transformers import PreTrainedModel

from qlora_kit.adapter.folder import AdapterSource, read_adapter_header
from qlora_kit.errors import UserError


class SwitchableAdapter(PeftModelForCausalLM):
    """A base model with an adapter, whose tensors `load_adapter` loads afterwards.

    Attributes:
        replaced: parameters of the base that the adapter's file holds too, each with a copy of the base's own tensor.
    """

    def __init__(self, model: PreTrainedModel, config: PeftConfig, source: AdapterSource):
        super().__init__(model, config)
        self.source = source
        stored = {_plain(name) for name in read_adapter_header(source.folder)}
        replaced = [parameter for name, parameter in self.named_parameters() if _plain(name) in stored]
        self.replaced = [(parameter, parameter.detach().clone()) for parameter in replaced]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the adapter off while the context lasts.

        Raises:
            UserError: attaching the adapter changed the base model for good.
        """
        if start := self.source.settings.changing_start:
            problem = f"changes the base model for good (init_lora_weights: {start}) and cannot be switched off"
            raise UserError("--adapter", self.source.folder, problem, "measure and ask the base model alone, with --base_only")
        trained = [parameter.data for parameter, _ in self.replaced]
        with super().disable_adapter():
            try:
                for parameter, own in self.replaced:
                    parameter.data = own
                yield
            finally:
                for (parameter, _), tensor in zip(self.replaced, trained, strict=True):
                    parameter.data = tensor


def _plain(name: str) -> str:
    """Return the name that a tensor has where no adapter is attached to its module."""
    return name.replace(".base_layer.", ".")
