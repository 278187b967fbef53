"""The audit log: what is written is found whole, and what was done to it is found too."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft.audit_log import (
    AuditLog,
    Choice,
    Kind,
    Verdict,
    all_lines,
    entries_in,
    entry_text,
    export,
    note_handover,
    read_export,
    verdict_lines,
    verify,
    word,
)
from fedpeft.errors import AuditLogDamaged, StorageError
from fedpeft.privacy.ledger_chain import Anchor
from fedpeft.sealing import Identity

KEEPER, OTHER = Identity.generate(), Identity.generate()
SENT = {"with": "server", "type": "train", "round": 1, "bytes": 7, "sha256": "ab" * 32}


def filled(directory: Path, entries: int = 10, **options: object) -> AuditLog:
    log = AuditLog(directory, signer=KEEPER, **options)  # type: ignore[arg-type]
    for number in range(entries):
        log.append("message-out", {**SENT, "round": number})
    return log


def checked(directory: Path) -> Verdict:
    return verify(directory)


def signatures_checked(directory: Path) -> Verdict:
    return verify(directory, identity=KEEPER.public)


def segment(directory: Path, number: int = 1) -> Path:
    return directory / f"{number:06d}.jsonl"


def lines(directory: Path, number: int = 1) -> list[bytes]:
    return segment(directory, number).read_bytes().splitlines(keepends=True)


def rewrite(directory: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    segment(directory).write_bytes(b"".join(change(lines(directory))))


def reforged(line: bytes, **changes: object) -> bytes:
    """A line with another content whose own hash fits again, as a forger writes it."""
    import hashlib

    content = {**json.loads(line), **changes}
    del content["hash"]

    def encode(what: dict[str, object]) -> bytes:
        return json.dumps(what, sort_keys=True, separators=(",", ":")).encode()

    digest = hashlib.sha256(b"fedpeft-audit-1\n" + encode(content)).hexdigest()
    return encode({**content, "hash": digest}) + b"\n"


# What may stand in it


@pytest.mark.parametrize(
    "about",
    [
        {"reason": "the patient asks about her tablets"},
        {"reason": "two\nlines"},
        {"reason": "é"},
        {"reason": "x" * 257},
        {"text": "unknown"},
        {"bytes": float("nan")},
        {"bytes": [1]},
    ],
)
def test_a_sentence_or_an_unknown_field_does_not_fit_into_a_line(
    tmp_path: Path, about: dict[str, object]
):
    log = AuditLog(tmp_path / "audit")
    with pytest.raises(ValueError, match="audit entry"):
        log.append("message-out", about)  # type: ignore[arg-type]
    assert checked(tmp_path / "audit").entries == 0


def test_what_another_machine_says_is_made_a_word():
    assert word("a b\n\x1b[31mé") == "a?b??[31m?"
    assert len(word("x" * 1000)) == 64


# What is found


def test_a_whole_log_is_found_whole(tmp_path: Path):
    filled(tmp_path / "audit").checkpoint()
    verdict = signatures_checked(tmp_path / "audit")
    assert verdict.problems == ()
    assert (verdict.entries, verdict.signed, verdict.end.seq) == (11, 10, 11)
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert segment(tmp_path / "audit").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("at", range(10))
def test_an_edited_line_is_found_wherever_it_is(tmp_path: Path, at: int):
    filled(tmp_path / "audit")

    def change(old: list[bytes]) -> list[bytes]:
        old[at] = old[at].replace(b'"bytes":7', b'"bytes":8')
        return old

    rewrite(tmp_path / "audit", change)
    (problem,) = checked(tmp_path / "audit").problems
    assert "was changed" in problem
    assert f"entry {at + 1}" in problem


@pytest.mark.parametrize("at", range(9))
def test_an_edited_line_whose_hash_was_made_to_fit_breaks_the_chain(tmp_path: Path, at: int):
    filled(tmp_path / "audit")

    def change(old: list[bytes]) -> list[bytes]:
        about = {**json.loads(old[at])["about"], "bytes": 8}
        old[at] = reforged(old[at], about=about)
        return old

    rewrite(tmp_path / "audit", change)
    (problem,) = checked(tmp_path / "audit").problems
    assert "does not follow" in problem
    assert f"entry {at + 2}" in problem


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("at", [0, 4])
def test_missing_lines_are_counted(tmp_path: Path, at: int, count: int):
    filled(tmp_path / "audit")
    rewrite(tmp_path / "audit", lambda old: [*old[:at], *old[at + count :]])
    assert any(
        text.startswith(f"{count} entries are missing")
        for text in checked(tmp_path / "audit").problems
    )


def test_reordered_and_doubled_lines_are_found(tmp_path: Path):
    filled(tmp_path / "one")
    rewrite(tmp_path / "one", lambda old: [*old[:3], old[4], old[3], *old[5:]])
    assert checked(tmp_path / "one").problems
    filled(tmp_path / "two")
    rewrite(tmp_path / "two", lambda old: [*old[:3], old[2], *old[3:]])
    (problem,) = checked(tmp_path / "two").problems
    assert "reordered, replaced or added" in problem


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"{}\n", b"nonsense\n", b"\x00" * 40 + b"\n", b"[" * 5000 + b"\n", b"9" * 5000 + b"\n"],
)
def test_a_line_that_is_no_entry_is_found(tmp_path: Path, garbage: bytes):
    filled(tmp_path / "audit")
    rewrite(tmp_path / "audit", lambda old: [*old[:5], garbage, *old[6:]])
    (problem,) = checked(tmp_path / "audit").problems
    assert problem.startswith("000001.jsonl, line 6 is no entry")


def test_the_same_entry_written_in_another_way_is_found(tmp_path: Path):
    filled(tmp_path / "audit")
    rewrite(
        tmp_path / "audit",
        lambda old: [*old[:5], old[5].replace(b'{"about"', b'{ "about"'), *old[6:]],
    )
    assert checked(tmp_path / "audit").problems


@pytest.mark.parametrize("left", [0, 1, 5, 9])
def test_a_log_cut_off_at_the_end_is_found(tmp_path: Path, left: int):
    filled(tmp_path / "audit")
    rewrite(tmp_path / "audit", lambda old: old[:left])
    (problem,) = checked(tmp_path / "audit").problems
    assert problem.startswith("the last entries are missing")
    with pytest.raises(AuditLogDamaged):
        AuditLog(tmp_path / "audit")


def test_a_log_cut_off_behind_a_checkpoint_with_its_end_made_to_fit_needs_an_end_kept_elsewhere(
    tmp_path: Path,
):
    log = filled(tmp_path / "audit")
    first = log.checkpoint()
    for _ in range(5):
        log.append("message-out", SENT)
    kept = log.checkpoint()
    (tmp_path / "audit" / "end").unlink()
    rewrite(tmp_path / "audit", lambda old: old[: first.seq])
    from fedpeft.privacy.ledger_chain import write_anchor

    write_anchor(tmp_path / "audit" / "end", first)
    assert signatures_checked(tmp_path / "audit").problems == ()  # as the documents say
    verdict = verify(tmp_path / "audit", identity=KEEPER.public, kept=kept)
    (problem,) = verdict.problems
    assert "an end that was kept elsewhere names entry 17" in problem
    assert "copy of the whole folder" in verdict_lines(verdict)[-1]


def test_an_end_kept_elsewhere_fits_a_log_that_grew_from_it_and_no_other(tmp_path: Path):
    log = filled(tmp_path / "audit", 4)
    kept = log.end
    log.append("message-out", SENT)
    assert verify(tmp_path / "audit", kept=kept).problems == ()
    assert verify(tmp_path / "audit", kept=Anchor(kept.seq, "00" * 32)).problems


def test_a_missing_end_file_is_found(tmp_path: Path):
    filled(tmp_path / "audit")
    (tmp_path / "audit" / "end").unlink()
    (problem,) = checked(tmp_path / "audit").problems
    assert "'end' is missing" in problem
    with pytest.raises(AuditLogDamaged):
        AuditLog(tmp_path / "audit")


def test_a_log_that_was_removed_is_not_begun_anew_beside_its_end(tmp_path: Path):
    filled(tmp_path / "audit")
    segment(tmp_path / "audit").unlink()
    assert checked(tmp_path / "audit").problems
    with pytest.raises(AuditLogDamaged, match="files are gone"):
        AuditLog(tmp_path / "audit")


# Checkpoints


def test_a_log_that_nobody_has_signed_is_found_but_one_of_a_box_that_only_joined_is_whole(
    tmp_path: Path,
):
    log = AuditLog(tmp_path / "audit")
    log.append("key", {"event": "joined"})
    assert signatures_checked(tmp_path / "audit").problems == ()
    log.append("message-out", SENT)
    (problem,) = signatures_checked(tmp_path / "audit").problems
    assert "nothing in this log is signed" in problem


def test_a_whole_log_written_anew_by_somebody_else_is_found(tmp_path: Path):
    log = AuditLog(tmp_path / "audit", signer=OTHER)
    log.append("message-out", SENT)
    log.checkpoint()
    problem, nothing = signatures_checked(tmp_path / "audit").problems
    assert "was not signed by the keeper" in problem
    assert "nothing in this log is signed" in nothing
    assert signatures_checked(tmp_path / "audit").signed == 0


def test_a_checkpoint_with_a_key_put_in_is_found(tmp_path: Path):
    filled(tmp_path / "audit").checkpoint()

    def change(old: list[bytes]) -> list[bytes]:
        about = json.loads(old[-1])["about"]
        about["key"] = OTHER.public.signing_bytes.hex()
        return [*old[:-1], reforged(old[-1], about=about)]

    rewrite(tmp_path / "audit", change)
    assert any("not signed by the key" in text for text in checked(tmp_path / "audit").problems)


def test_the_keeper_signs_by_itself_after_so_many_entries(tmp_path: Path):
    filled(tmp_path / "audit", 12, checkpoint_every=5)
    kinds = [json.loads(line)["kind"] for line in lines(tmp_path / "audit")]
    assert [at for at, kind in enumerate(kinds) if kind == "checkpoint"] == [5, 11]


def test_a_renewed_identity_vouches_for_the_one_before_and_nobody_else(tmp_path: Path):
    filled(tmp_path / "audit").checkpoint()
    note_handover(tmp_path / "audit", KEEPER.public, OTHER, "northfield")
    assert verify(tmp_path / "audit", identity=OTHER.public).problems == ()
    third = Identity.generate()
    log = AuditLog(tmp_path / "audit", signer=third)
    log.append("message-out", SENT)
    log.checkpoint()
    assert len(verify(tmp_path / "audit", identity=OTHER.public).problems) == 1
    # The thief's own word for it counts for nothing.
    note_handover(tmp_path / "audit", OTHER.public, third, "northfield")
    assert verify(tmp_path / "audit", identity=OTHER.public).problems


# Files


def test_the_chain_goes_on_over_files_and_each_ends_with_a_checkpoint(tmp_path: Path):
    filled(tmp_path / "audit", 40, rotate_bytes=3000)
    verdict = signatures_checked(tmp_path / "audit")
    assert verdict.problems == ()
    assert verdict.files > 3
    for number in range(1, verdict.files):
        assert json.loads(lines(tmp_path / "audit", number)[-1])["kind"] == "checkpoint"
    rounds = [
        one.about["round"]
        for one in entries_in(all_lines(tmp_path / "audit"), Choice(kind="message-out"))
    ]
    assert rounds == list(range(40))
    log = AuditLog(tmp_path / "audit", signer=KEEPER, rotate_bytes=3000)
    log.append("message-out", SENT)
    assert checked(tmp_path / "audit").problems == ()


@pytest.mark.parametrize("number", [1, 2])
def test_a_missing_file_is_found(tmp_path: Path, number: int):
    filled(tmp_path / "audit", 40, rotate_bytes=3000)
    segment(tmp_path / "audit", number).unlink()
    problems = checked(tmp_path / "audit").problems
    assert f"the file {number:06d}.jsonl is missing" in problems


# Power, disks and processes


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_line_torn_by_a_power_cut_is_cut_away_and_an_entry_says_so(tmp_path: Path, cut: int):
    filled(tmp_path / "audit", 3)
    torn = lines(tmp_path / "audit")[-1][:-cut]
    with segment(tmp_path / "audit").open("ab") as file:
        file.write(torn)
    before = checked(tmp_path / "audit")
    assert (before.problems, before.torn) == ((), len(torn))
    log = AuditLog(tmp_path / "audit", signer=KEEPER)
    assert log.repaired_bytes == len(torn)
    last = json.loads(lines(tmp_path / "audit")[-1])
    assert (last["kind"], last["about"]) == ("repair", {"bytes": len(torn)})
    log.append("message-out", SENT)
    assert checked(tmp_path / "audit").problems == ()


def test_a_line_that_was_acknowledged_and_is_torn_is_no_power_cut(tmp_path: Path):
    filled(tmp_path / "audit", 3)
    rewrite(tmp_path / "audit", lambda old: [*old[:-1], old[-1][:-5]])
    assert checked(tmp_path / "audit").problems
    with pytest.raises(AuditLogDamaged):
        AuditLog(tmp_path / "audit")


def test_a_file_begun_by_a_killed_process_is_used(tmp_path: Path):
    filled(tmp_path / "audit", 3)
    segment(tmp_path / "audit", 2).touch()
    log = AuditLog(tmp_path / "audit")
    log.append("message-out", SENT)
    assert checked(tmp_path / "audit").problems == ()


def test_an_end_that_a_crash_left_behind_is_no_problem(tmp_path: Path):
    log = filled(tmp_path / "audit", 3)
    end = (tmp_path / "audit" / "end").read_bytes()
    log.append("message-out", SENT)
    (tmp_path / "audit" / "end").write_bytes(end)
    assert checked(tmp_path / "audit").problems == ()
    AuditLog(tmp_path / "audit").append("message-out", SENT)
    assert checked(tmp_path / "audit").problems == ()


def _append_many(directory: Path, name: str) -> None:
    log = AuditLog(directory, signer=KEEPER, rotate_bytes=8000)
    for number in range(60):
        log.append("key", {"event": name, "name": str(number)})


def test_processes_that_append_at_once_make_one_chain(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=_append_many, args=(tmp_path / "audit", name)) for name in "abc"
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0, 0]
    verdict = checked(tmp_path / "audit")
    assert verdict.problems == ()
    for name in "abc":
        found = [
            one.about["name"]
            for one in entries_in(all_lines(tmp_path / "audit"), Choice(kind="key"))
            if one.about["event"] == name
        ]
        assert found == [str(number) for number in range(60)]


_KILLED = """
import sys
from pathlib import Path
from fedpeft.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
for number in range(100000):
    place = log.append("message-out", {"round": number})
    print(place.seq, flush=True)
"""


def test_what_append_has_returned_for_survives_a_kill(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path / "audit")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        seen += [int(line) for line in process.stdout if line.endswith("\n")]
    AuditLog(tmp_path / "audit")
    verdict = checked(tmp_path / "audit")
    assert verdict.problems == ()
    assert verdict.end.seq >= seen[-1]


_FULL = """
import resource, signal, sys
from pathlib import Path
from fedpeft.audit_log import AuditLog
from fedpeft.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AuditLog(Path(sys.argv[1]))
size = (Path(sys.argv[1]) / "000001.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
try:
    log.append("message-out", {"round": 99})
except StorageError as error:
    print(error)
"""


def test_a_full_disk_is_said_and_leaves_the_log_whole(tmp_path: Path):
    log = filled(tmp_path / "audit", 3)
    before = segment(tmp_path / "audit").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "audit")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "what is not logged is not done" in done.stdout
    assert segment(tmp_path / "audit").read_bytes() == before
    log.append("message-out", SENT)
    assert checked(tmp_path / "audit").problems == ()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(tmp_path: Path):
    log = filled(tmp_path / "audit", 3)
    segment(tmp_path / "audit").chmod(0o400)
    with pytest.raises(StorageError, match="what is not logged is not done"):
        log.append("message-out", SENT)


# Export and display


def test_an_export_is_checked_as_the_log_is(tmp_path: Path):
    filled(tmp_path / "audit", 40, rotate_bytes=3000).checkpoint()
    export(tmp_path / "audit", tmp_path / "out", name="northfield", identity=KEEPER.public)
    found = read_export(tmp_path / "out")
    assert (found.name, found.identity) == ("northfield", KEEPER.public)
    assert found.verify().problems == ()
    data = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    for broken in (data[:-1], [*data[:5], *data[6:]], [*data[:3], data[4], data[3], *data[5:]]):
        (tmp_path / "out").write_bytes(b"".join(broken))
        assert read_export(tmp_path / "out").verify().problems


@pytest.mark.parametrize("content", [b"", b"{}\n", b"nonsense", b'{"schema": 2}\n', b"\x00\xff"])
def test_what_is_no_export_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "out").write_bytes(content)
    with pytest.raises(AuditLogDamaged, match="no exported audit log"):
        read_export(tmp_path / "out")


def test_entries_are_chosen_by_day_run_and_kind(tmp_path: Path):
    import datetime

    times = iter([f"2026-01-0{day}T10:00:00.000+00:00" for day in (1, 2, 3)])
    log = AuditLog(tmp_path / "audit", clock=lambda: next(times))
    for kind, run in (("message-out", "7"), ("message-in", "7"), ("message-out", "8")):
        log.append(_kind(kind), {"run": run})
    second = datetime.date(2026, 1, 2)

    def chosen(choice: Choice) -> list[int]:
        return [one.seq for one in entries_in(all_lines(tmp_path / "audit"), choice)]

    assert chosen(Choice(since=second)) == [2, 3]
    assert chosen(Choice(until=second)) == [1, 2]
    assert chosen(Choice(run="7", kind="message-out")) == [1]
    (first, *_) = entries_in(all_lines(tmp_path / "audit"), Choice())
    assert entry_text(first) == "1\t2026-01-01T10:00:00.000+00:00\tmessage-out\trun=7"


def _kind(text: str) -> Kind:
    return "message-in" if text == "message-in" else "message-out"
