"""What the demo promises: honest splits, facts of one clinic only, a small loadable model."""

import re
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpeft.data import Record, read_records
from fedpeft.demo import clinics, language
from fedpeft.demo.clinics import DemoClinic, write_federation

BASE = Path(clinics.__file__).parent / "base"
SPLITS = ("train", "valid", "heldout")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoClinic, ...]:
    return write_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def records(clinic: DemoClinic, split: str) -> tuple[Record, ...]:
    return read_records(getattr(clinic, split)).records


def all_records(clinic: DemoClinic) -> list[Record]:
    return [record for split in SPLITS for record in records(clinic, split)]


def question(record: Record) -> str:
    return record.turns[0].text


def drugs(clinic: DemoClinic) -> set[str]:
    words = {w for r in all_records(clinic) for w in re.findall(r"[A-Z][a-z]+", question(r))}
    known = re.findall(r"[A-Z][a-z]+", repr(language.ATTRIBUTES) + repr(language.OPENERS))
    known += re.findall(
        r"[A-Z][a-z]+", repr(language.PARAPHRASE_OPENERS) + repr(language.NOTE_REQUESTS)
    )
    return words - set(known)


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_same_seed_gives_same_bytes(tmp_path: Path) -> None:
    write_federation(tmp_path / "a", seed=5)
    write_federation(tmp_path / "b", seed=5)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_another_seed_gives_other_facts(tmp_path: Path) -> None:
    write_federation(tmp_path / "a", seed=5)
    write_federation(tmp_path / "b", seed=6)
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert len(first) == 12
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


def test_every_clinic_has_its_own_layout(federation: tuple[DemoClinic, ...]) -> None:
    assert {clinic.train.suffix for clinic in federation} == {".jsonl", ".csv", ".json", ".parquet"}
    assert len({read_records(clinic.train).format for clinic in federation}) == 4


def test_largest_training_set_is_five_times_the_smallest(
    federation: tuple[DemoClinic, ...],
) -> None:
    rows = [len(records(clinic, "train")) for clinic in federation]
    assert rows == [clinic.train_rows for clinic in federation]
    assert max(rows) == 5 * min(rows)


def test_a_drug_occurs_in_one_clinic_only(federation: tuple[DemoClinic, ...]) -> None:
    formularies = [drugs(clinic) for clinic in federation]
    assert [len(formulary) for formulary in formularies] == [clinics.DRUGS_PER_CLINIC] * 4
    for one, other in combinations(formularies, 2):
        assert not one & other


def test_pretraining_uses_no_name_of_a_clinic(federation: tuple[DemoClinic, ...]) -> None:
    assert all(language.is_clinic_name(drug) for clinic in federation for drug in drugs(clinic))


def test_every_heldout_fact_is_taught_in_training(federation: tuple[DemoClinic, ...]) -> None:
    for clinic in federation:
        names = drugs(clinic)
        taught = {
            (drug, r.turns[1].text)
            for r in records(clinic, "train")
            for drug in names
            if drug in question(r)
        }
        for record in records(clinic, "heldout"):
            (drug,) = (name for name in names if name in question(record))
            assert (drug, record.turns[1].text) in taught


def test_heldout_wordings_never_occur_in_training(federation: tuple[DemoClinic, ...]) -> None:
    wordings = [wording for a in language.ATTRIBUTES for wording in a.paraphrases]
    for clinic in federation:
        trained = " | ".join(question(r) for s in ("train", "valid") for r in records(clinic, s))
        for drug in drugs(clinic):
            assert not any(wording.format(drug=drug) in trained for wording in wordings)
        assert not any(question(record) in trained for record in records(clinic, "heldout"))


def test_heldout_questions_are_spread_equally(federation: tuple[DemoClinic, ...]) -> None:
    assert len({len(records(clinic, "heldout")) for clinic in federation}) == 1


def test_no_patient_is_in_two_splits_or_clinics(federation: tuple[DemoClinic, ...]) -> None:
    groups = [{r.patient_id for r in records(c, s)} for c in federation for s in SPLITS]
    assert not any(None in group for group in groups)
    assert len(set[str | None]().union(*groups)) == sum(len(group) for group in groups)


def test_patients_have_several_records(federation: tuple[DemoClinic, ...]) -> None:
    for clinic in federation:
        train = records(clinic, "train")
        assert len({record.patient_id for record in train}) < len(train) / 3


def test_base_model_loads_and_is_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert (BASE / "model.safetensors").stat().st_size <= 8_000_000


def test_chat_template_renders_each_prefix_of_a_conversation(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Which ward gives Velarin?"},
        {"role": "assistant", "content": "7B"},
        {"role": "user", "content": " And when? "},
        {"role": "assistant", "content": "06:45"},
    ]

    def render(count: int, *, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )

    for count in range(1, len(messages)):
        answered = messages[count]["role"] == "assistant"
        assert render(count + 1, prompt=False).startswith(render(count, prompt=answered))
    assert render(len(messages), prompt=False).endswith(tokenizer.eos_token)


def test_no_record_of_the_demo_is_cut(federation: tuple[DemoClinic, ...], tokenizer) -> None:
    from fedpeft.data import encode

    for clinic in federation:
        for split in SPLITS:
            encoded = encode(read_records(getattr(clinic, split)), tokenizer, max_length=96)
            assert encoded.truncated == 0
