"""Differential privacy when only a part of the adapter is sent: noise and charge are for that."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.adapters import AdapterSchema, pairs
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.skellam import grid_for, sensitivities
from fedpeft.simulation.run import Simulation
from tests.integration.federations import adapter_after, federation, rows_of, run

PRIVATE: dict[str, dict[str, Any]] = {
    "local": {"unit": "record", "noise_multiplier": 1.0},
    "distributed": {
        "unit": "record",
        "mechanism": "distributed",
        "noise_multiplier": 1.0,
        "honest_clinics": 4,
    },
    "central": {"unit": "clinic", "mechanism": "central", "noise_multiplier": 2.0, "clip": 0.3},
}


def expected_charges(mechanism: str, rate: float, schema: AdapterSchema) -> dict[Charge, int]:
    """What two rounds of one step cost a clinic that sees each row at ``rate``."""
    if mechanism == "central":
        return {Charge(noise="gaussian", noise_multiplier=2.0): 2}
    if mechanism == "local":
        return {Charge(noise="gaussian", sampling_rate=rate, noise_multiplier=1.0): 2}
    charges: Counter[Charge] = Counter()
    for factor in ("B", "A"):
        coordinates = schema.part(factor).numel
        l2, l1 = sensitivities(1.0, coordinates, grid_for(1.0, coordinates))
        # Of the four clinics whose shares make up the noise, one may tell the server its own.
        left = math.sqrt(3 / 4)
        step = Charge(noise="skellam", sampling_rate=rate, noise_multiplier=left, l2=l2, l1=l1)
        charges[step] += 1
    return dict(charges)


def beyond_span(rows: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The part of ``rows`` that is no combination of ``others``, 0 to 1."""
    basis = np.linalg.qr(others.T)[0].T
    return float(np.linalg.norm(rows - rows @ basis.T @ basis) / np.linalg.norm(rows))


def factors(simulation: Simulation, number: int) -> list[dict[str, NDArray[np.float64]]]:
    """Every module's A, and B transposed, after a round."""
    found = pairs(adapter_after(simulation, number))
    return [{"A": a.double().numpy(), "B": b.double().numpy().T} for b, a in found]


@pytest.mark.parametrize("mechanism", PRIVATE)
def test_noise_is_on_the_part_that_is_sent_and_charged_for_it(
    mechanism: str, tmp_path: Path, tiny_model: Path
) -> None:
    plan = federation(
        tmp_path / "f",
        tiny_model,
        mode="sealed" if mechanism == "local" else "secagg",
        training={"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.1},
        rounds={"count": 2},
        privacy=PRIVATE[mechanism],
    )
    heard = run(plan)
    assert [record.sent for record in heard.records] == [None, "B", "A"]
    assert heard.repeated == []
    zero, one, two = (factors(plan, number) for number in (0, 1, 2))
    for before, middle, after in zip(zero, one, two, strict=True):
        # A was not trained in round 1, nor B in round 2: they are as before but for the gauge.
        assert beyond_span(middle["A"], before["A"]) < 1e-5
        assert beyond_span(after["B"], middle["B"]) < 1e-5
        # What was sent did not stay where it was.
        assert beyond_span(after["A"], middle["A"]) > 0.1
    schema = adapter_after(plan, 2).schema
    for at in range(5):
        with Ledger(plan.out / "ledgers" / f"c{at}.sqlite") as ledger:
            assert ledger.verify() == []
            (only,) = ledger.datasets()
            charges = ledger.charges(only.id)
        assert charges == expected_charges(mechanism, 8 / rows_of(at), schema)
