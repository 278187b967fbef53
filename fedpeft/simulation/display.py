"""What a person sees while a simulation runs: a bar on a terminal, lines elsewhere."""

import contextlib
from collections.abc import Generator

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedpeft.console import people
from fedpeft.training import StepDone
from fedpeft_server.rounds.narration import (
    doing_of,
    failure_sentences,
    privacy_sentences,
    round_sentence,
)
from fedpeft_server.runs.directory import RoundRecord


class Stage:
    """One bar: rounds of training, counted in clinics' rounds of work."""

    def __init__(self, progress: Progress, task: TaskID, rounds: int, *, quiet: bool) -> None:
        self._progress = progress
        self._task = task
        self._rounds = rounds
        self._quiet = quiet

    def observe(self, step: StepDone) -> None:
        """Show one training step."""
        doing = (
            f"round {step.place.round}/{self._rounds} · {step.place.clinic} · "
            f"loss {step.loss:.3f} · {step.tokens_per_s:,.0f} tokens/s"
        )
        self._progress.update(self._task, advance=1 / step.steps, doing=doing)

    def tell(self, sentence: str) -> None:
        """Show what was read from a clinic's file."""
        if not self._quiet:
            self._tell(sentence)

    def waiting(self, connected: int, enrolled: int, minimum: int) -> None:
        """Show that clinics are still missing."""
        self._tell(f"{connected} of {enrolled} clinics connected, {minimum} are needed")

    def asked(self, number: int, kind: str, clinics: list[str]) -> None:
        """Show what the clinics are doing."""
        if verb := doing_of(kind):
            doing = f"round {number}/{self._rounds} · {len(clinics)} clinics {verb}"
            self._progress.update(self._task, doing=doing)

    def warned(self, sentence: str) -> None:
        """Show what should be known before the run goes on."""
        self._tell(f"warning: {sentence}")

    def round_repeated(self, number: int, why: str) -> None:
        """Show that a round has to be repeated."""
        self._tell(f"round {number} is repeated: {why}")

    def round_finished(self, record: RoundRecord) -> None:
        """Show a finished round."""
        if record.round:
            clinics = len(record.participants)
            done = record.round * (clinics + len(record.failed))
            self._progress.update(self._task, completed=done)
        if not self._quiet:
            self._tell(round_sentence(record, self._rounds))
        for sentence in failure_sentences(record):
            self._tell(sentence)

    def finished(self, records: list[RoundRecord]) -> None:
        """Show what the run has cost."""
        for sentence in privacy_sentences(records):
            self._tell(sentence)

    def _tell(self, line: str) -> None:
        self._progress.console.print(line, markup=False, soft_wrap=True)


class Display:
    """Bars for the stages of a run; on something other than a terminal only lines."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[doing]}", markup=False),
            console=people,
            disable=not people.is_terminal,
        )

    @contextlib.contextmanager
    def stage(
        self, name: str, *, rounds: int, clinics: int, quiet: bool = False
    ) -> Generator[Stage]:
        """Show a stage of ``rounds`` rounds of ``clinics`` clinics while the body runs."""
        if quiet and not people.is_terminal:
            people.print(f"now training: {name}, {rounds} rounds ...", markup=False)
        with self._progress:
            task = self._progress.add_task(name, total=rounds * clinics, doing="")
            yield Stage(self._progress, task, rounds, quiet=quiet)
            self._progress.update(task, completed=rounds * clinics, doing="")
