"""`tenfold export`: a run's model as a folder for those who use it without Lightning, with a card that says how."""

import csv
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tokenizers
import yaml
from lightning import Trainer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from .data.corpus import SEPARATOR
from .data.tokenizer import Tokenizer
from .errors import UserError
from .files import write_whole_folder
from .lm import CausalLM
from .trained import TrainedRun, open_run


def export(run: Path, folder: Path) -> None:
    """Write a run's model to a folder: weights as safetensors, config, tokenizer and a model card.

    The card, README.md, says what to import and how to load it, and on what data it was trained, for how long, with
    what result and with which versions.

    Args:
        run: the run's folder, as `tenfold fit` says it.
        folder: where to write; must not be there yet.
    """
    trained = open_run(run)
    module = trained.module
    if trained.method.export is None and not isinstance(module, CausalLM):
        raise UserError(f"run: {trained.method.name} does not say how a {type(module).__name__} is exported")
    try:
        with write_whole_folder(folder) as temporary:
            code = (trained.method.export or save_language_model)(module, temporary)
            if trained.tokenizer is not None:
                tokenizer = transformers_tokenizer(trained.tokenizer)
                if isinstance(module, CausalLM):
                    tokenizer.model_max_length = module.hparams.max_length
                    _settle_separator(temporary, module, trained.tokenizer.separator)
                tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(_card(trained, folder.name, code), encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"folder: {error}") from error
    print(f"Written to {folder}; its README.md says how to load it.")


def save_language_model(module: CausalLM, folder: Path, *, imports: str = "", before: str = "", after: str = "") -> str:
    """Write a `CausalLM`'s model by `save_pretrained`; the Python that loads it by `AutoModelForCausalLM`.

    What a method's `export` calls for its language models.

    Args:
        module: with its model built.
        folder: that is there.
        imports: what the code imports beside transformers, in lines.
        before: what it does before it loads, such as registering the architecture.
        after: what it does with `model` then.
    """
    with _no_progress_bar():
        module.lm.save_pretrained(folder)
    head = [*imports.splitlines(), "from transformers import AutoModelForCausalLM"]
    load = "model = AutoModelForCausalLM.from_pretrained(folder)"
    body = [line for line in (before, load, after) if line]
    return "\n".join([*sorted(head), "", *body])


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Of transformers, while it writes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def transformers_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers has it: the separator begins each text, as it did in training, and ends what is generated."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    copy.post_processor = TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, tokenizer.separator)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=copy, bos_token=SEPARATOR, eos_token=SEPARATOR, clean_up_tokenization_spaces=False
    )


def _settle_separator(folder: Path, module: CausalLM, separator: int) -> None:
    """Have the saved configs name the tokenizer's own separator, which is not token 0 in a tokenizer from elsewhere."""
    config, settings = module.lm.config, module.lm.generation_config
    config.bos_token_id = config.eos_token_id = separator
    settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = separator
    settings.do_sample = True
    config.save_pretrained(folder)
    settings.save_pretrained(folder)


def _card(trained: TrainedRun, name: str, code: str) -> str:
    method, language = trained.method, isinstance(trained.module, CausalLM)
    distribution = method.package.replace(".", "-").replace("_", "-")
    front = {"library_name": "transformers" if language else distribution, "tags": ["tenfold", method.name]}
    if language:
        front["pipeline_tag"] = "text-generation"
    start = trained.record["starts"][-1] if trained.record else {}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"{method.title}, by `{trained.config['model']['class_path']}` of `{distribution}`"
        f"{_version(distribution)} ({method.paper}).",
        "## Use",
        f'```python\nfolder = "."  # where this file lies\n\n{code}\n```',
        _SPEAK if language and trained.tokenizer is not None else "",
        "## Training",
        _table({"updates": trained.step, "seed": trained.config["seed_everything"], **_metrics(trained.folder)}),
        "Data, sizes and the rest of its config:",
        f"```yaml\n{yaml.safe_dump(_settings(trained), sort_keys=False)}```",
        "## Versions",
        _table({key: start[key] for key in ("date", "commit", "device") if start.get(key)} | start.get("versions", {})),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


_SPEAK = """```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```"""


def _settings(trained: TrainedRun) -> dict[str, Any]:
    """Model and data as configured, without where the data lay; of the trainer, what is not Lightning's default."""
    data = trained.config["data"]
    path = data.get("init_args", {}).get("path")
    if path is not None:
        data = {**data, "init_args": {**data["init_args"], "path": Path(path).name}}
    usual = {name: parameter.default for name, parameter in inspect.signature(Trainer).parameters.items()}
    trainer = {k: v for k, v in trained.config["trainer"].items() if v != usual.get(k) and k not in _PLACES}
    return {"model": trained.config["model"], "data": data, "trainer": trainer}


_PLACES = ("default_root_dir", "logger", "callbacks", "plugins", "profiler", "enable_model_summary")


def _metrics(run: Path) -> dict[str, str]:
    """The last value of everything that the run logged."""
    values: dict[str, str] = {}
    if (run / "metrics.csv").exists():
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values |= {k: f"{float(v):.4g}" for k, v in row.items() if v and "/" in k and not k.startswith("lr-")}
    return values


def _version(distribution: str) -> str:
    try:
        return f" {version(distribution)}"
    except PackageNotFoundError:
        return ""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
