"""A site that is destroyed in mid-run goes on from a backup that was taken beside it at work."""

import json
import os
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from fedpeft_server.runs.directory import RoundRecord
from tests.integration.towns import CLINICS, SERVER, Town, town

ROUNDS = 6
SETTINGS = {
    "rounds": {
        "count": ROUNDS,
        "minimum_clinics": 3,
        "wait_s": 120,
        "gather_s": 2,
        "timeout_s": 30,
        "retries": 100,
    },
    "aggregation": {"confidentiality": "secagg", "adversary": "curious", "stage_timeout_s": 10},
    "privacy": {"unit": "patient", "noise_multiplier": 1.0},
}


def charged(made: Town, name: str) -> Counter[int]:
    """How many steps of each round the clinic's ledger was charged for."""
    (ledger,) = (made.root / name).glob("**/fedpeft-ledger.sqlite")
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT round FROM entries WHERE kind = 'charge'")
        return Counter(number for (number,) in rows)


def test_a_destroyed_site_goes_on_from_its_backup_and_clinics_come_back_by_themselves(
    tmp_path: Path, tiny_model: Path
) -> None:
    with town(tmp_path / "town", tiny_model, SETTINGS) as made:
        key, backup = tmp_path / "backup.key", tmp_path / "site.backup"
        key.write_bytes(os.urandom(32))
        made.until(lambda: 1 in made.finished())
        code, said = made.do(
            *("fedpeft-server", "backup", str(made.site), "--out", str(backup)),
            *("--key-file", str(key)),
        )
        assert code == 0, said
        assert made.code(SERVER) is None
        made.until(lambda: 4 in made.finished())
        before = made.digests(range(5))
        made.kill(SERVER)
        spent = {name: charged(made, name) for name in CLINICS}
        shutil.rmtree(made.site)

        code, said = made.do(
            *("fedpeft-server", "restore", str(backup), str(made.site), "--key-file", str(key))
        )
        assert code == 0, said
        assert f"enrolled again are: {', '.join(CLINICS)}" in said
        kept = made.digests(made.finished())
        last = max(kept)
        assert 1 <= last < 4
        assert kept == {number: before[number] for number in kept}
        made.start(SERVER)
        made.until(lambda: made.code(SERVER) is not None)

        assert made.code(SERVER) == 0, made.told(SERVER)
        assert made.digests(kept) == kept
        assert made.finished() == list(range(ROUNDS + 1))
        for number in range(1, ROUNDS + 1):
            content = (made.rounds / str(number) / "round.json").read_bytes()
            assert RoundRecord.model_validate_json(content).participants == CLINICS
        code, said = made.do("fedpeft-server", "verify", "--dir", str(made.site))
        assert code == 0, said
        # What was made again was spent again, and no ledger forgot the first time.
        for name in CLINICS:
            again = charged(made, name)
            assert all(again[number] == spent[name][number] for number in kept)
            for number in range(last + 1, 5):
                assert again[number] >= 2 * spent[name][number] > 0
        summary = json.loads((made.site / "run" / "summary.json").read_text())
        assert len(summary["rounds"]) == ROUNDS
