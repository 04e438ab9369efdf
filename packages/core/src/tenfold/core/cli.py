"""The `tenfold` command."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError, unknown
from .methods import Method, configs, installed, load

# Nothing here imports torch before it is needed: `tenfold list` and `--help` answer at once.

_HELP = """usage: tenfold COMMAND ...

  list                            the methods that are installed
  info M                          what a method offers: configs, claims, verbs
  generate RUN --prompt TEXT      let a run's language model go on with a text
  export RUN FOLDER               a run's model for use without Lightning: safetensors, tokenizer, model card
  reproduce [M ...]               measure the claims of all or some methods, and write a report
  report                          write the report's page again from its measurements
  fit|validate|predict M          train or evaluate: --config NAME|FILE, --resume, and every option of
                                  trainer, model and data (tenfold fit M --config NAME --help shows them)
  bench [OP|M]                    run the benchmarks, in a checkout of the repository
  M VERB ...                      what a method adds (tenfold info M)

Methods: {methods}
Options of a command: tenfold COMMAND --help. With TENFOLD_DEBUG=1, errors show where they came from."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status.

    0 is success, 1 a failure, 2 something wrong with what was asked for, said in one line on stderr; 130 and
    143 after Ctrl-C and SIGTERM.
    """
    try:
        return _run(sys.argv[1:] if argv is None else list(argv)) or 0
    except UserError as error:
        return _fail(error, 2)
    except KeyboardInterrupt as error:
        return _fail(error, 130, "interrupted")
    except SystemExit as exit:
        if type(exit).__name__ == "SIGTERMException":  # Lightning's, which would exit with 0
            return 143
        raise
    except RuntimeError as error:
        if type(error).__name__ in ("NonFiniteError", "ReproduceError"):
            return _fail(error, 1)
        raise


def _run(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP.format(methods=", ".join(installed()) or "none installed"))
        return 0
    if arguments[0] == "--version":
        print(f"tenfold {version('tenfold-core')}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in _COMMANDS:
        return _COMMANDS[command](rest)
    if command in _TRAINING:
        return _train(command, rest)
    if command in installed():
        return _verb(load(command), rest)
    raise UserError(unknown("command or method", command, [*_COMMANDS, *_TRAINING, *installed()]))


def _list(arguments: list[str]) -> None:
    _Parser("list", "The methods that are installed.").parse_args(arguments)
    points = installed()
    if not points:
        print("No method is installed; try: pip install tenfold-cog-attention")
    width = max(map(len, points), default=0)
    for name, point in points.items():
        print(f"{name:{width}}  {point.dist.metadata['Summary'] if point.dist else ''}")


def _info(arguments: list[str]) -> None:
    parser = _Parser("info", "What a method offers.")
    parser.add_argument("method", metavar="M")
    method = load(parser.parse_args(arguments).method)
    rows = {
        "paper": [method.paper],
        "package": [f"{method.package} {_version(method)}"],
        "configs": [f"{name:18} {_purpose(file)}" for name, file in configs(method.package).items()],
        "train": [f"tenfold fit {method.name} --config {name}" for name in list(configs(method.package))[:1]],
        "claims": [_describe(claims.__name__, claims) for claims in method.claims],
        "verbs": [_describe(name, verb) for name, verb in method.verbs.items()],
    }
    print(f"{method.name}: {method.title}")
    for name, lines in rows.items():
        for i, line in enumerate(lines):
            print(f"  {'' if i else name:8} {line}".rstrip())


def _train(verb: str, arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: tenfold {verb} M [--config NAME|FILE] [--resume [RUN]] [--ckpt_path FILE] [...]")
        print(f"M: {', '.join(installed())}. All options: tenfold {verb} M --help")
        return 0
    method = load(arguments[0])
    from .training.cli import run_method

    return run_method(method, verb, arguments[1:])


def _reproduce(arguments: list[str]) -> None:
    parser = _Parser("reproduce", "Measure claims and write a report; goes on where it was interrupted.")
    parser.add_argument("methods", metavar="M", nargs="*", help="by default all that are installed")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--quick", action="store_true", help="a few minutes for all: wide intervals")
    budget.add_argument("--full", action="store_true", help="hours: more seeds and steps")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many per claim")
    parser.add_argument("--output", type=Path, default=Path("runs/report"), metavar="DIR")
    given = parser.parse_args(arguments)
    if given.seeds is not None and given.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {given.seeds}")
    methods = [load(name) for name in dict.fromkeys(given.methods or installed())]
    if not methods:
        raise UserError("no method is installed; try: pip install tenfold-cog-attention")
    from .reproduce import reproduce

    budget_name = "quick" if given.quick else "full" if given.full else "default"
    _as_user_error(reproduce, methods, budget=budget_name, seeds=given.seeds, output=given.output)


def _report(arguments: list[str]) -> None:
    parser = _Parser("report", "Write the page again from DIR/claims.json.")
    parser.add_argument("--output", type=Path, default=Path("runs/report"), metavar="DIR")
    output = parser.parse_args(arguments).output
    from .claims import render

    print(f"The report: {_as_user_error(render, output)}")


def _bench(arguments: list[str]) -> int:
    parser = _Parser("bench", "Time ops and methods beside their peers; arguments go to the script.")
    parser.add_argument("name", metavar="OP|M", nargs="?", help="by default all")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the timings there, a CSV file each")
    given, rest = parser.parse_known_args(arguments)
    scripts = _benchmarks()
    name = given.name and given.name.replace("-", "_")
    if name and name not in scripts:
        raise UserError(unknown("benchmark", given.name, scripts))
    chosen = scripts[name] if name else [file for files in scripts.values() for file in files]
    for file in chosen:
        print(f"{file.parent.parent.name}: {file.stem}", flush=True)
        if given.output:
            given.output.mkdir(parents=True, exist_ok=True)
            keep = ["--csv", str(given.output / f"{file.stem}.csv")]
        else:
            keep = []
        if status := subprocess.run([sys.executable, str(file), *keep, *rest]).returncode:
            return status
    return 0


def _verb(method: Method, arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: tenfold {method.name} VERB ...")
        for name, function in method.verbs.items():
            print(f"  {_describe(name, function)}")
        print(f"and: tenfold info|fit|validate|predict|reproduce|bench {method.name}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in method.verbs:
        if verb in (*_COMMANDS, *_TRAINING):
            raise UserError(f"the method comes last: tenfold {verb} {method.name}")
        raise UserError(unknown(f"verb of {method.name}", verb, method.verbs))
    return _call(method.verbs[verb], f"{method.name} {verb}", rest)


def _call(function: Callable[..., Any], command: str, arguments: list[str]) -> int:
    """Call `function` by its parameters as options; its ValueErrors and OSErrors are about what it was given."""
    import inspect

    import jsonargparse

    from .messages import one_line

    # Not jsonargparse.auto_cli: that keeps an option `--config` for itself, and verbs may want one.
    parser = jsonargparse.ArgumentParser(prog=f"tenfold {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(function, as_positional=True, sub_configs=True)
    try:
        result = function(**parser.instantiate(parser.parse_args(arguments)))
    except argparse.ArgumentError as error:
        raise UserError(one_line(str(error), lambda where: inspect.signature(function).parameters)) from error
    except (ValueError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return result if isinstance(result, int) else 0


def _generate(arguments: list[str]) -> int:
    with _needs_transformers("generate"):
        from .generate import generate
    return _call(generate, "generate", arguments)


def _export(arguments: list[str]) -> int:
    with _needs_transformers("export"):
        from .export import export
    return _call(export, "export", arguments)


@contextmanager
def _needs_transformers(command: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{command}: needs {error.name}; try: pip install 'tenfold-core[lm]'") from error


_COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "list": _list,
    "info": _info,
    "generate": _generate,
    "export": _export,
    "reproduce": _reproduce,
    "report": _report,
    "bench": _bench,
}
_TRAINING = ("fit", "validate", "predict")


class _Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line with the nearest valid option."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"tenfold {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix + "-"):
            message = unknown("option", message.removeprefix(prefix).split()[0], self._option_string_actions)
        raise UserError(f"{self.prog.removeprefix('tenfold ')}: {message}")


def _benchmarks() -> dict[str, list[Path]]:
    """The scripts of every op, and of every method, in the checkout around the current folder or this file.

    Raises:
        UserError: there is none.
    """
    for folder in (Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents):
        if (folder / "kernels" / "benchmarks").is_dir() and (folder / "packages" / "core").is_dir():
            scripts = {file.stem: [file] for file in _scripts(folder / "kernels" / "benchmarks")}
            for package in sorted((folder / "packages").iterdir()):
                if files := _scripts(package / "benchmarks"):
                    scripts[package.name.replace("-", "_")] = files
            return scripts
    raise UserError("bench: the benchmarks are in the repository, not in the packages; run it in a checkout")


def _scripts(folder: Path) -> list[Path]:
    """The files to run, not those that they import."""
    return [f for f in sorted(folder.glob("*.py")) if "__main__" in f.read_text(encoding="utf-8")]


def _version(method: Method) -> str:
    try:
        return version(method.package.replace(".", "-").replace("_", "-"))
    except PackageNotFoundError:
        return ""


def _purpose(config: Path) -> str:
    """The first sentence of the comment that a config begins with."""
    lines = config.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return comment.partition(". ")[0].rstrip(".")


def _describe(name: str, function: Callable[..., Any]) -> str:
    lines = (function.__doc__ or "").strip().splitlines()
    return f"{name:12} {lines[0] if lines else ''}".rstrip()


def _as_user_error(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `function` returns; its ValueErrors and OSErrors are about what it was given."""
    try:
        return function(*arguments, **options)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _fail(error: BaseException, status: int, message: str = "") -> int:
    if os.environ.get("TENFOLD_DEBUG"):
        raise error
    print(f"tenfold: {message or error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
