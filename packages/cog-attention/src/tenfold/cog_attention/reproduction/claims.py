"""The paper's claims as measurements. Criteria stand here, before any run; the trainings are in `experiments`."""

import math
from collections.abc import Sequence
from dataclasses import replace

from tenfold.core.claims import Claim, Run, above, below, t_interval
from tenfold.core.claims.figures import bars, gallery, lines, panels

from .experiments import ARMS, PROBE_LENGTHS, diffusion_model, language_model, subtraction

# Where the search for a learning rate begins: it goes on until the best is inside (Run.tune).
RATES = {"language": (4e-3, 8e-3, 1.6e-2), "diffusion": (4e-3, 8e-3, 1.6e-2)}
ALL, NO_DIFFERENTIAL, MAIN = tuple(ARMS), ("softmax", "Cog", "Cog in every layer"), ("softmax", "Cog")
CELLS = {  # by size of the model: updates (the learning rate is tuned at the last), and the attentions compared
    "quick": {"0.33M": ((30, 60), MAIN)},
    "default": {"0.33M": ((100, 300), NO_DIFFERENTIAL), "1.1M": ((80, 200), MAIN)},
    "full": {"0.33M": ((300, 1000, 3000), ALL), "1.1M": ((300, 1000), ALL), "1.5M": ((300, 1200), MAIN)},
}
DIFFUSION_STEPS = {"quick": 30, "default": 120, "full": 1000}
SUBTRACTION_STEPS = {"quick": 300, "default": 500, "full": 2000}

EQUAL = "same data and order, parameters, initial weights, updates; each arm's learning rate tuned in the same way"


def language_loss(run: Run) -> list[Claim]:
    """Cog against softmax over sizes and lengths of training, and against all-Cog and differential attention."""
    cells = CELLS[run.budget]
    run.plan(sum(len(a) * (len(RATES["language"]) + len(s) * len(run.seeds)) for s, a in cells.values()))
    claims = [claim for size, (lengths, arms) in cells.items() for claim in _size_claims(run, size, lengths, arms)]
    by_name = {claim.name: claim for claim in claims}
    trend = []
    for size, (lengths, _) in cells.items():
        for steps in lengths:
            claim = by_name[f"lm-{size}-{steps}"]
            row = {"model": size, "updates": steps, "Cog minus softmax": str(claim.interval), "verdict": claim.verdict}
            trend.append(row)
    first = replace(
        claims[0], table=trend, notes=f"{claims[0].notes} The table is the trend over all, in bits per byte."
    )
    return [first, *claims[1:]]


def _size_claims(run: Run, size: str, lengths: Sequence[int], arms: Sequence[str]) -> list[Claim]:
    rates = {arm: _language_rate(run, size, arm) for arm in arms}
    losses = {arm: [_losses(run, size, arm, rates[arm], steps) for steps in lengths] for arm in arms}
    last = {arm: losses[arm][-1] for arm in arms}
    chosen = ", ".join(f"{arm} {rates[arm]:g}" for arm in arms)
    curves = {arm: list(zip(*losses[arm], strict=True)) for arm in arms}
    shown = {  # with the longest training
        "table": _loss_table(last, rates),
        "figure": lines(lengths, curves, xlabel="updates", ylabel="validation bits per byte", log="x"),
        "caption": f"Validation loss of the {size} models; every point is a training with its own schedule.",
    }
    claims = [
        Claim(
            name=f"lm-{size}-{steps}",
            statement=f"A {size} language model has a lower loss with Cog attention after {steps} updates.",
            paper="better than softmax from 141 M to 1 B parameters (abstract); the released 141 M models differ by "
            "0.6 points of mean accuracy over seven tasks (the authors' logs, 100 B tokens)",
            criterion=below(0),
            values=_differences(losses["Cog"][i], losses["softmax"][i]),
            unit="bits per byte",
            baseline=f"softmax Llama; {EQUAL}",
            notes=f"Softmax in the first and last layer, as in the paper's models. Learning rates, chosen by a run of "
            f"{lengths[-1]} updates: {chosen}.",
            **(shown if steps == lengths[-1] else {}),
        )
        for i, steps in enumerate(lengths)
    ]
    for name, other, statement, paper in (
        (
            "placement",
            "Cog in every layer",
            f"A {size} model with softmax in its first and last layer is better than Cog in every layer.",
            "the rule of the paper's models, for their convergence; the ablation's numbers were not found",
        ),
        (
            "differential",
            "differential",
            f"A {size} model has a lower loss with Cog than with differential attention.",
            "compared at small size (reviews of a later version); the numbers were not found",
        ),
    ):
        if other in arms:
            claims.append(
                Claim(
                    name=f"lm-{size}-{name}",
                    statement=statement,
                    paper=paper,
                    criterion=below(0),
                    values=_differences(last["Cog"], last[other]),
                    unit="bits per byte",
                    baseline=f"{other}, {lengths[-1]} updates; {EQUAL}",
                    notes="The loss at every length is in the figure and table of the loss against softmax.",
                )
            )
    return claims


def collapse(run: Run) -> list[Claim]:
    """The paper's representational difference, and where the mass of all attention paths goes."""
    size, steps, models = _largest_models(run)
    claims = []
    for probe in ("find_a_zero", "count_ones"):
        gaps = {arm: [m["gaps"][probe] for m in models[arm]] for arm in models}
        figure, axes = panels("raw", f"divided by its value at {PROBE_LENGTHS[0]}")
        for panel, scale in zip(axes, (lambda g: 1.0, lambda g: g[0]), strict=True):
            series = {arm: [[x / scale(g) for x in g] for g in values] for arm, values in gaps.items()}
            lines(PROBE_LENGTHS, series, xlabel="ones in the prompt", ylabel="difference", axes=panel)
        ratios = [
            sum(math.log(x / y) for x, y in zip(*pair, strict=True)) / len(PROBE_LENGTHS)
            for pair in zip(gaps["Cog"], gaps["softmax"], strict=True)
        ]
        slower = [
            math.log(c[-1] / c[0]) - math.log(s[-1] / s[0]) for c, s in zip(gaps["Cog"], gaps["softmax"], strict=True)
        ]
        claims.append(
            Claim(
                name=f"collapse-{probe}",
                statement=f"Cog attention keeps two nearly equal prompts ({probe}) further apart than softmax.",
                paper="robust against representational collapse (abstract); relative difference at n = 1000 in the "
                "authors' figure: " + {"find_a_zero": ".239 against .103", "count_ones": ".191 against .043"}[probe],
                criterion=above(0),
                values=ratios,
                unit="ln (Cog / softmax), mean over prompt lengths",
                baseline=f"softmax Llama, {size}, {steps} updates, paired by seed",
                notes="Mean over slices of max |h − h'| at the last position after the final norm. The paper shows it "
                "divided by its value at the shortest prompt, which hides the level: measured that way at the longest "
                f"prompt, ln (Cog / softmax) is {t_interval(slower)}.",
                figure=figure,
                caption="Difference between the two prompts' last states, mean and 95 % interval over seeds.",
            )
        )
    early = {arm: [m["path"]["early"] for m in models[arm]] for arm in models}
    claims.append(
        Claim(
            name="path-mass",
            statement="Less of what reaches the last token along attention paths comes from the first 8 tokens.",
            paper="signed weights cancel along paths and so lessen over-squashing (introduction; not measured there)",
            criterion=below(0),
            values=_differences(early["Cog"], early["softmax"]),
            unit="L1 mass",
            baseline=f"softmax Llama, {size}, {steps} updates, paired by seed",
            notes="The last row of Π (A + I)/2 over layers, A averaged over heads, on held-out text; our own measure.",
            table=[
                {
                    "attention": arm,
                    "all tokens": t_interval([m["path"]["total"] for m in models[arm]]),
                    "first 8 of 128": t_interval(early[arm]),
                }
                for arm in models
            ],
        )
    )
    return claims


def heads(run: Run) -> list[Claim]:
    """Whether Cog heads use both signs, and how much attention sinks into the first token."""
    size, steps, models = _largest_models(run)
    inner = slice(1, -1)  # the layers that are Cog
    both = [_share(m["balance"][inner], lambda x: x > 0.25) for m in models["Cog"]]
    sinks = {arm: [_mean(m["sink"][inner]) for m in models[arm]] for arm in models}
    layers = range(len(models["Cog"][0]["negative"]))
    where = f"{size}, {steps} updates, held-out text"
    return [
        Claim(
            name="heads-copy-and-delete",
            statement="Most Cog heads copy some tokens and delete others.",
            paper="one head can copy, delete or retain tokens: positive, negative or minimal weights (abstract)",
            criterion=above(0.5),
            values=both,
            unit="share of heads",
            baseline="no softmax head deletes by its weights: its share is 0",
            notes=f"A head counts if it does the rarer of the two at least a quarter as often as the other; {where}. "
            "OV: the mean cosine between what a head writes for a token and the direction that predicts that token.",
            table=[
                {
                    "layer": layer,
                    "attention": "softmax" if layer in (0, layers[-1]) else "Cog",
                    "L1 mass on negative weights": t_interval([m["negative"][layer] for m in models["Cog"]]),
                    "pairs copied": t_interval([_mean([m["copy"][layer]]) for m in models["Cog"]]),
                    "pairs deleted": t_interval([_mean([m["delete"][layer]]) for m in models["Cog"]]),
                    "row sum, std": t_interval([m["row_sum_std"][layer] for m in models["Cog"]]),
                    "OV towards the token": t_interval([_mean([m["ov"][layer]]) for m in models["Cog"]]),
                    "the same, softmax model": t_interval([_mean([m["ov"][layer]]) for m in models["softmax"]]),
                }
                for layer in layers
            ],
            figure=bars(
                [f"layer {layer}" for layer in layers],
                {"negative": [m["negative"] for m in models["Cog"]]},
                ylabel="L1 mass on negative weights",
            ),
            caption="How much of the attention is negative, by layer; the first and last layer keep softmax.",
        ),
        Claim(
            name="attention-sink",
            statement="Cog layers put less weight on the first token than softmax layers do.",
            paper="not in the text seen here; asked because a weight near 0 needs no sink to go to",
            criterion=below(0),
            values=_differences(sinks["Cog"], sinks["softmax"]),
            unit="mean |weight| on token 0",
            baseline=f"the same layers of a softmax Llama; {where}",
            table=[{"attention": arm, "sink, inner layers": t_interval(sinks[arm])} for arm in sinks],
        ),
    ]


def one_head_subtraction(run: Run) -> list[Claim]:
    """One head that must copy one token and delete another."""
    steps = SUBTRACTION_STEPS[run.budget]
    run.plan(4 * len(run.seeds))
    errors = {
        (attention, n): [
            run.measure(
                f"subtraction/{attention}-{n}/seed{seed}",
                subtraction,
                attention=attention,
                heads=n,
                seed=seed,
                steps=steps,
            )["error"]
            for seed in run.seeds
        ]
        for attention in ("softmax", "cog")
        for n in (1, 2)
    }
    return [
        Claim(
            name="one-head-subtracts",
            statement="One Cog head answers the difference of two marked tokens, which one softmax head cannot.",
            paper="a single head copies and deletes at once (introduction, indirect-object heads); no number given",
            criterion=below(-0.4),
            values=_differences(errors["cog", 1], errors["softmax", 1]),
            unit="relative squared error",
            baseline="a softmax head with the same parameters and training; its floor is 0.5 by convexity",
            notes="Isolated from language: tokens are random vectors, two are marked, queries and keys see the marks. "
            "With a second head softmax can subtract too, through an output matrix of the other sign: see the table.",
            table=[
                {"attention": attention, "heads": n, "error": t_interval(values)}
                for (attention, n), values in errors.items()
            ],
            figure=bars(
                ["one head", "two heads"],
                {
                    attention: list(zip(errors[attention, 1], errors[attention, 2], strict=True))
                    for attention in ("softmax", "cog")
                },
                ylabel="relative squared error",
            ),
            caption="Error of the answer, 0 perfect and 1 for answering nothing.",
        )
    ]


def diffusion_loss(run: Run) -> list[Claim]:
    """U-ViC against U-ViT on real images."""
    steps = DIFFUSION_STEPS[run.budget]
    run.plan(2 * (len(RATES["diffusion"]) + len(run.seeds)))
    rates, losses = {}, {}
    for attention in ("softmax", "cog"):
        rates[attention] = run.tune(
            f"uvic/{attention}", diffusion_model, "loss", lr=RATES["diffusion"], attention=attention, steps=steps
        )
        losses[attention] = [
            run.measure(
                f"uvic/{attention}/seed{seed}",
                diffusion_model,
                attention=attention,
                steps=steps,
                lr=rates[attention],
                seed=seed,
                samples=12 if seed == run.seeds[0] else 0,
            )
            for seed in run.seeds
        ]
    values = {attention: [_finite(m["loss"]) for m in losses[attention]] for attention in losses}
    return [
        Claim(
            name="uvic-loss",
            statement=f"U-ViC has a lower noise-prediction loss than U-ViT after {steps} updates on Fashion-MNIST.",
            paper="FID on MS-COCO 5.855 (900 K steps) against 5.996 for the retrained U-ViT-S/2 (850 K), which its own "
            "authors report at 5.95 (the authors' logs)",
            criterion=below(0),
            values=_differences(values["cog"], values["softmax"]),
            unit="mean squared error per pixel",
            baseline=f"U-ViT: {EQUAL}",
            notes="FID means nothing at this size; the loss over held-out images at fixed times and noises is what is "
            "compared. Learning rates: " + ", ".join(f"{a} {r:g}" for a, r in rates.items()) + ".",
            table=[
                {
                    "model": {"softmax": "U-ViT", "cog": "U-ViC"}[attention],
                    "parameters": losses[attention][0]["parameters"],
                    "loss": t_interval(values[attention]),
                }
                for attention in losses
            ],
            figure=gallery({"U-ViT": losses["softmax"][0]["images"], "U-ViC": losses["cog"][0]["images"]}),
            caption="Images drawn from the two models of the first seed, from the same starting noise (50 DDIM steps).",
        )
    ]


def _language_rate(run: Run, size: str, arm: str) -> float:
    key, steps = f"lm/{size}/{_slug(arm)}", CELLS[run.budget][size][0][-1]
    return run.tune(key, language_model, "bits_per_byte", lr=RATES["language"], size=size, arm=arm, steps=steps)


def _losses(run: Run, size: str, arm: str, lr: float, steps: int) -> list[float]:
    return [_finite(m["bits_per_byte"]) for m in _models(run, size, arm, lr, steps)]


def _models(run: Run, size: str, arm: str, lr: float, steps: int) -> list[dict]:
    return [
        run.measure(
            f"lm/{size}/{_slug(arm)}/{steps}/seed{seed}",
            language_model,
            size=size,
            arm=arm,
            steps=steps,
            lr=lr,
            seed=seed,
        )
        for seed in run.seeds
    ]


def _largest_models(run: Run) -> tuple[str, int, dict[str, list[dict]]]:
    """The measured models of the largest size, trained longest: those of `language_loss`, so nothing new is trained."""
    size, (lengths, _) = list(CELLS[run.budget].items())[-1]
    arms = ("softmax", "Cog")
    return (
        size,
        lengths[-1],
        {arm: _models(run, size, arm, _language_rate(run, size, arm), lengths[-1]) for arm in arms},
    )


def _loss_table(losses: dict[str, list[float]], rates: dict[str, float]) -> list[dict]:
    return [
        {
            "attention": arm,
            "bits per byte": t_interval(values),
            "minus softmax": t_interval(_differences(values, losses["softmax"])),
            "learning rate": rates[arm],
        }
        for arm, values in losses.items()
    ]


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(ours, theirs, strict=True)]


def _finite(loss: float | None) -> float:
    if loss is None:
        raise RuntimeError("a training diverged at the learning rate that was best for the tuning seed")
    return loss


def _mean(rows: Sequence) -> float:
    flat = [x for row in rows for x in (row if isinstance(row, list) else [row])]
    return sum(flat) / len(flat)


def _share(rows: Sequence[list[float]], condition) -> float:
    return _mean([[float(condition(x)) for x in row] for row in rows])


def _slug(arm: str) -> str:
    return arm.lower().replace(" ", "-")
