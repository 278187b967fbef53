"""A conversation at a terminal, turn by turn. Nothing of it is kept but in memory.

``/reset`` begins anew, ``/model NAME`` asks another version, ``/end`` ends. Knows neither
boxes nor how answers are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedpeft.errors import BadRequest, FedpeftError, PromptTooLong, UnknownAdapter
from fedpeft_client.inference.engine import Engine, Message, Sampling

HELP = "/reset begins anew, /model NAME asks another version, Ctrl-C stops an answer, /end ends"


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """Where people write and read.

    ``ask`` returns a line and raises ``EOFError`` at the end, ``show`` prints a piece of
    an answer, and ``say`` a sentence about it.
    """

    ask: Callable[[], str]
    show: Callable[[str], None]
    say: Callable[[str], None]


class Conversation:
    """Turns with one version; ``model`` None is always the one that is in use."""

    def __init__(
        self, engine: Engine, terminal: Terminal, options: Sampling, model: str | None = None
    ) -> None:
        self._engine = engine
        self._terminal = terminal
        self._options = options
        self._model = model
        self._turns: list[Message] = []

    def hold(self) -> None:
        """Talk until the end of the input, ``/end``, or Ctrl-C while nothing is answered."""
        while True:
            try:
                line = self._terminal.ask().strip()
            except EOFError:
                return
            if line == "/end":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _command(self, line: str) -> None:
        say, (name, _, value) = self._terminal.say, line.partition(" ")
        if name == "/reset":
            self._turns.clear()
            say("the conversation begins anew")
        elif name == "/model" and value.strip() in self._engine.models():
            self._model = value.strip()
            say(f"{self._model} answers from now on, with the conversation so far")
        elif name == "/model":
            say(self._choices())
        else:
            say(HELP)

    def _turn(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except (BadRequest, PromptTooLong, UnknownAdapter) as error:
            self._turns.pop()
            self._terminal.say(f"{error}{self._hint(error)}")
            return
        if answer:
            self._turns.append({"role": "assistant", "content": answer})
        else:
            self._turns.pop()  # so that user and assistant alternate

    def _hint(self, error: FedpeftError) -> str:
        if isinstance(error, PromptTooLong):
            return " (/reset begins anew)"
        return f"; {self._choices()}" if isinstance(error, UnknownAdapter) else ""

    def _choices(self) -> str:
        return f"choose one of {', '.join(self._engine.models())}, as in: /model base"

    def _answer(self) -> str:
        """Show an answer as it comes, up to its end or to Ctrl-C, and return it."""
        answer = self._engine.chat(self._turns, model=self._model, options=self._options)
        self._terminal.say(f"{answer.model} answers")
        parts: list[str] = []
        try:
            for piece in answer:
                parts.append(piece.text)
                self._terminal.show(piece.text)
                if piece.finished == "length":
                    self._terminal.show(" [...]")
        except KeyboardInterrupt:
            self._terminal.say("stopped; Ctrl-C again ends")
        finally:
            answer.close()
            self._terminal.show("\n")
        return "".join(parts)
