"""Which settings are refused at the start, and what is proposed instead."""

from pathlib import Path
from typing import Any

import pytest

from fedpeft.config import FederationSettings
from fedpeft.errors import ConfigError
from fedpeft_strategies import STRATEGIES, build_strategy, declarations, require_possible
from tests.strategies.clinics import unequal

SEALED = {"confidentiality": "sealed"}
CENTRAL = {"unit": "clinic", "mechanism": "central", "noise_multiplier": 1.0, "epsilon": 8.0}
LOCAL = {"unit": "record", "epsilon": 8.0}
DISTRIBUTED = {"unit": "record", "mechanism": "distributed", "noise_multiplier": 1.0}
ONE_STEP = {"local_steps": 1, "optimizer": "sgd"}
MIXED = [
    {"name": "big", "train": Path("big.jsonl")},
    {"name": "small", "train": Path("small.jsonl"), "max_rank": 2},
]
ENOUGH = {"minimum_clinics": 5}


def settings(name: str, inner: str | None = None, /, **tables: Any) -> FederationSettings:
    own = {"name": name, "inner": inner, **tables.pop("strategy", {})}
    return FederationSettings.model_validate({"strategy": own, **tables})


def refusal(name: str, inner: str | None = None, /, **tables: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        require_possible(settings(name, inner, **tables))
    text = str(caught.value)
    assert "\n" not in text
    assert not text.endswith(".")
    assert "; " in text  # what is wrong; what to do
    return text


def test_an_unknown_name_is_refused_with_the_nearest_and_where_to_look():
    text = refusal("fedavgg")
    assert "'fedavgg' is unknown" in text
    assert "'fedavg'" in text
    assert "`fedpeft strategies`" in text


def test_any_name_has_a_nearest_one():
    assert "nearest" in refusal("%")


def test_an_inner_strategy_of_one_that_wraps_nothing_is_refused():
    assert "fedadam" in refusal("alternating", "fedavg")


@pytest.mark.parametrize("name", [each.name for each in declarations() if each.wraps])
@pytest.mark.parametrize("inner", ["flora", "fedadam", "median", "alternatin"])
def test_an_inner_strategy_that_cannot_be_wrapped_is_refused(name: str, inner: str):
    text = refusal(name, inner)
    assert "is defined around" in text
    assert "'alternating'" in text or "'fedavg'" in text or "'ffa'" in text


@pytest.mark.parametrize("name", [each.name for each in declarations() if not each.linear])
def test_single_updates_under_secure_aggregation_are_refused(name: str):
    text = refusal(name, rounds=ENOUGH)
    assert "needs single updates" in text
    assert "strategy.name = 'alternating', which needs only their sum" in text
    assert 'aggregation.confidentiality = "sealed"' in text
    assert "require_secagg = false" in text


@pytest.mark.parametrize("name", [each.name for each in declarations() if each.changes_base])
def test_a_changed_base_in_four_bits_is_refused(name: str):
    text = refusal(name, model={"quantization": "nf4"}, aggregation=SEALED)
    assert "4-bit" in text
    assert "'alternating'" in text


def test_what_another_reason_forbids_is_not_proposed():
    assert "sealed" not in refusal("flora", model={"quantization": "nf4"})


@pytest.mark.parametrize(
    "name", [each.name for each in declarations() if "central" not in each.mechanisms]
)
def test_a_mechanism_that_a_strategy_does_not_keep_is_refused(name: str):
    text = refusal(name, aggregation=SEALED, privacy=CENTRAL, rounds=ENOUGH)
    assert 'privacy.mechanism = "central"' in text
    assert 'only "local"' in text
    assert "'alternating'" in text


def test_distributed_noise_does_not_protect_a_personal_b():
    text = refusal("fedsa", privacy=DISTRIBUTED, training=ONE_STEP)
    assert '"central" or "local"' in text
    assert "strategy.name = 'alternating'" in text


@pytest.mark.parametrize("name", ["fedavg", "fedsa", "fedavgm", "fedprox"])
def test_a_clinic_of_a_lower_rank_under_one_rank_for_all_is_refused(name: str):
    text = refusal(name, clinic=MIXED)
    assert "clinic 'small' has a max_rank below adapter.rank = 8" in text
    key = "strategy.inner" if name in ("fedavgm", "fedprox") else "strategy.name"
    assert f"{key} = 'alternating'" in text


def test_a_robust_strategy_for_clinics_of_a_lower_rank_is_refused():
    assert "max_rank" in refusal("median", aggregation=SEALED, clinic=MIXED)


@pytest.mark.parametrize("privacy", [CENTRAL, DISTRIBUTED])
def test_noise_for_whole_adapters_over_mixed_ranks_is_refused(privacy: dict[str, Any]):
    text = refusal("alternating", clinic=MIXED, privacy=privacy, training=ONE_STEP)
    assert "updates of one rank" in text
    assert "adapter.rank = 2" in text


def test_a_proximal_strategy_without_its_term_is_refused():
    text = refusal("fedprox")
    assert "training.proximal_mu = 0" in text
    assert "0.01" in text


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "alternating"])
def test_reorthonormalizing_anything_but_ffa_is_refused(name: str):
    assert "'ffa'" in refusal(name, strategy={"reorthonormalize": True})


def test_reorthonormalizing_under_a_server_optimiser_is_refused():
    assert "reorthonormalize" in refusal("fedadam", "ffa", strategy={"reorthonormalize": True})


@pytest.mark.parametrize(
    "used",
    [
        {"byzantine": 2},
        {"max_norm": 1.0},
        {"server_learning_rate": 1.0},
        {"beta_1": 0.1},
        {"tau": 1},
    ],
    ids=str,
)
def test_a_setting_that_would_have_no_effect_is_refused(used: dict[str, Any]):
    (key,) = used
    assert f"strategy.{key} is set" in refusal("alternating", strategy=used)


@pytest.mark.parametrize(
    ("name", "byzantine", "least"),
    [("median", 1, 3), ("trimmed-mean", 1, 3), ("trimmed-mean", 2, 5), ("multi-krum", 1, 5)],
)
def test_too_few_clinics_to_tell_right_from_wrong_are_refused(
    name: str, byzantine: int, least: int
):
    used = {} if name == "median" else {"byzantine": byzantine}
    tables: dict[str, Any] = {"aggregation": SEALED, "strategy": used}
    text = refusal(name, rounds={"minimum_clinics": least - 1}, **tables)
    assert f"set rounds.minimum_clinics = {least}" in text
    require_possible(settings(name, rounds={"minimum_clinics": least}, **tables))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_be_built(name: str):
    chosen = settings(name, aggregation=SEALED, rounds=ENOUGH, training={"proximal_mu": 0.01})
    assert isinstance(build_strategy(chosen, unequal().schema), STRATEGIES[name])


@pytest.mark.parametrize("name", [each.name for each in declarations() if each.linear])
def test_every_linear_strategy_runs_under_the_defaults(name: str):
    require_possible(settings(name, training={"proximal_mu": 0.01}))


@pytest.mark.parametrize("name", ["alternating", "ffa", "flexlora", "flora"])
def test_mixed_ranks_run_where_there_is_a_rule_for_them(name: str):
    require_possible(settings(name, aggregation=SEALED, clinic=MIXED))
    require_possible(settings(name, aggregation=SEALED, clinic=MIXED, privacy=LOCAL))


def test_a_wrapper_has_the_properties_of_what_it_wraps():
    inner = require_possible(settings("fedadam", "alternating"))
    assert (inner.name, inner.ranks, inner.up, inner.down) == ("fedadam", "nested", "P/2", "P/2")
    assert require_possible(settings("fedadam")).ranks == "same"


def test_fedsvd_runs_alone_and_under_a_proximal_term():
    require_possible(settings("ffa", strategy={"reorthonormalize": True}))
    turned = {"reorthonormalize": True}
    require_possible(settings("fedprox", "ffa", strategy=turned, training={"proximal_mu": 0.01}))


@pytest.mark.parametrize("name", [each.name for each in declarations() if not each.linear])
def test_what_is_proposed_is_possible(name: str):
    refusal(name, privacy=CENTRAL, model={"quantization": "nf4"}, rounds=ENOUGH)
    require_possible(settings("alternating", privacy=CENTRAL, model={"quantization": "nf4"}))
