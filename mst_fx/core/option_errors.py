"""What is said of options that cannot be taken: the name or value that may be meant, and those that there are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches


def meant(given: object, known: Collection[str]) -> str:
    """Return a question after the known text that a given value is much like, "" where there is none."""
    spelled = {name.lower(): name for name in known}
    found = get_close_matches(str(given).lower().replace("-", "_"), spelled, 1)
    return f" (did you mean {spelled[found[0]]!r}?)" if found else ""


def unknown(name: object, own: Collection[str], foreign: Collection[str]) -> ValueError:
    """Return the error for an option that nobody knows.

    Args:
        name: the option.
        own: the names of our options.
        foreign: the names that the inner compiler takes.
    """
    question = meant(name, own) or meant(name, foreign)
    return ValueError(
        f"mst_fx: unknown option {name!r}{question}; ours are {', '.join(sorted(own))}; Inductor's pass through"
    )


def no_options(given: object, takers: Sequence[str]) -> TypeError:
    """Return the error for `options=` that is no dict.

    Args:
        given: what was given in its place.
        takers: the names of our options that take it as their value.
    """
    question = " or ".join(f"{{{name!r}: {given!r}}}" for name in takers)
    return TypeError(
        f"mst_fx: options= takes a dict, not {given!r}" + (f"; did you mean {question}?" if takers else "")
    )


def wrong(name: str, expected: str, value: object, known: Collection[str] = ()) -> TypeError:
    """Return the error for a value that an option does not take.

    Args:
        name: the option.
        expected: what it takes.
        value: what it was given.
        known: the texts that it takes.
    """
    return TypeError(f"mst_fx: option {name!r} takes {expected}, not {value!r}{meant(value, known)}")
