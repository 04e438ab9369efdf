"""Errors that are the user's to mend, and the words for them."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something asked for that cannot be done; the message is one line that says what would work.

    The `tenfold` command shows the message alone and exits with status 2.
    """


def unknown(what: str, name: str, accepted: Iterable[str]) -> str:
    """`unknown method 'cog-atention'; did you mean 'cog-attention'?`, or what is accepted."""
    accepted = list(accepted)
    if near := get_close_matches(name, accepted, n=1):
        return f"unknown {what} {name!r}; did you mean {near[0]!r}?"
    if len(accepted) > 20:
        return f"unknown {what} {name!r}; nothing like it among the {len(accepted)} accepted (see --help)"
    return f"unknown {what} {name!r}; accepted: {', '.join(accepted) or 'none'}"
