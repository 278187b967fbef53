"""Numbers of things in sentences for people: one clinic, three clinics.

Must not know what is counted.
"""


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: ``one`` for 1, else ``many`` (not given: with an s)."""
    return f"{number} {one if number == 1 else many or one + 's'}"
