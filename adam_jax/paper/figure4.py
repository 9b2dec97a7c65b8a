"""Figure 4: what bias correction does to a variational auto-encoder (Section 6.4)."""

import itertools
import math

import numpy as np

from adam_jax.paper import data, problems
from adam_jax.paper.lab import MNIST, Figure, Lab, Plan, caption, mnist_train, subset
from adam_jax.paper.methods import METHODS
from adam_jax.paper.results import Claim, Curve, Panel, Result, Table
from adam_jax.paper.training import Curves, Job

__all__ = ["FIG4"]

B1, B2 = (0.0, 0.9), (0.99, 0.999, 0.9999)
LARGE = -3  # log10 of the step sizes from which on alpha counts as large: the usual 1e-3
FLAT = 784 * math.log(2)  # nats of an auto-encoder that says one half for every pixel: what has diverged counts as this
Found = dict[tuple[str, float, float], Curves]


def _fig4(lab: Lab, plan: Plan, digits: data.Dataset) -> Result:
    """The auto-encoder over b1, b2 and alpha, early and late in training."""
    x, y = subset(digits, plan)
    exponents = np.linspace(-5, -1, plan.alphas or 5)
    problem = problems.autoencoder(x.shape[1])
    jobs = {}
    for method, b1, b2 in itertools.product(("adam", "adam_uncorrected"), B1, B2):
        grid = {"alpha": 10.0**exponents, "b1": np.full(exponents.shape, b1), "b2": np.full(exponents.shape, b2)}
        name, seeds = f"{method}-{b1}-{b2}", lab.seeds_of(plan)
        jobs[method, b1, b2] = Job(name, method, problem, x, y, grid, seeds, plan.epochs, records=1)
    found = dict(zip(jobs, lab.train("VAE with and without bias correction", list(jobs.values())), strict=True))
    epochs = sorted({max(1, plan.epochs // 10), plan.epochs})
    capped = f"losses above {FLAT:.0f}, one half for every pixel, are drawn as that, and so is what diverged"
    return Result(
        f"Figure 4: bias correction on and off, VAE on {digits.title}",
        [_panel(found, exponents, *which) for which in itertools.product(epochs, B1, B2)],
        [_table(found, exponents, plan.epochs)],
        [claim for epoch in epochs for claim in (_unstable(found, exponents >= LARGE, epoch), _no_worse(found, epoch))],
        {
            "data": digits.name,
            "source": digits.source,
            "plan": vars(plan),
            "log10_alpha": exponents.tolist(),
            "b1": B1,
            "b2": B2,
            "problem": problem.settings,
        },
        caption(digits, len(x), plan, lab.quick, "at b1 = 0 without correction it is RMSProp", capped),
        columns=len(B2),
        shared=True,
        curves={f"loss|{m}|b1={b1:g}|b2={b2:g}|seed, alpha, epoch": run.costs for (m, b1, b2), run in found.items()},
    )


FIG4 = Figure(
    "fig4",
    "bias correction in a VAE",
    MNIST,
    "--epochs 10 --seeds 1, of 100 and 3: 54 min on one core",
    full=Plan(epochs=100, seeds=3, search=0),
    quick=Plan(epochs=4, seeds=2, search=0, examples=640, alphas=5),
    data=mnist_train,
    make=_fig4,
)


def _losses(found: Found, method: str, b1: float, b2: float, epoch: int) -> np.ndarray:
    """Losses [seeds, alphas] in that epoch; what is worse than saying nothing, or not a number, counts as saying nothing."""
    losses = found[method, b1, b2].costs[..., epoch - 1]
    return np.minimum(np.where(np.isfinite(losses), losses, FLAT), FLAT)


def _panel(found: Found, exponents: np.ndarray, epoch: int, b1: float, b2: float) -> Panel:
    curves = [
        Curve(METHODS[method].label, exponents, _losses(found, method, b1, b2, epoch), METHODS[method].colour, dashed)
        for method, dashed in (("adam", False), ("adam_uncorrected", True))
    ]
    return Panel(f"epoch {epoch}: b1 = {b1:g}, b2 = {b2:g}", "log10 alpha", "loss, nats", curves)


def _table(found: Found, exponents: np.ndarray, epoch: int) -> Table:
    rows = []
    for method, b1, b2 in found:
        losses = _losses(found, method, b1, b2, epoch)
        lost = (losses >= FLAT).sum(0)
        flat = [f"{exponent:g} ({n} of {len(losses)})" for exponent, n in zip(exponents, lost, strict=True) if n]
        losses = losses.mean(0)
        best = int(np.argmin(losses))
        found_best = f"{losses[best]:.2f} at {exponents[best]:g}"
        rows.append([METHODS[method].label, f"{b1:g}", f"{b2:g}", found_best, ", ".join(flat) or "none"])
    columns = ["optimizer", "b1", "b2", "best loss at log10 alpha", "diverged at log10 alpha (seeds)"]
    return Table(f"epoch {epoch}, losses capped at {FLAT:.0f}, one half for every pixel", columns, rows)


def _unstable(found: Found, large: np.ndarray, epoch: int) -> Claim:
    """The loss that correction saves at large step sizes, by b2."""
    saved = {}
    for b2 in B2:
        pairs = [[_losses(found, m, b1, b2, epoch)[:, large] for m in ("adam_uncorrected", "adam")] for b1 in B1]
        saved[b2] = float(np.mean([without - corrected for without, corrected in pairs]))
    return Claim(
        "without bias correction, b2 close to 1 is unstable at large alpha (correction lowers the mean loss over "
        f"alpha >= 1e{LARGE} at b2 = .9999, and by more than at b2 = .99; epoch {epoch})",
        saved[B2[-1]] > max(saved[B2[0]], 0.0),
        "lowered by " + ", ".join(f"{value:.2f} at b2 = {b2:g}" for b2, value in saved.items()),
    )


def _no_worse(found: Found, epoch: int) -> Claim:
    pairs = []
    for b2 in B2:
        adam, rmsprop = (_losses(found, *which, b2, epoch).mean(0) for which in (("adam", 0.9), ("adam_uncorrected", 0.0)))
        pairs += zip(adam.tolist(), rmsprop.tolist(), strict=True)
    good = sum(adam <= 1.01 * rmsprop for adam, rmsprop in pairs)
    worst = max(adam / rmsprop for adam, rmsprop in pairs)
    return Claim(
        f"Adam (b1 = .9) does as well as RMSProp or better at every alpha and b2 (within 1 %; epoch {epoch})",
        good == len(pairs),
        f"at {good} of {len(pairs)} settings; at worst {worst:.3f} times RMSProp's loss",
    )
