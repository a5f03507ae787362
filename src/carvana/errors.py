"""The error that a user sees: one line that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What a user can correct: one line that says what is wrong, in which file or parameter, and what to do."""

    def __str__(self) -> str:
        """Our line alone: a worker process of torch hands its whole traceback on as the message."""
        return printable(super().__str__().rpartition(f"{__name__}.UserError: ")[2].strip())

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def printable(text: str) -> str:
    """One line, in which `?` stands for what a terminal cannot show, as in an odd file's name."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class OutOfTimeError(UserError):
    """The hours that were given are over; what was done is kept, and the same command goes on."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of a sentence: `, did you mean "x"?` where a candidate is similar, else `.`"""
    close = difflib.get_close_matches(name, list(candidates), 1, cutoff=0.5)
    return f', did you mean "{close[0]}"?' if close else "."
