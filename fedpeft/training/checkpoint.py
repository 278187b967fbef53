"""A round of training as it stands between two steps, and how that is written down.

All that the rest of the round depends on beside the job, the records and the adapter
that it began with. **Its bytes hold the keys of the noise to come**: whoever keeps them
encrypts them, and removes them before the round's result leaves the machine. This module
must not know of files. Specified in docs/spec/checkpoint.md.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedpeft.errors import StorageError
from fedpeft.models import AdaptedModel
from fedpeft.privacy.sampling import SecretDraws
from fedpeft.training.steps import Steps, Totals

SCHEMA: Final = 1
_METADATA: Final = "checkpoint"
_LENGTH_BYTES: Final = 8
"""With which a safetensors file begins: the length of its header, little-endian."""
_WEIGHTS, _OPTIMIZER, _GENERATOR = "weights", "optimizer.", "generator."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """A round after ``totals.steps`` steps; every tensor lies on the CPU.

    ``weights`` are float32, (trained.numel,), and empty as long as no step has changed them.
    ``optimizer`` is the optimiser's state by name, ``generators`` the states of torch's
    generators, uint8, by device. ``keys`` are those of samples and noise, **secret**.
    """

    totals: Totals
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    optimizer: Mapping[str, torch.Tensor | float] = field(default_factory=dict, repr=False)
    generators: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    keys: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file with one entry of metadata, which is JSON."""
        tensors = {_WEIGHTS: self.weights.contiguous()}
        numbers: dict[str, float] = {}
        for name, value in self.optimizer.items():
            if isinstance(value, torch.Tensor):
                tensors[_OPTIMIZER + name] = value.contiguous()
            else:
                numbers[name] = value
        tensors |= {_GENERATOR + name: state for name, state in self.generators.items()}
        said = {
            "schema": SCHEMA,
            "totals": asdict(self.totals),
            "optimizer": numbers,
            "keys": {name: key.hex() for name, key in self.keys.items()},
        }
        return save(tensors, {_METADATA: json.dumps(said, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """Read what :meth:`to_bytes` wrote.

        Raises:
            StorageError: it is of another version, or no checkpoint at all.
        """
        try:
            tensors, said = load(data), _metadata(data)
            if said["schema"] != SCHEMA:
                raise StorageError(f"the checkpoint has format {said['schema']}, not {SCHEMA}")
            return cls(
                totals=Totals(**said["totals"]),
                weights=tensors[_WEIGHTS],
                optimizer={**_under(_OPTIMIZER, tensors), **said["optimizer"]},
                generators=_under(_GENERATOR, tensors),
                keys={name: bytes.fromhex(key) for name, key in said["keys"].items()},
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the checkpoint is unreadable ({type(error).__name__})") from None


class Checkpoints(Protocol):
    """Where the checkpoints of one round go; it must not fail for want of a disk."""

    def newest(self) -> Checkpoint | None:
        """Return where the round was stopped; None: it begins."""
        ...

    def offer(self, step: int, take: Callable[[], Checkpoint]) -> None:
        """Keep what ``take`` returns, of ``step`` steps, if it is time for it; always at 0."""
        ...


class Standing:
    """The things that a step changes: read into a checkpoint, and set from one."""

    def __init__(self, model: AdaptedModel, optimizer: torch.optim.Optimizer, steps: Steps) -> None:
        self._model, self._optimizer, self._steps = model, optimizer, steps

    def begin(self, checkpoints: Checkpoints) -> Totals:
        """Set everything to where the round was stopped, or keep how it begins.

        To be called where torch's generators are those of the round.
        """
        found = checkpoints.newest()
        if found is None:
            self.offer(checkpoints, Totals())
            return Totals()
        self._restore(found)
        return found.totals

    def offer(self, checkpoints: Checkpoints, totals: Totals) -> None:
        """Offer a checkpoint, and draw what is secret from new keys, whether it is kept or not.

        So the result does not depend on when checkpoints are due, and one that is kept
        tells nothing of the noise of the steps before it.
        """
        keys = self._steps.renew()
        checkpoints.offer(totals.steps, lambda: self._take(totals, keys))

    def _take(self, totals: Totals, keys: Mapping[str, bytes]) -> Checkpoint:
        if not totals.steps:
            return Checkpoint(totals=totals, generators=self._generators(), keys=keys)
        state = self._optimizer.state_dict()["state"].get(0, {})
        return Checkpoint(
            totals=totals,
            weights=self._model.weights.detach().cpu(),
            optimizer={
                name: value.cpu() if isinstance(value, torch.Tensor) else value
                for name, value in state.items()
            },
            generators=self._generators(),
            keys=keys,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.generators:
            return  # the round was only announced
        if checkpoint.totals.steps:
            with torch.no_grad():
                self._model.weights.copy_(checkpoint.weights)
        if checkpoint.optimizer:
            groups = self._optimizer.state_dict()["param_groups"]
            state = {0: dict(checkpoint.optimizer)}
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        torch.set_rng_state(checkpoint.generators["cpu"])
        if self._model.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.generators["cuda"], self._model.device)
        self._steps.go_on(checkpoint.keys)

    def _generators(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._model.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._model.device)
        return states


def begin(checkpoints: Checkpoints, draws: Mapping[str, SecretDraws]) -> None:
    """Let ``draws`` go on where a round was stopped before its first step, or keep how it begins.

    For what must be the same again beside the steps of a :class:`Standing`.
    """
    found = checkpoints.newest()
    if found is not None:
        for name, each in draws.items():
            each.go_on(found.keys[name])
        return
    keys = {name: each.renew() for name, each in draws.items()}
    checkpoints.offer(0, lambda: Checkpoint(totals=Totals(), keys=keys))


def _metadata(data: bytes) -> dict[str, Any]:
    """Return the JSON in the header, which safetensors reads from files only."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    return json.loads(header["__metadata__"][_METADATA])


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
