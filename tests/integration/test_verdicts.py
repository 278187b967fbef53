"""How many clinics use a round's adapter: the server learns the count, if both sides want that."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedpeft_client.rounds.clinic import Clinic
from fedpeft_client.settings import AcceptanceSettings
from fedpeft_client.versions.store import AdapterStore
from fedpeft_server.rounds.narration import round_sentence
from fedpeft_server.runs.directory import RunDirectory
from tests.integration.federations import Boxes, Listener, adapter_after, federation, run

EASY = AcceptanceSettings(min_improvement=-0.99, max_forgetting=1e6, report_verdict=True)
RULES = {
    "c0": EASY,
    "c1": EASY,
    "c2": EASY.model_copy(update={"min_improvement": 0.99}),
    "c3": EASY.model_copy(update={"report_verdict": False}),
}
NOISE: dict[str, Any] = {"unit": "record", "noise_multiplier": 0.8}


def boxes(folder: Path, model: Path, mode: str, *, ask: bool = True, **tables: Any) -> Boxes:
    """Two clinics that take everything, one that takes nothing, and one that does not tell."""
    counts = {"count": 2, "ask_verdicts": ask}
    plan = federation(folder, model, "fedavg", mode=mode, clinics=4, rounds=counts, **tables)

    def settled(clinic: Clinic) -> Clinic:
        home = folder / "boxes" / clinic.name
        return replace(clinic, acceptance=RULES[clinic.name], store_directory=home / "adapters")

    return Boxes(plan, settled)


def in_use(made: Boxes) -> dict[str, str]:
    found: dict[str, str] = {}
    for clinic in made.clinics:
        assert clinic.store_directory is not None
        found[clinic.name] = AdapterStore(clinic.store_directory).in_use_name()
    return found


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
def test_the_server_counts_those_who_tell_and_training_goes_on_as_without(
    mode: str, tmp_path: Path, tiny_model: Path
):
    made, heard = boxes(tmp_path / "with", tiny_model, mode), Listener()
    made.run(heard)
    counts = [(record.verdicts, record.accepted) for record in heard.records]
    assert counts == [(0, 0), (3, 2), (3, 2)]
    assert in_use(made) == {"c0": "round-2", "c1": "round-2", "c2": "base", "c3": "round-2"}
    assert "; 2 of 3 clinics that tell use it" in round_sentence(heard.records[-1], 2)
    settings = made.simulation.settings
    kept = RunDirectory(made.simulation.out, settings, engine="local").records()
    assert [(record.verdicts, record.accepted) for record in kept] == counts
    if mode == "sealed":
        plain = federation(
            tmp_path / "without", tiny_model, "fedavg", clinics=4, rounds={"count": 2}
        )
        run(plain)
        with_them = adapter_after(made.simulation, 2)
        assert with_them.values.equal(adapter_after(plain, 2).values)


@pytest.mark.parametrize("mode", ["sealed", "secagg"])
@pytest.mark.parametrize(
    ("ask", "tables"), [(False, {}), (True, {"privacy": NOISE})], ids=["not asked", "noise"]
)
def test_nothing_is_told_unasked_or_under_noise(
    ask: bool, tables: dict[str, Any], mode: str, tmp_path: Path, tiny_model: Path
):
    made, heard = boxes(tmp_path / "run", tiny_model, mode, ask=ask, **tables), Listener()
    made.run(heard)
    assert [(record.verdicts, record.accepted) for record in heard.records] == [(0, 0)] * 3
    assert in_use(made)["c0"] == "round-2"
    assert "that tell" not in round_sentence(heard.records[-1], 2)
