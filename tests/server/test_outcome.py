"""What a round leaves beside its adapter: it comes back, or one sentence says why not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedpeft.adapters import (
    AdapterSchema,
    AdapterState,
    TensorSpec,
    load_adapter,
    load_settings_of,
    pairs,
    stacked,
)
from fedpeft.config import FederationSettings
from fedpeft.errors import AdapterError
from fedpeft_server.rounds.outcome import Outcome, load_memory, load_product, save_outcome
from fedpeft_server.runs.directory import RoundRecord, RunDirectory

BASE = "a" * 64
SETTINGS = FederationSettings.model_validate({"name": "sea", "adapter": {"rank": 2, "alpha": 6.0}})


def schema_of(outputs: int = 9, inputs: int = 12, rank: int = 2) -> AdapterSchema:
    specs: list[TensorSpec] = []
    for name in ("m", "n"):
        specs.append(TensorSpec(f"base_model.{name}.lora_A.weight", (rank, inputs)))
        specs.append(TensorSpec(f"base_model.{name}.lora_B.weight", (outputs, rank)))
    return AdapterSchema(tuple(specs), BASE)


SCHEMA = schema_of()
MEMORY = {"momentum": torch.arange(5, dtype=torch.float64) / 3, "steps": torch.tensor(7)}


def drawn(seed: int, schema: AdapterSchema = SCHEMA, rank: int = 2) -> AdapterState:
    schema = schema.of_rank(rank)
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(schema, torch.randn(schema.numel, generator=generator))


def dense(*states: AdapterState) -> list[torch.Tensor]:
    """Return the sum of products BA of each module, float64."""
    products = [[b.double() @ a.double() for b, a in pairs(state)] for state in states]
    return [torch.stack(parts).sum(dim=0) for parts in zip(*products, strict=True)]


def record(number: int) -> RoundRecord:
    content: dict[str, Any] = {"participants": (), "failed": (), "per_clinic": {}}
    numbers = {"train_loss": None, "valid_loss": 1.0, "bytes_up": 1, "bytes_down": 1, "seconds": 1}
    return RoundRecord.model_validate({"round": number, **content, **numbers})


def run_of(path: Path, schema: AdapterSchema = SCHEMA) -> RunDirectory:
    """A run whose rounds 1 and 3 added one and two products to the base model."""
    run = RunDirectory(path / "run", SETTINGS, engine="local")
    run.open(BASE)
    one = drawn(11, schema, 2)
    more = (drawn(12, schema, 1), drawn(13, schema, 3))
    rounds = [((), 0), ((one,), 1), ((one,), 0), ((one, *more), 2)]
    for number, (increments, new) in enumerate(rounds):
        memory = {**MEMORY, "steps": torch.tensor(number)} if number else {}
        left = Outcome(adapter=drawn(number, schema), memory=memory, increments=increments)
        run.save_round(record(number), left, new=new)
    return run


# What is damaged


@pytest.mark.parametrize("name", ["strategy.safetensors", "product.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "directory"])
def test_a_damaged_file_is_one_sentence_with_its_name(name: str, damage: str, tmp_path: Path):
    run = run_of(tmp_path)
    path = run.path / "rounds" / "3" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "directory":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "cut": data[:-3], "text": b"x" * 99}[damage])
    with pytest.raises(AdapterError) as caught:
        run.outcome_of(3, SCHEMA)
    said = str(caught.value)
    assert str(path) in said
    assert "remove the directory of that round" in said
    assert "\n" not in said
    # The rounds before are as good as they were.
    assert run.outcome_of(2, SCHEMA).memory["steps"] == 2


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(3)},
        {name: each for name, each in drawn(1).tensors().items() if ".m." in name},
        drawn(1, schema_of(8)).tensors(),
        {name: each.reshape(-1) for name, each in drawn(1).tensors().items()},
    ],
    ids=["another name", "a module missing", "another width", "flat"],
)
def test_a_product_of_another_shape_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path):
    save_file(
        {n: each.contiguous() for n, each in tensors.items()}, tmp_path / "product.safetensors"
    )
    with pytest.raises(AdapterError):
        load_product(tmp_path, SCHEMA)


# What is there again


def test_where_nothing_is_beside_the_adapter_nothing_is_found(tmp_path: Path):
    save_outcome(Outcome(adapter=drawn(1)), tmp_path, new=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["strategy.safetensors", "product.safetensors"])
def test_what_a_round_left_and_is_gone_is_missed(name: str, tmp_path: Path):
    run = run_of(tmp_path)
    (run.path / "rounds" / "3" / name).unlink()
    with pytest.raises(AdapterError, match="remove the directory of that round"):
        run.outcome_of(3, SCHEMA)


def test_memory_comes_back_to_the_bit(tmp_path: Path):
    kept = {**MEMORY, "view": torch.arange(12.0).view(3, 4).T, "half": torch.ones(2).bfloat16()}
    save_outcome(Outcome(adapter=drawn(1), memory=kept), tmp_path, new=0)
    found = load_memory(tmp_path)
    assert found.keys() == kept.keys()
    for name, tensor in kept.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_run_goes_on_with_what_its_last_round_left(tmp_path: Path):
    run = run_of(tmp_path)
    found = run.outcome_of(3, SCHEMA)
    assert torch.equal(found.adapter.values, drawn(3).values)
    assert found.memory["steps"] == 3
    assert torch.equal(found.memory["momentum"], MEMORY["momentum"])
    first, second = found.increments
    assert torch.equal(first.values, drawn(11).values)
    both = stacked([(drawn(12, rank=1), 1.0), (drawn(13, rank=3), 1.0)])
    assert torch.equal(second.values, both.values)


@pytest.mark.parametrize(("number", "products"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_a_round_has_the_products_of_the_rounds_up_to_it(
    number: int, products: int, tmp_path: Path
):
    found = run_of(tmp_path).outcome_of(number, SCHEMA)
    assert len(found.increments) == products
    assert torch.equal(found.adapter.values, drawn(number).values)


# The adapter that others load


@pytest.mark.parametrize(
    ("schema", "rank"),
    [(SCHEMA, 8), (schema_of(5, 12), 5)],
    ids=["all ranks together", "no more than the width"],
)
def test_the_adapter_of_a_run_does_alone_what_base_and_products_do(
    schema: AdapterSchema, rank: int, tmp_path: Path
):
    run = run_of(tmp_path, schema)
    settings = load_settings_of(run.path / "adapter")
    assert (settings.rank, settings.alpha / settings.rank) == (rank, 3.0)
    whole = load_adapter(run.path / "adapter", schema.of_rank(rank))
    parts = drawn(3, schema), drawn(11, schema), drawn(12, schema, 1), drawn(13, schema, 3)
    for found, expected in zip(dense(whole), dense(*parts), strict=True):
        assert float((found - expected).abs().max()) < 1e-4


def test_the_adapter_of_a_round_works_on_the_unchanged_base(tmp_path: Path):
    run = run_of(tmp_path)
    place = run.path / "rounds" / "3"
    assert torch.equal(load_adapter(place / "trained", SCHEMA).values, drawn(3).values)
    whole = load_adapter(run.path / "adapter", SCHEMA.of_rank(8))
    again = load_adapter(place / "adapter", SCHEMA.of_rank(8))
    assert torch.equal(whole.values, again.values)


def test_a_run_that_goes_on_publishes_the_same_adapter(tmp_path: Path):
    run = run_of(tmp_path)
    file = run.path / "adapter" / "adapter_model.safetensors"
    before = load_adapter(run.path / "adapter", SCHEMA.of_rank(8))
    file.unlink()
    again = RunDirectory(run.path, SETTINGS, engine="local")
    again.publish(again.outcome_of(3, SCHEMA))
    after = load_adapter(run.path / "adapter", SCHEMA.of_rank(8))
    for one, other in zip(dense(before), dense(after), strict=True):
        assert torch.allclose(one, other)
