"""What must not be committed: addresses of package indexes and private networks, paths of one machine."""

import re

# The hosts are split, so that this file holds none of them.
_INDEX_HOSTS = [
    r"(?:test\.|files\.|upload\.)?(?:pypi|pythonhosted)\.(?:org|python\.org)",
    r"pypi\.(?:python\.org|nvidia\.com|ngc\.nvidia\.com)",
    r"download\.pytorch\.org",
    r"(?:deb|security|snapshot|archive)\.debian\.org",
    r"(?:archive|security|ports)\.ubuntu\.com",
    r"(?:conda|repo)\.anaconda\.(?:org|com)",
    r"registry\.npmjs\.org|registry\.yarnpkg\.com|static\.crates\.io|index\.crates\.io|proxy\.golang\.org",
]

_PATTERNS = {
    "address of a package index": [
        rf"(?<![\w.-])(?:{'|'.join(_INDEX_HOSTS)})(?![\w.-]*\w)",
        # Any host: a simple index, a project page, a file store, an apt archive, a folder of wheels.
        r"https?://[^\s\"]*/(?:\+?simple|project/|packages/[0-9a-f]{2}/|(?:debian|ubuntu|whl)(?:/|\b))",
        r"(?<![\w.-])[\w-]+(?:\.[\w-]+)+(?::\d+)?/(?:simple|pypi|whl)(?:[/\s\"'>)]|$)",
    ],
    "setting that names a package index": [
        r"\b(?:index[-_]url|find[-_]links|default[-_]index)[\"']?\s*(?:=|:\s*\S)",
        r"--(?:(?:extra-)?index-url|find-links|default-index|index)[ =]+[\"']?(?:https?:|file:|/)",
        r"(?:PIP|UV)_(?:(?:EXTRA_)?INDEX_URL|FIND_LINKS|DEFAULT_INDEX|INDEX)\b\s*[=:]\s*\S",
        r"^\s*\[\[(?:tool\.uv\.)?index\]\]",
    ],
    "path of one machine": [
        r"(?<![\w./])/(?:home|Users)/\w",
        r"(?<![\w./])/(?:root|work|farm|opt|workspaces?)/[\w.]",
        r"(?<![\w/])[A-Za-z]:\\{1,2}(?:Users|Documents and Settings)\\",
    ],
    "address of a private network": [
        r"(?<![\w.-])(?<!version = \")(?<![=<>~!])"
        r"(?:10(?:\.\d{1,3}){3}|192\.168(?:\.\d{1,3}){2}|172\.(?:1[6-9]|2\d|3[01])(?:\.\d{1,3}){2}|169\.254(?:\.\d{1,3}){2})"
        r"(?![\w-]|\.\w)",
    ],
}

_COMPILED = {kind: re.compile("|".join(patterns), re.IGNORECASE) for kind, patterns in _PATTERNS.items()}


def leaks(text: str) -> list[tuple[int, str, str]]:
    """The (line number, kind of leak, line) of every line of `text` that holds one."""
    return [
        (number, kind, line)
        for number, line in enumerate(text.splitlines(), start=1)
        for kind, pattern in _COMPILED.items()
        if pattern.search(line)
    ]
