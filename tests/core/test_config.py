"""Configuration files: what is refused, in which words, and what is read."""

from pathlib import Path

import pytest

from fedpeft.config import (
    AdapterSettings,
    FederationSettings,
    RoundSettings,
    TrainingSettings,
    load_settings,
    parse_settings,
    read_toml,
)
from fedpeft.errors import ConfigError


def parse(text: str, tmp_path: Path, *overrides: str) -> FederationSettings:
    path = tmp_path / "federation.toml"
    path.write_text(text, encoding="utf-8")
    return load_settings(FederationSettings, path, overrides)


def refusal(text: str, tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, tmp_path, *overrides)
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml does not exist"):
        load_settings(FederationSettings, tmp_path / "none.toml")


def test_a_directory_is_no_configuration_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


def test_broken_toml_is_located(tmp_path: Path):
    assert "(at line 2, column 6)" in refusal("name = 'a'\nrank 3", tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "federation.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_toml(path)


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("[training]\nlearning_rat = 1e-4", "training.learning_rat", "training.learning_rate"),
        ("[adapter]\nranks = 4", "adapter.ranks", "adapter.rank"),
        ("[round]\ncount = 4", "round", "rounds"),
        ("[[clinic]]\nname='a'\ntrian='x'", "clinic.0.trian", "clinic.train"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    text: str, unknown: str, nearest: str, tmp_path: Path
):
    sentence = refusal(text, tmp_path)
    assert f"unknown key {unknown!r}" in sentence
    assert sentence.endswith(f"{nearest!r}")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[adapter]\nrank = 0", "adapter.rank = 0"),
        ("[adapter]\nrank = -3", "adapter.rank = -3"),
        ("[adapter]\nalpha = nan", "adapter.alpha = nan"),
        ("[adapter]\ndropout = 1.0", "adapter.dropout = 1.0"),
        ("[training]\nlearning_rate = 0", "training.learning_rate = 0"),
        ("[training]\nlearning_rate = inf", "training.learning_rate = inf"),
        ("[training]\nclip_norm = 0.0", "training.clip_norm = 0.0"),
        ("[training]\noptimizer = 'adam'", "training.optimizer = 'adam'"),
        ("[privacy]\nunit = 'ward'", "privacy.unit = 'ward'"),
        ("[privacy]\nunit = 'record'\nepsilon = 0", "privacy.epsilon = 0"),
        ("[privacy]\nunit = 'record'\ndelta = 2e-5", "privacy.delta = 2e-05"),
        ("[privacy]\nunit = 'record'\nclip = 0", "privacy.clip = 0"),
        ("[privacy]\nunit = 'record'\nnoise_multiplier = inf", "privacy.noise_multiplier = inf"),
        ("[privacy]\nunit = 'record'\nrecords_per_patient = 0", "privacy.records_per_patient = 0"),
        ("[privacy]\nunit = 'record'\ntarget_quantile = 1", "privacy.target_quantile = 1"),
        ("[training]\nbatch_size = 2.5", "training.batch_size = 2.5"),
        ("[model]\nfingerprint = 'abc'", "model.fingerprint = 'abc'"),
        ("[rounds]\ncount = 0", "rounds.count = 0"),
        ("name = '../x'", "name = '../x'"),
        ('name = "x\\n"', "name = 'x\\n'"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(text: str, key: str, tmp_path: Path):
    assert f"{key} is refused" in refusal(text, tmp_path)


def test_steps_and_epochs_exclude_each_other(tmp_path: Path):
    sentence = refusal("[training]\nlocal_steps = 3\nlocal_epochs = 1", tmp_path)
    assert "training: local_steps and local_epochs exclude each other" in sentence


def test_a_micro_batch_larger_than_the_batch_is_refused(tmp_path: Path):
    assert "micro_batch_size" in refusal(
        "[training]\nbatch_size = 4\nmicro_batch_size = 8", tmp_path
    )


RECORD = "[privacy]\nunit = 'record'\n"
SHARED = "[privacy]\nunit = 'patient'\nmechanism = 'distributed'\nnoise_multiplier = 1.0\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RECORD, 'noise_multiplier = "auto" needs an epsilon to aim at; set epsilon'),
        (RECORD + "noise_multiplier = 0", "noise_multiplier must be above 0; without noise leave"),
        (RECORD + "noise_multiplier = -1", "noise_multiplier must be above 0"),
        ("[privacy]\nunit = 'clinic'\nepsilon = 3", 'unit = "clinic" cannot be protected by mech'),
        (RECORD + "mechanism = 'central'\nepsilon = 3", 'cannot be protected by mechanism = "cen'),
        ("[privacy]\nepsilon = 3", "the key 'privacy.unit' is missing"),
        (RECORD + "noise_multipler = 3", "the nearest known key is 'privacy.noise_multiplier'"),
    ],
)
def test_privacy_that_protects_nobody_is_refused(text: str, says: str, tmp_path: Path):
    assert says in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("training.local_steps=2", "needs training.local_steps = 1: only"),
        ("training.optimizer=adamw", 'needs training.optimizer = "sgd": only'),
        ("aggregation.confidentiality=sealed", 'needs aggregation.confidentiality = "secagg"'),
        ("privacy.noise_multiplier=auto", "needs a number as privacy.noise_multiplier: only"),
    ],
)
def test_noise_that_is_shared_needs_a_secure_sum_of_one_step(
    override: str, missing: str, tmp_path: Path
):
    text = SHARED + "epsilon = 3\n[training]\nlocal_steps = 1\noptimizer = 'sgd'"
    assert parse(text, tmp_path).privacy is not None
    assert missing in refusal(text, tmp_path, override)


def test_without_a_privacy_table_there_is_none(tmp_path: Path):
    assert parse("", tmp_path).privacy is None
    found = parse(RECORD + "epsilon = 8", tmp_path).privacy
    assert found is not None
    assert (found.mechanism, found.noise_multiplier, found.exact_losses) == ("local", "auto", False)


def test_two_clinics_of_one_name_are_refused(tmp_path: Path):
    clinic = "[[clinic]]\nname = 'north'\ntrain = 'a'\n"
    assert "two [[clinic]] entries are named 'north'" in refusal(clinic * 2, tmp_path)


def test_a_missing_key_is_named(tmp_path: Path):
    assert "'clinic.0.train' is missing" in refusal("[[clinic]]\nname = 'north'", tmp_path)


@pytest.mark.parametrize("override", ["training", "=3", "training.=3", ".rank=1", ""])
def test_an_override_of_another_form_is_refused(override: str, tmp_path: Path):
    assert "not of the form table.key=value" in refusal("", tmp_path, override)


def test_an_override_below_a_value_is_refused(tmp_path: Path):
    assert "'name' is not a table" in refusal("name = 'a'", tmp_path, "name.x=1")


def test_an_override_is_checked_as_the_file_is(tmp_path: Path):
    assert "adapter.rank = 0" in refusal("", tmp_path, "adapter.rank=0")


def test_overrides_lie_over_the_file(tmp_path: Path):
    found = parse(
        "[training]\nlearning_rate = 1e-3\nseed = 4",
        tmp_path,
        "training.learning_rate=5e-5",
        "training.schedule=cosine",
        "rounds.count = 7",
    )
    assert found.training == TrainingSettings(learning_rate=5e-5, seed=4, schedule="cosine")
    assert found.rounds.count == 7


def test_an_override_leaves_the_given_values_as_they_were():
    values = {"training": {"seed": 1}}
    parse_settings(FederationSettings, values, ["training.seed=2"], where="here")
    assert values == {"training": {"seed": 1}}


def test_an_empty_file_is_the_defaults(tmp_path: Path):
    found = parse("", tmp_path)
    assert found == FederationSettings()
    assert found.adapter == AdapterSettings(rank=8, alpha=16.0, target_modules="all-linear")
    assert found.rounds == RoundSettings(count=5, minimum_clinics=3)


def test_target_modules_may_be_listed(tmp_path: Path):
    found = parse("[adapter]\ntarget_modules = ['q_proj', 'v_proj']", tmp_path)
    assert found.adapter.target_modules == ("q_proj", "v_proj")


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        AdapterSettings().rank = 2  # pyright: ignore[reportAttributeAccessIssue]
