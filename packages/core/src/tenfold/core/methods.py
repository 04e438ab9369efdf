"""The methods that are installed: each package registers one in the entry-point group `tenfold.methods`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, unknown

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule

    from .claims import Claim, Run


@dataclass(frozen=True)
class Method:
    """A paper's method, as its package presents it to the `tenfold` command.

    Args:
        name: as in `tenfold fit NAME`; also the entry point's name.
        title: of the method, in a few words.
        paper: title and arXiv number.
        module: the LightningModule, or the base class of those that its configs name by `class_path`.
        datamodule: the LightningDataModule, or likewise.
        package: import name: `tenfold.cog_attention`. Its folder `configs` holds the shipped configs.
        claims: functions that take a `tenfold.core.claims.Run` and return claims.
        verbs: what `tenfold NAME VERB` calls; the function's parameters are the options.
        export: what `tenfold export RUN FOLDER` calls with the trained module and the folder: it writes there what a
            user loads without Lightning, weights as safetensors, and returns the Python that loads it, which finds
            the folder in the variable `folder` and leaves the result in `model`. The command adds the tokenizer, if
            the run has one, and the model card with that code in it. None is for methods whose modules are all
            `CausalLM`s, of architectures that transformers itself knows.

    Example:
        An export, for a package with a network `Encoder` that has `save_pretrained`:

        >>> def export(module: LightningModule, folder: Path) -> str:
        ...     module.encoder.save_pretrained(folder)
        ...     return "from tenfold.joint_augment import Encoder; model = Encoder.from_pretrained(folder)"
    """

    name: str
    title: str
    paper: str
    module: "type[LightningModule]"
    datamodule: "type[LightningDataModule]"
    package: str
    claims: "tuple[Callable[[Run], list[Claim]], ...]" = ()
    verbs: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    export: "Callable[[LightningModule, Path], str] | None" = None


def installed() -> dict[str, EntryPoint]:
    """The entry point of every installed method, by name, without importing any."""
    points = entry_points(group="tenfold.methods")
    return {point.name: point for point in sorted(points, key=lambda point: point.name)}


def load(name: str) -> Method:
    """The method called `name`, imported.

    Raises:
        UserError: no such method is installed, or its package cannot be imported.
    """
    points = installed()
    if name not in points:
        raise UserError(unknown("method", name, points))
    try:
        return points[name].load()
    except ImportError as error:
        raise UserError(f"{name}: {points[name].value} cannot be imported: {error}") from error


def configs(package: str) -> dict[str, Path]:
    """The YAML configs that a method's package ships, by name, the quickest (`tiny`) first."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else ()
    files = [file for folder in folders for file in Path(folder, "configs").glob("*.yaml")]
    return {file.stem: file for file in sorted(files, key=lambda file: (file.stem != "tiny", file.stem))}
