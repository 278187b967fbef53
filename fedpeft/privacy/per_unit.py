"""The gradient of every unit of privacy by itself, in the backward pass that is made anyway.

Each LoRA factor is a linear map. While a :class:`UnitGradients` listens, its weight's
gradient is not summed over the rows of a batch: row i's share, the outer products of
what came in and what came back over its positions, goes to the slot of the unit that
row i belongs to. Works whatever the base computes in, under gradient checkpointing,
and for modules that are used more than once. A factor that is not trained is left alone.
Knows nothing of losses, samples or noise.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import torch
from torch.nn.functional import linear

from fedpeft.errors import NotSeparable
from fedpeft.models import AdaptedModel


class UnitGradients:
    """Room for the gradients of ``units`` units: ``slots``, float32, (units, trained.numel).

    Coordinates are in the order of ``model.trained``, as in ``model.gradient``.

    Formal guarantee: where a row's loss depends on that row alone, which
    :func:`fedpeft.training.separable.require_separable` measures, a slot holds the
    gradient of the losses of its unit's rows and nothing of any other row, up to
    floating-point rounding: padding to a longer row may change the order of a sum.

    Raises:
        NotSeparable: a trained factor is no plain linear map; names it.
    """

    def __init__(self, model: AdaptedModel, units: int) -> None:
        self.slots = torch.zeros((units, model.trained.numel), device=model.device)
        self._factors: list[_Factor] = []
        modules, offset = model.factor_modules(), 0
        for spec in model.trained.tensors:
            view = self.slots[:, offset : offset + spec.numel].view(units, *spec.shape)
            self._factors.append(_Factor(spec.name, _plain_linear(spec.name, modules), view))
            offset += spec.numel

    @contextlib.contextmanager
    def listening(self, units: Sequence[int], length: int) -> Generator[None]:
        """Make backward passes add the gradient of row i of a batch to slot ``units[i]``.

        ``length`` is that of the padded rows. Forward and backward pass must both lie
        within. Weights get no other gradient.
        """
        owners = torch.tensor(units, device=self.slots.device)
        consecutive = list(units) == list(range(units[0], units[0] + len(units)))
        for factor in self._factors:
            factor.listen(owners, length, units[0] if consecutive else None)
        try:
            yield
        finally:
            for factor in self._factors:
                factor.stop()


def _plain_linear(name: str, modules: dict[str, torch.nn.Module]) -> torch.nn.Linear:
    module = modules.get(name)
    # Exactly Linear: a subclass, or a forward put in its place, may compute anything.
    if (
        type(module) is torch.nn.Linear
        and "forward" not in vars(module)
        and "bias" not in dict(module.named_parameters())
    ):
        return module
    raise NotSeparable(
        f"the gradient of {name} cannot be told apart by record, as its module is "
        f"{type(module).__name__} and not a plain linear map; train without [privacy] or "
        "take the module out of adapter.target_modules"
    )


class _Factor:
    """One LoRA factor and its part of the slots, of shape (units, outputs, inputs)."""

    def __init__(self, name: str, module: torch.nn.Linear, slots: torch.Tensor) -> None:
        self._name = name
        self._module = module
        self._slots = slots
        self._owners = torch.empty(0)
        self._length = 0
        self._first: int | None = None

    def listen(self, owners: torch.Tensor, length: int, first: int | None) -> None:
        """Compute through here; row i is of unit ``owners[i]``, which may be ``first + i``."""
        self._owners, self._length, self._first = owners, length, first
        vars(self._module)["forward"] = self._forward

    def stop(self) -> None:
        """Let the module compute by itself again."""
        vars(self._module).pop("forward", None)

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", _Linear.apply(inputs, self._module.weight, self.add))

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add what each row gives, from its ``inputs`` and the gradient of its ``outputs``.

        Both have shape (rows, positions, width), or (rows * positions, width) as some
        models flatten them.
        """
        came_in, came_back = self._by_row(inputs), self._by_row(outputs).transpose(1, 2)
        if self._first is not None:
            part = self._slots[self._first : self._first + len(self._owners)]
            part.baddbmm_(came_back, came_in)
        else:
            self._slots.index_add_(0, self._owners, torch.bmm(came_back, came_in))

    def _by_row(self, values: torch.Tensor) -> torch.Tensor:
        rows = len(self._owners)
        if values.dim() == 2 and len(values) == rows * self._length:
            return values.reshape(rows, -1, values.shape[1])
        if values.dim() == 3 and len(values) == rows:
            return values
        raise NotSeparable(
            f"{self._name} computes on values of shape {tuple(values.shape)} for a batch of "
            f"{rows} rows, so that its gradient cannot be told apart by record; take the "
            "module out of adapter.target_modules"
        )


class _Linear(torch.autograd.Function):
    """``torch.nn.functional.linear`` whose backward pass hands the weight's gradient elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        add: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.add = add
        return linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (outputs,) = grad_outputs
        inputs, weight = cast("tuple[torch.Tensor, torch.Tensor]", ctx.saved_tensors)
        ctx.add(inputs, outputs)
        return (outputs @ weight if ctx.needs_input_grad[0] else None), None, None
