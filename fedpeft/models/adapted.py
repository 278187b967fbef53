"""A frozen base model with one adapter in it, of which a part is trained.

What is trained is one flat vector (and its gradient another), the network's factors are
views into it; see ``region.py``.
"""

import inspect
import warnings

import torch

from fedpeft.adapters import AdapterSchema, AdapterState, Factors, schema_of
from fedpeft.config import AdapterSettings
from fedpeft.errors import AdapterError
from fedpeft.models.base import BaseModel
from fedpeft.models.region import Region
from fedpeft.models.skeleton import OWN, REST, attach_lora, lora_tensors


class AdaptedModel:
    """The base model with an adapter whose values can be swapped in place.

    ``settings.rank`` is the rank that can be trained. With ``rest_rank`` the adapter goes
    on beyond it: so many more rows of A and columns of B, at the same scale alpha/rank,
    which are never trained. ``schema`` is that of all of it.

    ``weights`` is a parameter of shape (trained.numel,), float32, on the model's device;
    ``gradient`` of the same shape is where backward passes accumulate. Both are of the
    factors that :meth:`focus` chose, at first both, and are others after a new choice.
    """

    weights: torch.nn.Parameter
    gradient: torch.Tensor

    def __init__(self, base: BaseModel, settings: AdapterSettings, *, rest_rank: int = 0) -> None:
        self.base = base
        self.settings = settings
        self.rest_rank = rest_rank
        self._peft = attach_lora(base.network, settings, rest_rank=rest_rank)
        own = schema_of(lora_tensors(self._peft), base.fingerprint, "float32")
        self.schema: AdapterSchema = own.of_rank(settings.rank + rest_rank)
        self._require_plain()
        self._focus: Factors | None = None
        self._frozen: list[Region] = []
        if rest_rank:
            columns = range(settings.rank, settings.rank + rest_rank)
            rest = Region(self.schema, "AB", columns, self.device)
            rest.adopt(self._parameters(REST))
            self._frozen.append(rest)
        self.focus("AB")
        forward = inspect.signature(base.network.forward).parameters
        self._mode: tuple[bool, bool] | None = None
        self._can_skip_logits = "logits_to_keep" in forward

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.base.network.device

    @property
    def trained(self) -> AdapterSchema:
        """The schema of ``weights`` and ``gradient``."""
        return self._trained.schema

    def focus(self, factors: Factors) -> None:
        """Train ``factors`` from now on; the others get no gradient and stay as they are."""
        if factors == self._focus:
            return
        own, columns = self._parameters(OWN), range(self.settings.rank)
        self._trained = Region(self.schema, factors, columns, self.device)
        self._trained.adopt(own)
        self.weights = torch.nn.Parameter(self._trained.vector)
        self.gradient = torch.zeros_like(self._trained.vector)
        self.weights.grad = self.gradient
        gradients = self._trained.views(self.gradient)
        for name, parameter in own.items():
            parameter.requires_grad_(name in gradients)
            parameter.grad = gradients.get(name)
        others: tuple[Factors, ...] = ("A", "B")
        self._still = [
            Region(self.schema, factor, columns, self.device)
            for factor in others
            if factor not in factors
        ]
        for region in self._still:
            region.adopt(own)
        self._focus = factors

    def _require_plain(self) -> None:
        """Check that PEFT trains nothing but the factors of the adapter."""
        known = {id(parameter) for parameter in self._parameters(OWN).values()}
        beyond = sum(
            parameter.requires_grad and id(parameter) not in known
            for parameter in self._peft.parameters()
        )
        if beyond:
            raise AdapterError(
                f"the adapter trains {beyond} parameters outside LoRA's factors; "
                "only plain LoRA can be federated"
            )

    def _modules(self, adapter: str) -> dict[str, torch.nn.Module]:
        """Return the modules of one of PEFT's adapters, by their weights' names in the schema."""
        ends = tuple(f".lora_{factor}.{adapter}" for factor in ("A", "B"))
        return {
            f"{name.removesuffix(f'.{adapter}')}.weight": module
            for name, module in self._peft.named_modules()
            if name.endswith(ends)
        }

    def _parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        modules = self._modules(adapter)
        return {name: module.get_parameter("weight") for name, module in modules.items()}

    def factor_modules(self) -> dict[str, torch.nn.Module]:
        """Return the modules that own a trained ``weight``, by its name in the schema."""
        trained = {spec.name for spec in self.trained.tensors}
        return {name: module for name, module in self._modules(OWN).items() if name in trained}

    def _regions(self) -> list[Region]:
        return [self._trained, *self._still, *self._frozen]

    def load(self, state: AdapterState) -> None:
        """Replace the adapter's values.

        Raises:
            SchemaMismatch: ``state`` has another schema or base model.
        """
        self.schema.require(state.schema.hash, source="the caller")
        with torch.no_grad():
            for region in self._regions():
                region.load(state)

    def read(self) -> AdapterState:
        """Return a copy of the adapter's values on the CPU."""
        state = AdapterState(self.schema, torch.empty(self.schema.numel))
        for region in self._regions():
            region.store(state)
        return state

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
