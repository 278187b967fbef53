"""A frozen base model with one trainable adapter in it.

All factors are views into one flat vector (and their gradients into another),
so that optimising, clipping, loading and reading an adapter are each one
operation on one tensor, whatever the number of modules.
"""

import inspect
import warnings

import torch
from peft import get_peft_model_state_dict

from fedpeft.adapters import AdapterSchema, AdapterState, schema_of
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError
from fedpeft.models.base import BaseModel
from fedpeft.models.skeleton import attach_lora

_ADAPTER_NAME = ".default"


class AdaptedModel:
    """The base model with an adapter whose values can be swapped in place.

    ``weights`` is a parameter of shape (schema.numel,), float32, on the model's
    device; ``gradient`` of the same shape is where backward passes accumulate.
    """

    def __init__(self, base: BaseModel, settings: AdapterSettings) -> None:
        self.base = base
        self.settings = settings
        self._peft = attach_lora(base.network, settings)
        self.schema: AdapterSchema = schema_of(
            get_peft_model_state_dict(self._peft), base.fingerprint, "float32"
        )
        self.weights = torch.nn.Parameter(torch.empty(self.schema.numel, device=self.device))
        self.gradient = torch.zeros_like(self.weights.data)
        self.weights.grad = self.gradient
        self._flatten()
        forward = inspect.signature(base.network.forward).parameters
        self._mode: tuple[bool, bool] | None = None
        self._can_skip_logits = "logits_to_keep" in forward

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.base.network.device

    def _flatten(self) -> None:
        """Turn every trainable parameter and its gradient into a view of the flat vectors."""
        trainable = {
            name.replace(_ADAPTER_NAME, ""): parameter
            for name, parameter in self._peft.named_parameters()
            if parameter.requires_grad
        }
        offset = 0
        for spec in self.schema.tensors:
            parameter = trainable.pop(spec.name)
            view = slice(offset, offset + spec.numel)
            with torch.no_grad():
                self.weights[view] = parameter.detach().reshape(-1).to(self.weights)
                parameter.data = self.weights.data[view].view(spec.shape)
                parameter.grad = self.gradient[view].view(spec.shape)
            offset += spec.numel
        if trainable:
            raise AdapterError(
                f"the adapter trains {len(trainable)} parameters outside LoRA's factors; "
                "only plain LoRA can be federated"
            )

    def factor_modules(self) -> dict[str, torch.nn.Module]:
        """Return the modules that own a trainable ``weight``, by its name in the schema."""
        return {
            f"{name}.weight".replace(_ADAPTER_NAME, ""): module
            for name, module in self._peft.named_modules()
            if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter)
            and weight.requires_grad
        }

    def load(self, state: AdapterState) -> None:
        """Replace the adapter's values.

        Raises:
            SchemaMismatch: ``state`` has another schema or base model.
        """
        self.schema.require(state.schema.hash, source="the caller")
        with torch.no_grad():
            self.weights.copy_(state.values)

    def read(self) -> AdapterState:
        """Return a copy of the adapter's values on the CPU."""
        return AdapterState(self.schema, self.weights.detach().to("cpu", copy=True))

    def train_mode(self, *, gradient_checkpointing: bool) -> None:
        """Switch dropout on, and recompute activations in the backward pass if asked."""
        self._switch(training=True, checkpointing=gradient_checkpointing)

    def eval_mode(self) -> None:
        """Switch dropout and gradient checkpointing off."""
        self._switch(training=False, checkpointing=False)

    def _switch(self, *, training: bool, checkpointing: bool) -> None:
        # Both walk over every module, which takes longer than a small model's step.
        if self._mode == (training, checkpointing):
            return
        network = self.base.network
        network.train(training)
        with warnings.catch_warnings():
            # Renamed in transformers 5.23; the old name is the one in all of its 5.17 to 5.x.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
            if checkpointing:
                network.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                network.gradient_checkpointing_disable()
        self._mode = (training, checkpointing)

    def target_logits(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the logits that predict the target tokens, shape (targets, vocabulary).

        ``input_ids`` and the boolean ``targets`` have shape (rows, length), padded on
        the right. Padding needs no attention mask: in a causal model it comes after
        every token that counts. Logits of the positions before the batch's first
        target are not computed where the model allows it.
        """
        first = int(targets.any(dim=0).to(torch.uint8).argmax()) if self._can_skip_logits else 1
        keep = input_ids.shape[1] - max(first, 1) + 1
        skip = {"logits_to_keep": keep} if self._can_skip_logits else {}
        logits = self.base.network(input_ids=input_ids, use_cache=False, **skip).logits
        return logits[:, :-1][targets[:, -(logits.shape[1] - 1) :]]

    def detach(self) -> BaseModel:
        """Take the adapter out and return the bare base model; this object is then unusable."""
        self._peft.unload()
        return self.base
