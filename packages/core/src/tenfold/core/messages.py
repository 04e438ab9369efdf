"""jsonargparse's complaints, which run to twenty lines, as one line that names the argument."""

import re
from collections.abc import Callable, Iterable

from .errors import unknown

_KEY = re.compile(r'Parser key "([^"]+)"')
_UNKNOWN = re.compile(
    r"Group '(?P<group>[^']+)' does not accept option '(?P<inner>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted"
    r"|nrecognized arguments: (?P<argument>\S+)"
)
_CLASS = re.compile(
    r"Problem with given class_path '([^']+)':\s*(.*?)(?:\n\s*- Expected a <class 'NoneType'>|\Z)", re.DOTALL
)
_EXPECTED = re.compile(r"Expected an? (?!path but)(.+?)(?:\. Got value: (.*))?$", re.MULTILINE)
_GIVEN = re.compile(r"Given value: (.*)")


def one_line(message: str, accepted: Callable[[str], Iterable[str]]) -> str:
    """The gist of a message of jsonargparse or argparse: the argument, what came, what is accepted.

    Args:
        message: as raised.
        accepted: the names accepted in a group ("" at the top, "trainer") or by a class ("package.Class").
    """
    key = ".".join(_KEY.findall(message))
    nested = _CLASS.search(message)
    if wrong := _UNKNOWN.search(message):
        group, name = wrong["group"] or key, wrong["inner"] or wrong["option"] or wrong["argument"]
        if wrong["argument"] and not name.startswith("-"):
            return f"unexpected argument {name!r}"
        name = name.lstrip("-").partition("=")[0]
        if not group and any(accepted(name.rpartition(".")[0])):
            group, _, name = name.rpartition(".")
        prefix = f"{group}." if group else ""
        names = accepted(nested[1] if nested else group)
        return unknown("option", prefix + name, [prefix + n for n in names])
    if nested:
        message = nested[2]
    expected = [(_type(kind), got) for kind, got in _EXPECTED.findall(message)]
    if key and expected:
        kinds = dict.fromkeys(kind for kind, _ in expected)
        got = expected[0][1] or next(iter(_GIVEN.findall(message)), "")
        return f"{key}: expected {' or '.join(kinds)}" + (f", got {got!r}" if got else "")
    if key and (restricted := re.search(r"Not of type (\w+): (.*)", message)):
        return f"{key}: expected {restricted[1]}: {restricted[2]}"
    if nested:
        return f"{key}.class_path {nested[1]!r}: {_squeeze(message)}"
    if errors := re.search(r"Errors:\s*- (.*)", message):  # raised by the class itself
        return _squeeze(errors[1])
    return _squeeze(message)


def _type(kind: str) -> str:
    """`int` for `<class 'int'>`, `null` for NoneType, `'a' or 'b'` for a Literal."""
    if literal := re.match(r"typing\.Literal\[(.*)\]", kind):
        return literal[1].replace(", ", " or ")
    if kind.startswith("dot import path"):
        return "a class (package.Class)"
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return "null" if name == "NoneType" else name


def _squeeze(text: str, width: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
