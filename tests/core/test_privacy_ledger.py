"""The privacy ledger: what is charged stays charged, whatever happens to the file or the data."""

import hashlib
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import BudgetSpent, DataError, LedgerDamaged, PrivacyError
from fedpeft.privacy import ledger as ledger_module
from fedpeft.privacy.accounting import epsilon_of
from fedpeft.privacy.charge import Charge
from fedpeft.privacy.ledger import Law, Ledger, RoundEntry, ledger_exists
from fedpeft.privacy.ledger_chain import Entry, anchor_path, entry_hash, read_anchor, write_anchor

STEP = Charge(noise="gaussian", sampling_rate=0.02, noise_multiplier=1.0)
NOISELESS = Charge(noise="none")
DELTA = 1e-5
PATIENTS = [f"patient-{number}" for number in range(20)]
ROUND = RoundEntry(federation="heart", run="run-1", round=1, unit="patient")
UNBOUND = Law(delta=DELTA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path) as opened:
        yield opened


def law(steps: int, step: Charge = STEP) -> Law:
    """Return a law under which ``steps`` of ``step`` just fit."""
    return Law(max_epsilon=epsilon_of({step: steps}, DELTA).epsilon * 1.0001, delta=DELTA)


def charged(ledger: Ledger, steps: int, entry: RoundEntry = ROUND, step: Charge = STEP) -> int:
    """Charge a round to the patients and return their data set."""
    dataset = ledger.dataset(PATIENTS).id
    budget = ledger.open_round(dataset, entry, step, steps, UNBOUND)
    for number in range(steps):
        budget.charge(number)
    return dataset


def tamper(path: Path, *statements: str) -> None:
    """Change the file as somebody would who knows SQLite, and put the triggers back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        query = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
        triggers = database.execute(query).fetchall()
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        for statement in (*statements, *(sql for _, sql in triggers)):
            database.execute(statement)


def test_a_new_ledger_is_private_and_intact(ledger: Ledger, path: Path) -> None:
    charged(ledger, 2)
    assert ledger.verify() == []
    assert path.stat().st_mode & 0o777 == 0o600
    assert anchor_path(path).stat().st_mode & 0o777 == 0o600


def test_charges_add_up_across_rounds_runs_and_restarts(path: Path) -> None:
    other = RoundEntry(federation="lung", run="run-2", round=7, unit="record")
    for entry, steps in ((ROUND, 3), (other, 2), (ROUND, 1)):
        with Ledger(path) as ledger:
            dataset = charged(ledger, steps, entry)
    with Ledger(path) as ledger:
        assert ledger.charges(dataset) == {STEP: 6}
        jobs = [(job.run, job.unit, job.rounds, job.steps) for job in ledger.jobs(dataset)]
        assert jobs == [("run-1", "patient", 1, 4), ("run-2", "record", 1, 2)]
        last = ledger.last_round(dataset)
    assert last is not None
    assert (last.entry, last.step, last.steps) == (ROUND, STEP, 3)


@given(q=st.floats(1e-6, 1.0), z=st.floats(0.1, 1e3))
@settings(max_examples=10, deadline=None)
def test_a_cost_is_kept_exactly(q: float, z: float) -> None:
    step = Charge(noise="gaussian", sampling_rate=q, noise_multiplier=z)
    with TemporaryDirectory() as folder, Ledger(Path(folder, "ledger.db")) as ledger:
        dataset = charged(ledger, 1, step=step)
        assert ledger.charges(dataset) == {step: 1}
        assert ledger.verify() == []


def test_a_negative_zero_does_not_break_the_chain(ledger: Ledger) -> None:
    dataset = charged(ledger, 1, step=replace(STEP, l1=-0.0))
    assert ledger.charges(dataset) == {STEP: 1}
    assert ledger.verify() == []


def test_a_clock_that_goes_backwards_changes_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = iter(range(23, -1, -1))
    monkeypatch.setattr(
        ledger_module, "now", lambda: f"2026-01-31T{next(hours):02}:00:00.000+00:00"
    )
    dataset, limit = charged(ledger, 3), law(4)
    budget = ledger.open_round(dataset, ROUND, STEP, 1, limit)
    budget.charge(3)
    with pytest.raises(BudgetSpent):
        ledger.open_round(dataset, ROUND, STEP, 1, limit)
    assert ledger.verify() == []
    (job,) = ledger.jobs(dataset)
    assert (job.first[11:13], job.last[11:13]) == ("20", "23")


class TestTheClinicsBound:
    def test_the_round_that_would_pass_it_is_refused_before_it_starts(self, ledger: Ledger) -> None:
        dataset, limit = charged(ledger, 60), law(100)
        ledger.open_round(dataset, ROUND, STEP, 40, limit)
        with pytest.raises(BudgetSpent, match=r"41 steps .* at most 40 such steps still fit"):
            ledger.open_round(dataset, ROUND, STEP, 41, limit)
        assert ledger.charges(dataset) == {STEP: 60}

    def test_it_is_per_data_set(self, ledger: Ledger) -> None:
        charged(ledger, 100)
        other = ledger.dataset(["someone else"])
        ledger.open_round(other.id, ROUND, STEP, 100, law(100))

    def test_a_round_without_noise_is_refused(self, ledger: Ledger) -> None:
        dataset = ledger.dataset(PATIENTS).id
        with pytest.raises(BudgetSpent, match="without noise, so no bound"):
            ledger.open_round(dataset, ROUND, NOISELESS, 1, law(100))

    def test_it_cannot_be_kept_after_training_without_noise(self, ledger: Ledger) -> None:
        dataset = charged(ledger, 1, step=NOISELESS)
        with pytest.raises(BudgetSpent, match="without noise before"):
            ledger.open_round(dataset, ROUND, STEP, 1, law(100))
        ledger.open_round(dataset, ROUND, STEP, 1, UNBOUND)

    def test_steps_beyond_the_round_are_checked_one_by_one(self, ledger: Ledger) -> None:
        dataset = ledger.dataset(PATIENTS).id
        budget = ledger.open_round(dataset, ROUND, STEP, 1, law(3))
        for step in range(3):
            budget.charge(step)
        with pytest.raises(BudgetSpent):
            budget.charge(3)
        assert ledger.charges(dataset) == {STEP: 3}

    def test_what_others_charge_meanwhile_counts(self, path: Path) -> None:
        with Ledger(path) as one, Ledger(path) as two:
            dataset = one.dataset(PATIENTS).id
            first = one.open_round(dataset, ROUND, STEP, 3, law(4))
            second = two.open_round(dataset, ROUND, STEP, 3, law(4))
            first.charge(0)
            second.charge(0)
            first.charge(1)
            with pytest.raises(BudgetSpent):
                second.charge(1)
            first.charge(2)
            assert one.charges(dataset) == {STEP: 4}

    def test_a_merge_meanwhile_counts(self, path: Path) -> None:
        with Ledger(path) as one, Ledger(path) as two:
            charged(one, 3)
            other = two.dataset(["someone else"]).id
            budget = two.open_round(other, ROUND, STEP, 3, law(4))
            one.dataset([PATIENTS[0], "someone else"])
            with pytest.raises(BudgetSpent):
                budget.charge(0)

    def test_asking_takes_less_than_50_ms_after_10_000_steps(self, ledger: Ledger) -> None:
        dataset, file = charged(ledger, 1), ledger._file
        budget = ledger.open_round(dataset, ROUND, STEP, 1, UNBOUND)
        with file.transaction("IMMEDIATE"):
            for number in range(10_000):
                file.append(budget._row(number)._replace(run=f"run-{number // 2000}"))
        limit = law(11_000)
        ledger.open_round(dataset, ROUND, STEP, 100, limit)
        seconds: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            ledger.open_round(dataset, ROUND, STEP, 100, limit)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.05

    def test_a_cost_without_meaning_is_not_charged(self, ledger: Ledger) -> None:
        dataset = ledger.dataset(PATIENTS).id
        for step in (
            Charge(noise="gaussian", sampling_rate=0.0, noise_multiplier=1.0),
            Charge(noise="gaussian", sampling_rate=1.1, noise_multiplier=1.0),
            Charge(noise="gaussian", noise_multiplier=0.0),
            Charge(noise="gaussian", noise_multiplier=math.nan),
            Charge(noise="none", noise_multiplier=1.0),
            Charge(noise="skellam", noise_multiplier=1.0),
        ):
            with pytest.raises(PrivacyError):
                ledger.open_round(dataset, ROUND, step, 1, UNBOUND)


class TestTheDataSet:
    def test_the_same_units_are_the_same_set_in_any_order(self, ledger: Ledger) -> None:
        first = ledger.dataset(PATIENTS)
        again = ledger.dataset(reversed(PATIENTS))
        assert (first.new, first.known, first.added) == (True, 0, 20)
        assert (again.id, again.new, again.known, again.added) == (first.id, False, 20, 0)

    def test_one_unit_in_common_is_enough_and_the_others_are_added(self, ledger: Ledger) -> None:
        dataset = charged(ledger, 2)
        grown = ledger.dataset([PATIENTS[0], "new-1", "new-2"])
        assert (grown.id, grown.new, grown.known, grown.added) == (dataset, False, 1, 2)
        assert ledger.dataset(["new-2"]).id == dataset
        assert [known.units for known in ledger.datasets()] == [22]

    def test_a_new_set_says_so_and_has_spent_nothing(self, ledger: Ledger) -> None:
        dataset = charged(ledger, 2)
        other = ledger.dataset(["someone else"])
        assert other.new
        assert other.id != dataset
        assert ledger.charges(other.id) == {}

    def test_units_of_several_sets_merge_them_with_their_charges(self, ledger: Ledger) -> None:
        dataset = charged(ledger, 2)
        second, third = ledger.dataset(["b"]).id, ledger.dataset(["c"]).id
        ledger.open_round(third, ROUND, NOISELESS, 1, UNBOUND).charge(0)
        assert ledger.dataset(["b", "c"]).merged == (third,)
        merged = ledger.dataset(["c", PATIENTS[0], "d"])
        assert (merged.id, merged.merged, merged.added) == (dataset, (second,), 1)
        for part in (dataset, second, third):
            assert ledger.charges(part) == {STEP: 2, NOISELESS: 1}
        assert [(known.id, known.units) for known in ledger.datasets()] == [(dataset, 23)]
        assert ledger.verify() == []

    def test_a_renamed_ledger_still_knows_its_data(self, ledger: Ledger, path: Path) -> None:
        dataset = charged(ledger, 2)
        moved = path.with_name("moved.db")
        path.rename(moved)
        anchor_path(path).rename(anchor_path(moved))
        with Ledger(moved) as again:
            assert again.dataset(PATIENTS).id == dataset
            assert again.charges(dataset) == {STEP: 2}

    def test_no_unit_can_be_read_in_any_file(self, ledger: Ledger, path: Path) -> None:
        charged(ledger, 2)
        plain = hashlib.sha256(PATIENTS[7].encode()).digest()[:16]
        for file in path.parent.iterdir():
            assert b"patient-" not in file.read_bytes()
            assert plain not in file.read_bytes()

    def test_100_000_units_take_less_than_2_s(self, ledger: Ledger) -> None:
        units = [f"patient-{number}" for number in range(100_000)]
        for _ in range(2):
            start = time.perf_counter()
            ledger.dataset(units)
            assert time.perf_counter() - start < 2

    def test_no_units_are_no_data_set(self, ledger: Ledger) -> None:
        with pytest.raises(DataError, match="without records"):
            ledger.dataset([])


class TestVerify:
    @pytest.mark.parametrize("field", (*Entry._fields, "previous", "hash"))
    def test_an_edited_field_is_found(self, ledger: Ledger, path: Path, field: str) -> None:
        charged(ledger, 3)
        # A digit more is another value for text and for numbers.
        tamper(path, f"UPDATE entries SET {field} = {field} || '1' WHERE seq = 4")
        assert "row 4 was changed" in ledger.verify()

    def test_a_missing_row_is_found(self, ledger: Ledger, path: Path) -> None:
        charged(ledger, 4)
        tamper(path, "DELETE FROM entries WHERE seq = 4")
        assert ledger.verify() == ["a row is missing after row 3"]

    def test_a_missing_row_is_found_although_the_rest_moved_up(
        self, ledger: Ledger, path: Path
    ) -> None:
        charged(ledger, 4)
        moved = (f"UPDATE entries SET seq = {seq - 1} WHERE seq = {seq}" for seq in (5, 6))
        tamper(path, "DELETE FROM entries WHERE seq = 4", *moved)
        assert "row 4 does not follow row 3: rows were reordered or replaced" in ledger.verify()

    def test_reordered_rows_are_found(self, ledger: Ledger, path: Path) -> None:
        charged(ledger, 4)
        swap = "UPDATE entries SET seq = {} WHERE seq = {}"
        tamper(path, swap.format(-1, 4), swap.format(4, 5), swap.format(5, -1))
        assert ledger.verify()[0] == (
            "row 4 does not follow row 3: rows were reordered or replaced"
        )

    def test_missing_last_rows_are_found(self, ledger: Ledger, path: Path) -> None:
        charged(ledger, 4)
        tamper(path, "DELETE FROM entries WHERE seq > 4")
        assert ledger.verify() == [
            "the last rows are missing: the table ends with row 4, the anchor file with row 6"
        ]

    def test_a_row_of_another_ledger_is_found(self, ledger: Ledger, path: Path) -> None:
        charged(ledger, 2)
        other = path.with_name("other.db")
        with Ledger(other) as foreign:
            charged(foreign, 3)
        tamper(
            path,
            f"ATTACH '{other}' AS other",
            "INSERT INTO entries SELECT * FROM other.entries WHERE seq = 5",
        )
        assert ledger.verify() == ["row 5 does not follow row 4: rows were reordered or replaced"]

    def test_another_anchor_is_found(self, ledger: Ledger, path: Path) -> None:
        charged(ledger, 2)
        anchor = read_anchor(anchor_path(path))
        assert anchor is not None
        write_anchor(anchor_path(path), anchor._replace(hash="0" * 64))
        assert ledger.verify() == ["row 4 is not the one that the anchor file names"]
        anchor_path(path).write_text("{}")
        assert "does not hold the end of a ledger" in ledger.verify()[0]
        anchor_path(path).unlink()
        assert ledger.verify() == ["the anchor file is missing, so rows may be missing at the end"]

    @pytest.mark.parametrize(
        ("statement", "problem"),
        [
            ("DELETE FROM units WHERE hash = (SELECT min(hash) FROM units)", "units of data set 1"),
            ("DELETE FROM units", "units of data set 1"),
            ("UPDATE units SET entry = 3", "units of data set 1"),
            ("INSERT INTO units VALUES (x'00', 3)", "1 units name row 3"),
            ("UPDATE secret SET key = randomblob(32)", "key of the data identity is not"),
            ("DELETE FROM secret", "key of the data identity is missing"),
            ("CREATE VIEW more AS SELECT 1", "more is not the one of this ledger format"),
        ],
    )
    def test_a_changed_identity_is_found(
        self, ledger: Ledger, path: Path, statement: str, problem: str
    ) -> None:
        charged(ledger, 2)
        tamper(path, statement)
        assert problem in " ".join(ledger.verify())

    def test_a_missing_trigger_is_found(self, ledger: Ledger, path: Path) -> None:
        with closing(sqlite3.connect(path)) as database:
            database.execute("DROP TRIGGER entries_delete")
        assert "entries_delete is not the one" in ledger.verify()[0]

    def test_nothing_runs_on_a_changed_ledger(self, ledger: Ledger, path: Path) -> None:
        dataset = charged(ledger, 4)
        ledger.open_round(dataset, ROUND, STEP, 1, UNBOUND)
        tamper(path, "DELETE FROM entries WHERE seq = 6")
        with pytest.raises(LedgerDamaged, match="the last rows are missing"):
            ledger.open_round(dataset, ROUND, STEP, 1, UNBOUND)
        tamper(path, "UPDATE entries SET noise_multiplier = 9 WHERE seq = 4")
        with Ledger(path) as again, pytest.raises(LedgerDamaged, match="row 4 was changed"):
            again.dataset(PATIENTS)

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE entries SET step = 9",
            "UPDATE units SET entry = 1",
            "UPDATE secret SET key = x'00'",
            "DELETE FROM entries",
            "DELETE FROM units",
            "DELETE FROM secret",
            "REPLACE INTO entries SELECT * FROM entries WHERE seq = 2",
        ],
    )
    def test_rows_are_append_only(self, ledger: Ledger, path: Path, statement: str) -> None:
        charged(ledger, 2)
        with (
            closing(sqlite3.connect(path)) as database,
            pytest.raises(sqlite3.IntegrityError, match="append"),
        ):
            database.execute(statement)

    def test_a_ledger_that_is_gone_is_not_started_anew(self, ledger: Ledger, path: Path) -> None:
        charged(ledger, 2)
        path.unlink()
        assert ledger_exists(path)
        with pytest.raises(LedgerDamaged, match="is gone or empty"):
            Ledger(path)

    def test_the_hash_is_the_documented_one(self) -> None:
        entry = Entry("charge", "2026-01-31T12:00:00.000+00:00", 1, run="é", sampling_rate=0.5)
        fields = b"6:charge,29:2026-01-31T12:00:00.000+00:00,1:1,1:0,1:0,0:,0:,2:\xc3\xa9,1:0,1:0,"
        fields += b"0:,0:,20:0x1.0000000000000p-1," + b"8:0x0.0p+0," * 3
        text = b"16:fedpeft-ledger-1,64:" + b"0" * 64 + b"," + fields
        assert entry_hash("0" * 64, entry) == hashlib.sha256(text).hexdigest()

    @given(st.text(), st.text(), st.text(), st.text())
    def test_no_two_rows_read_the_same(self, a: str, b: str, c: str, d: str) -> None:
        one, two = (Entry("charge", "", run=x, unit=y) for x, y in ((a, b), (c, d)))
        assert (entry_hash("", one) == entry_hash("", two)) == (one == two)
