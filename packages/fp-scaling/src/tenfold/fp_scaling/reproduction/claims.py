"""The paper's claims as measurements. Criteria stand here, before any run; the trainings are in `experiments`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tenfold.core.claims import Claim, Run, above, below, t_interval, within
from tenfold.core.claims.figures import bars, lines, panels

from ..baselines import ChinchillaLaw, PrecisionLaw
from ..fitting import held_out_error
from ..law import ScalingLaw
from ..pilot import TOKENS_PER_STEP, train, twins
from ..table import RunTable

# One for all, as in the paper. Half learns more slowly, twice as much faster, but scatters the gaps four times as far.
LEARNING_RATE = 8e-3
FIRST_SEED = 10  # the plan below was changed after looks at seeds 0 to 2
MODELS = {  # smallest first; the claims about one model take the one in `MAIN`
    "quick": ("1x32", "2x32"),
    "default": ("1x32", "2x32", "2x64"),
    "full": ("1x32", "2x32", "2x64", "4x64", "4x128"),
}
MAIN = {"quick": "2x32", "default": "2x32", "full": "2x64"}
# Updates. In shorter trainings the loss still falls so steeply that a gap is mostly a delay. Formats, blocks and the
# law's other arms take the second, targets and twins the first.
LENGTHS = {"quick": (30, 60), "default": (240, 480, 960), "full": (500, 2000, 8000)}
BLOCKS = (2, 8, 32)
LAYOUTS = {  # by width in bits; M = 0 lies outside the paper's runs and the law's fit
    "quick": ("e1m1", "e2m0"),
    "default": ("e1m1", "e2m0", "e2m1", "e1m2", "e3m0"),
    "full": ("e1m1", "e2m0", "e2m1", "e1m2", "e3m0", "e2m2", "e3m1", "e1m3"),
}
TARGETS = {
    **{name: {"targets": [name]} for name in ("P1", "P2", "P3", "P4", "P5", "P6")},
    "P2, P4, P6": {},  # the default
}
PLAIN: dict[str, Any] = {}
BASELINE = (
    "the same model without quantization (float32): same initial weights, data and order, updates and learning rate; "
    "one rate for all, as in the paper"
)


def exponent_or_mantissa(run: Run) -> list[Claim]:
    """Formats of equal width, all in blocks of 32."""
    layouts, model, steps = LAYOUTS[run.budget], MAIN[run.budget], LENGTHS[run.budget][1]
    run.plan((len(layouts) + 1) * len(run.seeds))
    gaps = {fmt: _gaps(run, model, steps, _blocks(fmt)) for fmt in layouts}
    at = _runs(run, model, steps, PLAIN)[0]
    rows = [{"format": f, "gap": t_interval(gaps[f]), "law": _papers_gap(f, **at)} for f in layouts]
    figure = bars(list(layouts), {"": [list(seed) for seed in zip(*gaps.values(), strict=True)]}, ylabel="gap, nats")
    asked = [("e1m1", "e2m0"), ("e2m1", "e1m2"), ("e2m1", "e3m0")]
    return [
        Claim(
            name=f"{best}-over-{other}",
            statement=f"{best.upper()} costs less loss than {other.upper()}, which has as many bits.",
            paper="E1M1 is the best layout of 3 bits and E2M1 of 4 (figure 5, from the fitted law)",
            criterion=below(0),
            values=_differences(gaps[best], gaps[other]),
            unit="nats",
            baseline=f"{other.upper()}: same everything else, {model}, {steps} updates, P2, P4 and P6 in blocks of 32",
            **(
                {
                    "table": rows,
                    "figure": figure,
                    "caption": "Loss above that of the unquantized model, by format.",
                    "notes": "Column law: the paper's constants at this size and data, far outside their range, in "
                    "nats.",
                }
                if i == 0
                else {}
            ),
        )
        for i, (best, other) in enumerate(pair for pair in asked if {*pair} <= {*layouts})
    ]


def targets(run: Run) -> list[Claim]:
    """Which operands of the three products can be quantized, one by one, at three bits."""
    model, steps = MAIN[run.budget], LENGTHS[run.budget][0]
    run.plan(len(TARGETS) * len(run.seeds))
    gaps = {name: _gaps(run, model, steps, _blocks("e1m1") | chosen) for name, chosen in TARGETS.items()}
    plain = _losses(run, model, steps, PLAIN)
    cheap, dear = ([np.mean(seed) for seed in zip(*(gaps[p] for p in names), strict=True)] for names in _SPLIT)
    figure = bars(list(gaps), {"": [list(seed) for seed in zip(*gaps.values(), strict=True)]}, ylabel="gap, nats")
    where = f"{model}, E1M1 in blocks of 32, {steps} updates; {BASELINE}"
    return [
        Claim(
            name="targets-cheap",
            statement="Quantizing one of P2, P4, P6 (weights; inputs in the backward pass) costs less than one of P1, "
            "P3, P5 (inputs; output gradients).",
            paper="P1, P3 or P5 hurts clearly, P4 or P6 alone is close to free (section 3.4, figure 2)",
            criterion=below(0),
            values=_differences(cheap, dear),
            unit="nats, mean of three operands",
            baseline=where,
            table=[{"quantized": name, "gap": t_interval(values)} for name, values in gaps.items()],
            figure=figure,
            caption="Loss above that of the unquantized model, by the operands that are quantized.",
        ),
        Claim(
            name="targets-p5",
            statement="Of the single operands, P5, the gradient in the weight's product, costs the most.",
            paper="P5 hurts most, by up to about 2 % of the loss (section 3.4)",
            criterion=above(0),
            values=[p5 - max(rest) for p5, *rest in zip(*(gaps[p] for p in ("P5", *_OTHERS)), strict=True)],
            unit="nats above the next",
            baseline=where,
        ),
        Claim(
            name="targets-all-three",
            statement="Quantizing P2, P4 and P6 costs about as much as P2 alone.",
            paper="about as good as P2 alone (section 3.4): what the law is for",
            criterion=within(-0.5, 0.5),
            values=[100 * (a - b) / c for a, b, c in zip(gaps["P2, P4, P6"], gaps["P2"], plain, strict=True)],
            unit="% of the loss",
            baseline=where,
        ),
    ]


def block_size(run: Run) -> list[Claim]:
    """The gap against log2 of the elements that share a scale."""
    model, steps = MAIN[run.budget], LENGTHS[run.budget][1]
    run.plan(len(BLOCKS) * len(run.seeds))
    gaps = np.array([_gaps(run, model, steps, _blocks("e1m1", size)) for size in BLOCKS])
    x = np.log2(BLOCKS)
    slope, intercept = np.polyfit(x, gaps, 1)
    return [
        Claim(
            name="block-size",
            statement="The gap grows with log₂ of the block size.",
            paper="L(B) = κ log₂B + ψ, zero at B = 1 (Eq. 14)",
            criterion=above(0),
            values=list(slope),
            unit="nats per doubling",
            baseline=f"{model}, E1M1, {steps} updates; {BASELINE}",
            notes=f"Least squares over B = {', '.join(map(str, BLOCKS))}. The line's value at B = 1, where a scale per "
            f"element loses nothing: {t_interval(intercept)} nats; the law has 0.",
            table=[{"block size": b, "gap": t_interval(g)} for b, g in zip(BLOCKS, gaps, strict=True)],
            figure=lines(BLOCKS, {"E1M1": gaps.T}, xlabel="block size", ylabel="gap, nats", log="x"),
            caption="Loss above that of the unquantized model, by the elements that share a scale.",
        )
    ]


def data_and_parameters(run: Run) -> list[Claim]:
    """The gap over sizes of model and data, E1M1 in blocks of 32."""
    models, lengths = MODELS[run.budget], LENGTHS[run.budget]
    run.plan(2 * len(models) * len(lengths) * len(run.seeds))
    gaps = {m: np.array([_gaps(run, m, steps, _blocks("e1m1")) for steps in lengths]) for m in models}
    params = {m: _runs(run, m, lengths[-1], PLAIN)[0]["params"] for m in models}
    grid = np.stack(list(gaps.values()))  # models, lengths, seeds
    x = np.array([step * TOKENS_PER_STEP for step in lengths])
    curves = {f"N = {params[m]:,}": gaps[m].T for m in models}
    figure, axes = panels("with the data", "with the model")
    lines(list(x / 1e3), curves, xlabel="tokens, thousands", ylabel="gap, nats", log="x", axes=axes[0])
    by_size = {f"{t / 1e3:.0f} k tokens": grid[:, i].T for i, t in enumerate(x)}
    lines([params[m] for m in models], by_size, xlabel="parameters", ylabel="", log="x", axes=axes[1])
    exponents = [_exponents(np.array([params[m] for m in models]), x, grid[..., s]) for s in range(len(run.seeds))]
    beta, alpha = (t_interval(values) for values in zip(*exponents, strict=True))
    table = [
        {"parameters": params[m], "tokens": int(t), "float32 loss": t_interval(_losses(run, m, steps, PLAIN))}
        | {"gap": t_interval(gaps[m][i])}
        for m in models
        for i, (t, steps) in enumerate(zip(x, lengths, strict=True))
    ]
    return [
        Claim(
            name="gap-grows-with-data",
            statement=f"The gap is larger after {x[-1]:,} tokens than after {x[0]:,}.",
            paper="the penalty is proportional to D^β/N^α, β = 0.5162 (Eq. 1, table 2)",
            criterion=above(0),
            values=list((grid[:, -1] - grid[:, 0]).mean(0)),
            unit="nats, mean over models",
            baseline=f"E1M1 in blocks of 32; {BASELINE}",
            notes=f"A power law fitted to each seed's gaps has the exponents {beta} of D and {alpha} of 1/N; the paper "
            "has 0.5162 and 0.2368.",
            table=table,
            figure=figure,
            caption="Loss above that of the unquantized model; every point is a training with its own schedule.",
        ),
        Claim(
            name="gap-shrinks-with-parameters",
            statement=f"The gap is smaller at {params[models[-1]]:,} parameters than at {params[models[0]]:,}.",
            paper="the penalty is proportional to D^β/N^α, α = 0.2368 (Eq. 1, table 2)",
            criterion=below(0),
            values=list((grid[-1] - grid[0]).mean(0)),
            unit="nats, mean over data sizes",
            baseline=f"E1M1 in blocks of 32; {BASELINE}",
        ),
    ]


def law_on_held_out_runs(run: Run) -> list[Claim]:
    """The law and its baselines, each fitted to the same runs, on configurations that the fit has not seen."""
    if run.budget == "quick":
        return []  # fewer runs than the law needs
    model, steps = MAIN[run.budget], LENGTHS[run.budget][1]
    arms = [(m, s, q) for m in MODELS[run.budget] for s in LENGTHS[run.budget] for q in (PLAIN, _blocks("e1m1"))]
    arms += [(m, steps, _blocks(fmt)) for m in MODELS[run.budget] for fmt in ("e2m1", "e1m2")]
    arms += [(model, steps, _blocks(fmt)) for fmt in LAYOUTS[run.budget] if fmt[3] != "0" and fmt not in _COMMON]
    arms += [(model, steps, _blocks("e1m1", size)) for size in BLOCKS[:-1]]
    run.plan(len(arms) * len(run.seeds))
    tables = [_table(run, arms, i) for i in range(len(run.seeds))]
    kinds = {"floating-point law": ScalingLaw, "precision law": PrecisionLaw, "Chinchilla": ChinchillaLaw}
    errors = {name: [held_out_error(kind, table).value for table in tables] for name, kind in kinds.items()}
    laws = {name: [kind.fit(table, bootstrap=0) for table in tables] for name, kind in kinds.items()}
    figure, axes = panels(*kinds, columns=3, height=2.3)
    for panel, fitted in zip(axes, laws.values(), strict=True):
        for table, law in zip(tables, fitted, strict=True):
            panel.plot(table.loss, law.predict(table) - table.loss, "o", markersize=2.5, color="#0067a5")
        panel.axhline(0, color="#606872", lw=0.7)
        panel.set_xlabel("measured loss")
    axes[0].set_ylabel("predicted − measured")
    low, high = min(panel.get_ylim()[0] for panel in axes), max(panel.get_ylim()[1] for panel in axes)
    for panel in axes:
        panel.set_ylim(low, high)
    constants = {name: t_interval([getattr(law, name) for law in laws["floating-point law"]]) for name in _EXPONENTS}
    rows = [{"law": name, "held-out error, nats": t_interval(values)} for name, values in errors.items()]
    return [
        Claim(
            name=f"law-beats-{slug}",
            statement=f"On held-out configurations the floating-point law has a smaller error than {other}.",
            paper=paper,
            criterion=below(0),
            values=_differences(errors["floating-point law"], errors[other]),
            unit="nats, root mean square",
            baseline=f"{other}, fitted by the same robust objective from as many starts to the same "
            f"{len(arms)} configurations, each left out in one of five folds; per seed",
            **(
                {
                    "notes": "Fitted exponents, beside the paper's: "
                    + "; ".join(f"{n} {constants[n]} ({getattr(ScalingLaw.paper(), n)})" for n in _EXPONENTS)
                    + ".",
                    "table": rows,
                    "figure": figure,
                    "caption": "Errors of each law fitted to all runs, against the measured loss.",
                }
                if i == 0
                else {}
            ),
        )
        for i, (slug, other, paper) in enumerate(
            (
                ("precision-law", "precision law", "a law of the width alone mispredicts, worst at E1M1 (section 3)"),
                ("chinchilla", "Chinchilla", "Chinchilla's law does not know the precision (Eq. 2)"),
            )
        )
    ]


def more_data_hurts(run: Run) -> list[Claim]:
    """A critical data size, in a setting harsher than the paper's law covers."""
    model, lengths = MAIN[run.budget], LENGTHS[run.budget]
    run.plan(2 * len(lengths) * len(run.seeds))
    harsh = {"fmt": "e1m1", "scale": "tensor"}
    losses = np.array([_losses(run, model, steps, harsh) for steps in lengths]).T
    plain = np.array([_losses(run, model, steps, PLAIN) for steps in lengths]).T
    x = [step * TOKENS_PER_STEP / 1e3 for step in lengths]
    return [
        Claim(
            name="more-data-hurts",
            statement=f"With E1M1 and one scale per tensor, {lengths[-1]} updates end at a higher loss than "
            f"{lengths[-2]}.",
            paper="beyond a critical data size more data raises the loss (Eq. 21); with a scale per channel the "
            "paper's constants put it at 5e9 tokens for 1e5 parameters, out of reach here",
            criterion=above(0),
            values=list(losses[:, -1] - losses[:, -2]),
            unit="nats",
            baseline=f"the same training with less data, {model}; each its own schedule",
            notes="Outside the paper's law, whose constants for a scale per tensor are not published: chosen as "
            "harsher than what it covers, to bring a turn, if there is one, within reach.",
            table=[
                {"tokens": int(1e3 * t), "quantized": t_interval(losses[:, i]), "float32": t_interval(plain[:, i])}
                for i, t in enumerate(x)
            ],
            figure=lines(
                x, {"E1M1": losses, "float32": plain}, xlabel="tokens, thousands", ylabel="loss, nats", log="x"
            ),
            caption="Validation loss by the data trained on.",
        )
    ]


def one_exponent_bit_is_none(run: Run) -> list[Claim]:
    """E1M6 and E0M7 are one grid; the law tells them apart all the same."""
    model, steps = MAIN[run.budget], LENGTHS[run.budget][0]
    run.plan(len(run.seeds))
    results = [
        run.measure(
            f"twins/{model}/{steps}/seed{seed}",
            twins,
            formats=["e1m6", "e0m7"],
            model=model,
            steps=steps,
            lr=LEARNING_RATE,
            seed=FIRST_SEED + seed,
        )
        for seed in run.seeds
    ]
    law = ScalingLaw.paper()
    at = {"params": 40_894_464, "tokens": 10_485_760_000, "block_size": "channel"}
    penalties = [law.penalty(exponent_bits=e, mantissa_bits=m, **at) for e, m in ((1, 6), (0, 7))]
    return [
        Claim(
            name="e1m6-is-e0m7",
            statement=f"Trained for {steps} updates, E1M6 and E0M7 give the same weights to the bit.",
            paper=f"not noticed: the law gives E0M7 {penalties[1] / penalties[0]:.1f} times the penalty of E1M6",
            criterion=below(1),
            values=[result["different"] for result in results],
            unit=f"of {results[0]['weights']:,} weights differ",
            baseline=f"{model}, P2, P4 and P6 in blocks of 32, same initial weights, data and learning rate",
            notes="Both are the numbers 0 to 127 times a step, and absmax scaling takes the step out: a limit of the "
            "law's form at E = 0.",
            table=[
                {"seed": s, "loss, E1M6": r["losses"][0], "loss, E0M7": r["losses"][1]}
                for s, r in zip(run.seeds, results, strict=True)
            ],
        )
    ]


_SPLIT = (("P2", "P4", "P6"), ("P1", "P3", "P5"))
_OTHERS = ("P1", "P2", "P3", "P4", "P6")
_COMMON = ("e1m1", "e2m1", "e1m2")
_EXPONENTS = ("alpha", "beta", "delta", "nu")


def _blocks(fmt: str, size: int = 32) -> dict[str, Any]:
    return {"fmt": fmt, "block_size": size}


def _runs(run: Run, model: str, steps: int, quantization: dict[str, Any]) -> list[dict[str, Any]]:
    """A run per seed."""
    name = "-".join(str(x) for x in _flat(quantization.values())) or "float32"
    return [
        run.measure(
            f"{model}/{steps}/{name}/seed{seed}",
            train,
            model=model,
            steps=steps,
            lr=LEARNING_RATE,
            seed=FIRST_SEED + seed,
            **quantization,
        )
        for seed in run.seeds
    ]


def _losses(run: Run, model: str, steps: int, quantization: dict[str, Any]) -> list[float]:
    losses = [result["loss"] for result in _runs(run, model, steps, quantization)]
    if None in losses:
        raise RuntimeError(f"a training of {model} with {quantization or 'float32'} diverged")
    return losses


def _gaps(run: Run, model: str, steps: int, quantization: dict[str, Any]) -> list[float]:
    """Loss above that of the unquantized twin, per seed."""
    return _differences(_losses(run, model, steps, quantization), _losses(run, model, steps, PLAIN))


def _table(run: Run, arms: Sequence[tuple[str, int, dict[str, Any]]], seed: int) -> RunTable:
    rows = []
    for model, steps, quantization in arms:
        result = _runs(run, model, steps, quantization)[seed]
        fmt = quantization.get("fmt")
        E, M, B = (int(fmt[1]), int(fmt[3]), quantization["block_size"]) if fmt else (8, 23, 1)
        rows.append({**result, "exponent_bits": E, "mantissa_bits": M, "block_size": B})
    return RunTable.read(rows)


def _exponents(params: np.ndarray, tokens: np.ndarray, gaps: np.ndarray) -> tuple[float, float]:
    """Least squares of ln gap = b ln D - a ln N + c, over the gaps that are positive: (b, a)."""
    N, D = np.meshgrid(np.log(params), np.log(tokens), indexing="ij")
    positive = gaps > 0
    design = np.stack([D[positive], -N[positive], np.ones(positive.sum())], axis=1)
    b, a, _ = np.linalg.lstsq(design, np.log(gaps[positive]), rcond=None)[0]
    return float(b), float(a)


def _papers_gap(fmt: str, *, params: int, tokens: int, **_: float) -> float:
    format = {"exponent_bits": int(fmt[1]), "mantissa_bits": int(fmt[3]), "block_size": 32}
    return round(ScalingLaw.paper().penalty(params=params, tokens=tokens, **format), 5)


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(ours, theirs, strict=True)]


def _flat(values: Any) -> list[Any]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]
