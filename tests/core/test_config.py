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
        ("[training]\noptimizer = 'sgd'", "training.optimizer = 'sgd'"),
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
