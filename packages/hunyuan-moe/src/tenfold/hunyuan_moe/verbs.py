"""`tenfold hunyuan-moe scaling` and `synthesize`."""

import hashlib
import json
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tenfold.core.files import write_whole

from .scaling.figures import isoflop_figure, short
from .scaling.law import (
    PAPERS_PARAMS,
    PAPERS_TOKENS,
    PER_PARAMETER,
    PER_TOKEN,
    IsoFlopFit,
    fit_isoflops,
    minimal_compute,
    training_flops,
)
from .synthesis.generators import Generate, LocalModel, Server
from .synthesis.pipeline import (
    Critique,
    Evolve,
    Filters,
    Instruct,
    Record,
    Respond,
    check_ways,
    read_json,
    read_jsonl,
    run_step,
    select,
)


def scaling(
    compute: float | None = None,
    params: float | None = None,
    tokens: float | None = None,
    batch_ratio: float = 0.0,
    runs: Path | None = None,
    per_parameter: float = PER_PARAMETER,
    per_token: float = PER_TOKEN,
    plot: Path = Path("scaling.svg"),
) -> None:
    """How large a mixture of experts should be, and on how much data, by the paper's law or one fitted to your runs.

    Args:
        compute: C, the budget in operations; or give params and tokens, and it is computed from them.
        params: N, activated parameters.
        tokens: D.
        batch_ratio: B/B_crit, the batch in units of the critical one; 0 for small batches.
        runs: CSV with the columns params, tokens, loss and perhaps compute, several sizes at each of several budgets:
            the law is fitted to them.
        per_parameter: operations per activated parameter and token.
        per_token: operations per token beside them.
        plot: where the figure of the fit goes.
    """
    if (params is None) != (tokens is None) or (compute is not None and params is not None):
        raise ValueError("scaling: give --compute, or --params and --tokens")
    if compute is None and params is None and runs is None:
        raise ValueError("scaling: give --compute, or --params and --tokens, or --runs")
    console = Console(highlight=False)
    fitted = None
    if runs is not None:
        if plot.suffix.lstrip(".") not in Figure().canvas.get_supported_filetypes():
            raise ValueError(f"plot: {plot.suffix or plot} is not a kind of figure; .svg, .png and .pdf are")
        fitted = fit_isoflops(runs, per_parameter=per_parameter, per_token=per_token)
        _print_fit(console, fitted)
        _save(isoflop_figure(fitted), plot)
        console.print(f"Figure: {plot}\n", soft_wrap=True)
    if params is not None:
        compute = training_flops(params, tokens, per_parameter=per_parameter, per_token=per_token)
    if compute is None:
        return
    least = minimal_compute(compute, batch_ratio)
    if params is not None:
        console.print(f"{short(params)} activated parameters on {short(tokens)} tokens: C = {compute:.4e}.")
    console.print(f"C = {compute:.4e}, C_min = {least:.4e} operations.")
    table = Table("law", "activated parameters", "tokens", "tokens per parameter")
    laws = {"the paper's": (PAPERS_PARAMS, PAPERS_TOKENS)}
    if fitted:
        laws["fitted to your runs"] = (fitted.params, fitted.tokens)
    for name, (n, d) in laws.items():
        table.add_row(name, short(n(least)), short(d(least)), f"{d(least) / n(least):.0f}")
    console.print(table)
    console.print(
        "The paper's law was fitted from 10M to 1B activated parameters and 5e18 to 9.5e19 operations; "
        "near the optimum the loss is flat.",
        soft_wrap=True,
    )


def synthesize(
    documents: Path,
    output: Path,
    model: str,
    server: str | None = None,
    critic: str | None = None,
    ways: str = "clarity,difficulty",
    samples: int = 3,
    grade: int = 3,
    temperature: float = 0.7,
    max_new_tokens: int = 512,
    batch_size: int = 8,
) -> None:
    """Instructions and answers from documents, in four steps: instruct, evolve, respond, filter; resumable.

    Args:
        documents: JSONL with a `text` in every line.
        output: JSONL with instruction and response; what the steps wrote is kept in OUTPUT.work.
        model: a folder or name that transformers loads, or the model's name at the server.
        server: address of an OpenAI-compatible server, up to /v1; the key, if any, in OPENAI_API_KEY.
        critic: the model that grades the responses; by default the same.
        ways: of evolving an instruction, one after the other; of clarity, difficulty and variety, with commas between.
        samples: responses to each instruction, which must agree where they state a short answer.
        grade: of 1 to 4, the least that is kept.
        temperature: of the sampling.
        max_new_tokens: of an answer.
        batch_size: prompts at once, and what an interruption can lose.
    """
    for name, value, low, high in (
        ("samples", samples, 1, 100),
        ("grade", grade, 1, 4),
        ("max_new_tokens", max_new_tokens, 1, 1_000_000),
        ("batch_size", batch_size, 1, 4096),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: must be from {low} to {high}, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: must not be negative, got {temperature}")
    if samples > 1 and temperature == 0:
        raise ValueError("temperature: several samples need one above 0, or they are all the same")
    chosen = [way.strip() for way in ways.split(",") if way.strip()]
    check_ways(chosen)
    work = Path(f"{output}.work")
    if documents.resolve() == output.resolve() or documents.resolve().parent == work.resolve():
        raise ValueError(f"output: {documents} would be overwritten; choose another")
    if output.is_dir():
        raise ValueError(f"output: {output} is a folder, expected a file")
    if not sum(1 for _ in read_jsonl(documents, "text")):  # every line is looked at before a model is loaded
        raise ValueError(f"documents: there are none in {documents}")
    settings = {
        "documents": hashlib.sha256(documents.read_bytes()).hexdigest(),
        "model": model,
        "critic": critic,
        "ways": chosen,
        "samples": samples,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    _refuse_other_settings(work / "settings.json", settings)

    def load(name: str, heat: float) -> Generate:
        if server is not None:
            return Server(server, name, max_new_tokens=max_new_tokens, temperature=heat)
        return LocalModel(name, max_new_tokens=max_new_tokens, temperature=heat)

    writer = load(model, temperature)
    judge = load(critic or model, 0.0) if server is not None or critic else writer.greedy()
    instruct = Instruct(writer)

    def begin(records: list[Record]) -> list[Record]:
        made = instruct(records)
        with write_whole(work / "settings.json") as file:  # from now on there is something that was made with them
            file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        return made

    console = Console(highlight=False)
    source = documents
    for name, step in (
        ("instruct", begin),
        ("evolve", Evolve(writer, tuple(chosen))),
        ("respond", Respond(writer, samples)),
        ("critique", Critique(judge)),
    ):
        source = run_step(name, step, read_jsonl(source), work, batch_size=batch_size)
        console.print(f"{name}: {sum(1 for _ in read_jsonl(source))} records in {source}", soft_wrap=True)
    kept, reasons = select(read_jsonl(source), Filters(grade=grade))
    with write_whole(output) as file:
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
    fallen = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
    console.print(f"filter: {len(kept)} kept in {output}; fallen: {fallen}", soft_wrap=True)


def _refuse_other_settings(file: Path, settings: dict) -> None:
    if file.is_file():
        before = read_json(file)
        if changed := [name for name in settings if before.get(name) != settings[name]]:
            raise ValueError(f"{changed[0]}: {file.parent} was begun with others; choose another output, or delete it")


def _print_fit(console: Console, fit: IsoFlopFit) -> None:
    table = Table("compute", "best params", "best tokens", "loss", "minimum")
    for n, d in zip(fit.curves, fit.token_curves, strict=True):
        where = "measured" if n.inside and d.inside else "beyond the sizes measured"
        table.add_row(f"{n.compute:.3g}", short(n.best), short(d.best), f"{n.least:.4f}", where)
    console.print(table)
    for name, law, exponent, papers in (
        ("N_opt", fit.params, fit.params_exponent, PAPERS_PARAMS),
        ("D_opt", fit.tokens, fit.tokens_exponent, PAPERS_TOKENS),
    ):
        console.print(f"{name} = {law.factor:.4g} * C^{exponent} (the paper's: {papers.factor} * C^{papers.exponent})")


def _save(figure: Figure, path: Path) -> None:
    with write_whole(path) as file:
        figure.savefig(file, format=path.suffix.lstrip("."), facecolor="white", dpi=160)
