"""Slots: places for sequences in the context that all share, and the prompts kept in them.

Must not know requests, text or the library. What a slot holds was computed under one
adapter, and serves that very adapter only: the same tokens mean other numbers under
another one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedpeft_client.inference.llama_model import Adapter


@dataclass(eq=False)
class Slot:
    """One sequence in the context: its tokens, and the adapter that they were decoded with.

    ``reserved`` is the room that its running request may still take up, itself included;
    0: idle. ``used`` orders slots by when they last began.
    """

    number: int
    adapter: Adapter | None = None
    tokens: list[int] = field(default_factory=list[int])
    reserved: int = 0
    used: int = 0

    @property
    def cells(self) -> int:
        """The cells of the context that it takes up or may take up."""
        return max(self.reserved, len(self.tokens))

    def kept(self, prompt: Sequence[int], adapter: Adapter | None) -> int:
        """Return how many tokens of ``prompt`` need not be decoded again under ``adapter``.

        Never all of them: the last one's prediction is not kept.
        """
        if self.adapter is not adapter:
            return 0
        same = 0
        for mine, asked in zip(self.tokens, prompt[:-1], strict=False):
            if mine != asked:
                break
            same += 1
        return same


def place(idle: Sequence[Slot], prompt: Sequence[int], adapter: Adapter | None) -> tuple[Slot, int]:
    """Choose among idle slots; also return how many tokens of the prompt it keeps.

    The one that keeps most of the prompt, else an empty one, else the one that was
    used the longest ago.
    """
    best = max(idle, key=lambda slot: (slot.kept(prompt, adapter), not slot.tokens, -slot.used))
    return best, best.kept(prompt, adapter)


def to_empty(slots: Iterable[Slot], cells: int, wanted: int, spared: Slot) -> list[Slot] | None:
    """Return which idle slots to empty so that ``wanted`` more cells are free for ``spared``.

    The longest unused go first; None: even all of them are not enough.
    """
    others = [slot for slot in slots if slot is not spared]
    excess = sum(slot.cells for slot in others) + wanted - cells
    emptied: list[Slot] = []
    for slot in sorted(others, key=lambda slot: slot.used):
        if excess <= 0:
            break
        if slot.reserved or not slot.tokens:
            continue
        emptied.append(slot)
        excess -= slot.cells
    return emptied if excess <= 0 else None
