"""The paper's claims as measurements. Criteria stand here, before any run; the trainings are in `experiments`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tenfold.core.claims import Claim, Run, below, t_interval, within
from tenfold.core.claims.figures import bars

from ..learning_rates import PAPERS_RATIO, expert_lr_ratio
from ..scaling.figures import isoflop_figure
from ..scaling.law import PAPERS_PARAMS, PAPERS_TOKENS, fit_isoflops
from .experiments import ISOFLOP, ISOFLOP_VOCABULARY, SIZES, isoflop_run, language_model, papers_cache

FIRST_SEED = 10  # the plan below was changed after looks at seeds 0 to 2

RATES = (8e-3, 1.6e-2)  # where the search begins; it goes on until the best is inside (Run.tune)
ROUTINGS, EXPERTS, CACHES = ("recycle", "drop", "dropless"), ("recycle", "uniform rate"), ("MHA", "recycle")


# Operations: widths of the models. By a pilot with one seed, which no claim uses: the least loss lies among them.
ISOFLOPS = {1.2e10: (8, 12, 16, 24), 3e10: (12, 16, 24, 32, 40), 7.5e10: (16, 24, 32, 40, 56)}


def isoflop_lr(dim: int) -> float:
    """The isoFLOP trainings' learning rate, near the best of three that the pilot tried at widths 16, 32 and 56."""
    return 0.48 / dim


class Plan(NamedTuple):
    """What a budget trains."""

    size: str
    steps: int
    caches: tuple[str, ...] = ()  # arms of the comparison of caches; none: not trained
    ratios: tuple[str, ...] = EXPERTS  # arms of the experts' learning rate
    schedules: tuple[str, ...] = ()
    isoflops: Mapping[float, tuple[int, ...]] = {}  # operations: the models' widths


PLAN = {
    "quick": Plan("0.32M", 30),
    "default": Plan("0.32M", 500, CACHES, isoflops=ISOFLOPS),
    "full": Plan(
        "0.55M",
        2000,
        caches=("MHA", "GQA", "CLA", "recycle"),
        ratios=("0.25 of the rate", "recycle", "0.5 of the rate", "uniform rate", "twice the rate"),
        schedules=("recycle", "cosine"),
        isoflops=ISOFLOPS | {1.9e11: (24, 32, 40, 56, 80)},
    ),
}
MARGIN = 1.0  # % of the other arm's loss that counts as no loss
SAME_EXPONENT = 0.1  # how far from the paper's an exponent may lie
EQUAL = "same data and order and updates, same sizes; each arm's learning rate tuned in the same way"


def recycle_routing(run: Run) -> list[Claim]:
    """Recycling against dropping and against no capacity at all: loss, and what became of the tokens."""
    plan = PLAN[run.budget]
    models, rates = _models(run, ROUTINGS)
    loss = {arm: [m["bits_per_byte"] for m in models[arm]] for arm in ROUTINGS}
    table = [
        {
            "routing": arm,
            "bits per byte": t_interval(loss[arm]),
            "minus dropless": t_interval(_differences(loss[arm], loss["dropless"])),
            "recycled, %": t_interval([100 * m["recycled"] for m in models[arm]]),
            "dropped, %": t_interval([100 * m["dropped"] for m in models[arm]]),
            "fullest expert, mean loads": t_interval([m["load_max"] for m in models[arm]]),
            "learning rate": rates[arm],
        }
        for arm in ROUTINGS
    ]
    notes = (
        f"{plan.size} parameters, {plan.steps} updates, held-out Wikipedia leads, evaluated "
        "dropless; capacity factor 1.0, the hardest; one shared and 8 specialized experts, top-1. The paper does not "
        "give its factor, nor a comparison. Shares are means over all updates and layers."
    )
    return [
        Claim(
            name="recycle-beats-drop",
            statement="Sending tokens beyond the capacity to random experts gives a lower loss than dropping them.",
            paper="dropping loses information and harms training; recycling keeps it (section 2.2.3), without numbers",
            criterion=below(0),
            values=_differences(loss["recycle"], loss["drop"]),
            unit="bits per byte",
            baseline=f"dropping, capacity factor 1.0; {EQUAL}",
            notes=notes,
            table=table,
            figure=bars(list(ROUTINGS), {"loss": [loss[arm] for arm in ROUTINGS]}, ylabel="validation bits per byte"),
            caption="Validation loss by what happens to tokens beyond an expert's capacity.",
        ),
        Claim(
            name="recycle-drops-nothing",
            statement="With recycling no token is without a specialized expert.",
            paper="tokens are re-assigned in place of being dropped (section 2.2.3, figure 2)",
            criterion=below(1e-9),
            values=[100 * m["dropped"] for m in models["recycle"]],
            unit="% of the tokens",
            baseline=f"dropping loses {t_interval([100 * m['dropped'] for m in models['drop']])} % of them",
            notes=notes,
        ),
        Claim(
            name="recycle-reaches-dropless",
            statement=f"Recycling costs at most {MARGIN:g} % of the loss of a model without capacities.",
            paper="not claimed: with grouped products, dropless training needs no recycling",
            criterion=below(MARGIN),
            values=_percent(loss["recycle"], loss["dropless"]),
            unit="% of the dropless model's bits per byte",
            baseline=f"dropless; {EQUAL}",
            notes=notes,
        ),
    ]


def expert_learning_rate(run: Run) -> list[Claim]:
    """Specialized experts at 0.31 of the learning rate against one rate for all, and what the noise batch would say."""
    plan = PLAN[run.budget]
    models, rates = _models(run, plan.ratios, {"uniform rate": {"noise": True}})
    loss = {arm: [m["bits_per_byte"] for m in models[arm]] for arm in plan.ratios}
    above_uniform = {arm: _differences(loss[arm], loss["uniform rate"]) for arm in plan.ratios}
    batch, experts = SIZES[plan.size]["batch"], SIZES[plan.size]["experts"]
    shares = {  # of the noise batch: B/B_noise = B·|G|²/tr Σ
        moment: [batch * m[f"gradient_{moment}"] / m[f"noise_{moment}"] for m in models["uniform rate"]]
        for moment in ("middle", "end")
    }
    asked = {moment: expert_lr_ratio(max(float(np.mean(x)), 1e-9), experts) for moment, x in shares.items()}
    return [
        Claim(
            name="expert-learning-rate",
            statement=f"Specialized experts at {PAPERS_RATIO} of the learning rate give a lower loss than one rate.",
            paper="each expert at the rate that suits its share of the batch: a ratio of about 0.31 (section 2.2.4)",
            criterion=below(0),
            values=above_uniform["recycle"],
            unit="bits per byte",
            baseline=f"one rate for all parameters; {EQUAL}",
            notes=f"{plan.size} parameters, {plan.steps} updates. 0.31 is the formula's value for 16 experts at 0.26 "
            f"of the noise batch. Here, with one rate, the {batch} sequences of a batch are "
            f"{t_interval(shares['middle'])} of the simple noise batch in the middle of training and "
            f"{t_interval(shares['end'])} at its end: for "
            f"{experts} experts the formula asks for a ratio of {asked['middle']:.2f} and {asked['end']:.2f}, "
            f"and for no batch for less than {experts**-0.5:.2f}. Its own "
            "noise batch is Adam's, another number of the same kind.",
            table=[
                {
                    "experts' rate": f"{PAPERS_RATIO} of the rate" if arm == "recycle" else arm,
                    "bits per byte": t_interval(loss[arm]),
                    "minus one rate": t_interval(above_uniform[arm]),
                    "learning rate of the rest": rates[arm],
                }
                for arm in plan.ratios
            ],
        )
    ]


def schedule(run: Run) -> list[Claim]:
    """The three phases against one cosine to the same last rate."""
    plan = PLAN[run.budget]
    if not plan.schedules:
        return []
    models, rates = _models(run, plan.schedules)
    ours, cosine = ([m["bits_per_byte"] for m in models[arm]] for arm in plan.schedules)
    return [
        Claim(
            name="three-phase-schedule",
            statement="A decay that an annealing over the last 5 % ends gives a lower loss than one cosine.",
            paper="a gradual decay, then the last 5 % annealed to a tenth of the peak; not compared (section 2.3.2)",
            criterion=below(0),
            values=_differences(ours, cosine),
            unit="bits per byte",
            baseline=f"a cosine from the same peak to the same tenth of it; {EQUAL}",
            notes=f"{plan.size} parameters, {plan.steps} updates. The paper also keeps the best data for the "
            f"last 5 %; here they are like the rest. Learning rates: {rates['recycle']:g} and, with the cosine, "
            f"{rates['cosine']:g}.",
        )
    ]


def scaling_law(run: Run) -> list[Claim]:
    """Parabolas at equal compute and power laws through their minima, from trainings of our own."""
    plan = PLAN[run.budget]
    if not plan.isoflops:
        return []  # too short a training says nothing about size
    cells = [(compute, dim) for compute, dims in plan.isoflops.items() for dim in dims]
    run.plan(len(cells) * len(run.seeds))
    rows = [[_isoflop_row(run, compute, dim, seed) for compute, dim in cells] for seed in run.seeds]
    fits = [fit_isoflops(row, bootstrap=0) for row in rows]
    pooled = fit_isoflops([r for row in rows for r in row])
    whole = [fit_isoflops([r | {"params": r["with_embedding"]} for r in row], bootstrap=0) for row in rows]
    beyond = sum(not c.inside for fit in fits for c in fit.curves)
    notes = (
        f"{len(cells)} trainings per seed: {ISOFLOP['layers']} layers, {min(d for _, d in cells)} to "
        f"{max(d for _, d in cells)} wide, one shared and {ISOFLOP['experts']} specialized experts, "
        f"{ISOFLOP_VOCABULARY} tokens of vocabulary, held-out Wikipedia leads. The interval is over the seeds' own "
        f"fits; {beyond} of their {len(fits) * len(pooled.curves)} minima over N lie beyond the sizes measured.\n\n"
        "N counts the activated parameters that multiply something: all but the embedding, which is a large part of "
        "models this narrow, costs no operation, and grows with the width alone. With it, N_opt has the exponent "
        f"{t_interval([f.params_exponent.value for f in whole])}. C counts the products of these models, not "
        "9.59·N·D + 2.3e8·D. The learning rate is 0.48/width for every budget. This rule, the widths and the "
        "budgets come from a pilot on another seed. The paper's models had 10M to 1B, its budgets from 5e18."
    )
    table = [
        {
            "operations": f"{n.compute:.3g}",
            "widths": ", ".join(str(dim) for dim in dims),
            "best params": f"{n.best:,.0f}",
            "best tokens": f"{d.best:,.0f}",
            "bits per byte": f"{n.least:.3f}",
        }
        for n, d, dims in zip(pooled.curves, pooled.token_curves, plan.isoflops.values(), strict=True)
    ]

    def claim(name: str, letter: str, law: str, what: str, papers: float, **more: Any) -> Claim:
        return Claim(
            name=f"isoflop-{law}",
            statement=f"The compute-optimal {what} grow as a power of the compute, with the paper's exponent.",
            paper=f"{letter}_opt ∝ C^{papers:g} (section 2.3.1)",
            criterion=within(papers - SAME_EXPONENT, papers + SAME_EXPONENT),
            values=[getattr(fit, f"{law}_exponent").value for fit in fits],
            unit=f"exponent of {letter}_opt",
            baseline=f"none: a fit to {len(pooled.curves)} budgets of equal compute; over all seeds at once it is "
            f"{getattr(pooled, f'{law}_exponent')} by bootstrap",
            notes=notes,
            **more,
        )

    return [
        claim(
            "params",
            "N",
            "params",
            "activated parameters",
            PAPERS_PARAMS.exponent,
            table=table,
            figure=isoflop_figure(pooled, ylabel="validation bits per byte"),
            caption="Left: loss by activated parameters at equal compute, all seeds; crosses: minima. Right: the "
            "power laws through the minima; the paper's, far outside of its range, are dotted.",
        ),
        claim("tokens", "D", "tokens", "tokens", PAPERS_TOKENS.exponent),
    ]


def cache(run: Run) -> list[Claim]:
    """What grouped queries and shared layers save of the cache, and what they cost."""
    run.plan(len(run.seeds))
    results = [run.measure(f"cache/seed{s}", papers_cache, tokens=8 + s, seed=FIRST_SEED + s) for s in run.seeds]
    table = [{"cache": name, "bytes per token": results[0][name]} for name in results[0]]
    claims = [
        Claim(
            name="cache-5-percent",
            statement="GQA and CLA together leave 5 % of the cache of multi-head attention.",
            paper="nearly 95 % saved (section 2.2.2, table 2)",
            criterion=within(4.999, 5.001),
            values=[100 * r["GQA+CLA"] / r["MHA"] for r in results],
            unit="% of the bytes",
            baseline="MHA with the same 64 layers and 80 heads of 80 in bfloat16",
            notes="Bytes of the storage of a filled cache object; the released code writes a copy per layer, and "
            "saves nothing by CLA.",
            table=table,
        )
    ]
    plan = PLAN[run.budget]
    if plan.caches:
        models, rates = _models(run, plan.caches)
        loss = {arm: [m["bits_per_byte"] for m in models[arm]] for arm in plan.caches}
        claims.append(
            Claim(
                name="small-cache-loss",
                statement=f"GQA and CLA together cost at most {MARGIN:g} % of multi-head attention's loss.",
                paper="little impact on performance is implied; no ablation",
                criterion=below(MARGIN),
                values=_percent(loss["recycle"], loss["MHA"]),
                unit="% of MHA's bits per byte",
                baseline=f"MHA, with the parameters that it has more; {EQUAL}",
                notes=f"{plan.size} parameters, {plan.steps} updates; one key head for four query heads.",
                table=[
                    {
                        "attention": "GQA+CLA" if arm == "recycle" else arm,
                        "bits per byte": t_interval(loss[arm]),
                        "cache bytes per token": models[arm][0]["cache_bytes"],
                        "parameters": models[arm][0]["parameters"],
                        "learning rate": rates[arm],
                    }
                    for arm in plan.caches
                ],
            )
        )
    return claims


def _isoflop_row(run: Run, compute: float, dim: int, seed: int) -> dict[str, Any]:
    row = run.measure(
        f"isoflop/{compute:g}/{dim}/seed{seed}",
        isoflop_run,
        dim=dim,
        compute=compute,
        lr=isoflop_lr(dim),
        seed=FIRST_SEED + seed,
    )
    if row["loss"] is None:
        raise RuntimeError(f"the training of width {dim} on {compute:g} operations diverged")
    return row


def _models(
    run: Run, arms: Sequence[str], more: Mapping[str, dict[str, Any]] | None = None
) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """Each arm's learning rate, and its trainings with it, one per seed; what was measured before is not again.

    `more` are an arm's settings beside the learning rate's search.
    """
    size, steps = PLAN[run.budget][:2]
    run.plan(len(arms) * (len(RATES) + len(run.seeds)))
    models, rates = {}, {}
    for arm in arms:
        key, settings = f"{size}/{arm.replace(' ', '-')}", {"size": size, "arm": arm, "steps": steps}
        rates[arm] = run.tune(key, language_model, "bits_per_byte", lr=RATES, **settings)
        settings |= (more or {}).get(arm, {})
        models[arm] = [
            run.measure(f"{key}/seed{seed}", language_model, lr=rates[arm], seed=FIRST_SEED + seed, **settings)
            for seed in run.seeds
        ]
        if any(m["bits_per_byte"] is None for m in models[arm]):
            raise RuntimeError(f"{arm}: a training diverged at the learning rate that was best for the tuning seed")
    return models, rates


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(ours, theirs, strict=True)]


def _percent(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [100 * (x / y - 1) for x, y in zip(ours, theirs, strict=True)]
