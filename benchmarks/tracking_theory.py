"""The claims of docs/geometry.md about tracked Gram matrices, each simulated where the truth is known.

Gradients are drawn: a mean gradient of each objective, and Gaussian noise in every direction alike, so that there is
something to compare with. The estimator is written here once more, for many repetitions at a time: what is tested is
the formulas. Tables (--only NAME ...):

- weights: min-norm weights of one mini-batch, beside those of the mean gradients and inverse-variance weights.
- bound: how much of its bound the distance of such weights attains, on random matrices.
- alignment: what a mini-batch says of an objective that the direction hurts.
- estimators: bias and spread of three ways to take the noise out of an average.
- errors: standard errors, beside the spread that they stand for.
- reach: up to which noise scale anything is believed.
- shares: the weights that come out, beside those of the mean gradients.
- guarantee: whether a guarantee of descent guards anybody, by the Gram matrix that it is given.
- drift: an objective that turns, for three decays.
- sketches: the error of a sketch, beside its bound.
- clocks: an objective that is seen at every fifth step.
- microbatches: what products within a step would add.
- steps: what the steps' own reaction to noise adds.
- epochs: what drawing without replacement adds.
- scale_changes: what the noise scale says after all gradients were scaled.

± is two standard errors of the mean of the repetitions.

Run: python benchmarks/tracking_theory.py [--quick] [--seed 0] [--only NAME ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from numpy.typing import NDArray

from mogeo import descent_weights, min_norm_weights
from mogeo.geometry.projection import SignedSketch

Array = NDArray[Any]
Row = dict[str, Any]
DECAY = 0.95


# --------------------------------------------------------------------------------------------------------------------
# The estimator


class Tracked:
    """`repetitions` runs side by side: averages, U-statistics and their standard errors, as docs/geometry.md has them.

    Args:
        repetitions: R.
        objectives: K.
        decay: β.
        own_clock: whether weights decay per step in which the objective is present; else at every step.
    """

    def __init__(self, repetitions: int, objectives: int, decay: float = DECAY, own_clock: bool = True) -> None:
        shape = (repetitions, objectives, objectives)
        self.decay, self.own_clock = decay, own_clock
        self.sums: Array = np.zeros((repetitions, objectives, 1), np.float32)  # Σ u s, [R, K, N] from the first step on
        self.totals = np.zeros(objectives)  # Σ u
        self.same, self.pairs = np.zeros(shape), np.zeros(shape[1:])  # Σ u_i u_j ⟨s_i, s_j⟩ and Σ u_i u_j of one step
        self.grams, self.gram_totals = (
            np.zeros(shape),
            np.zeros(shape[1:]),
        )  # the average of mini-batches' Gram matrices
        self.last, self.seen = np.zeros(shape), np.zeros(shape[1:], bool)  # products of the old average with the new
        self.half_squares, self.half_products = np.zeros(shape), np.zeros(shape)  # of their successive differences
        self.weight, self.square_weight, self.joint_weight = (np.zeros(shape[1:]) for _ in range(3))

    def step(self, gradients: Array, present: Array | None = None) -> None:
        """Take in a step's gradients [R, K, N], of the objectives that are present [K]."""
        here = np.ones(gradients.shape[1], bool) if present is None else present
        decay = np.where(here, self.decay, 1.0) if self.own_clock else np.full(here.shape, self.decay)
        both = here[:, None] & here[None, :]
        if self.sums.shape[2] == 1:
            self.sums = np.zeros_like(gradients)

        products = inner(self.sums, gradients) / np.maximum(self.totals, 1e-300)[:, None]
        able = (self.totals > 0)[:, None] & here[None, :]
        counted = able & self.seen
        joint = counted & counted.T
        change = products - self.last
        self.half_squares = decayed(self.half_squares, self.decay, able, counted * change**2 / 2)
        self.weight = decayed(self.weight, self.decay, able, counted)
        self.square_weight = decayed(self.square_weight, self.decay**2, able, counted)
        self.half_products = decayed(self.half_products, self.decay, joint, change * change.swapaxes(1, 2) / 2)
        self.joint_weight = decayed(self.joint_weight, self.decay, joint, joint)
        self.last = np.where(able, products, self.last)
        self.seen |= able

        gram = inner(gradients, gradients)
        self.same = self.same * np.outer(decay, decay) + both * gram
        self.pairs = self.pairs * np.outer(decay, decay) + both
        self.grams = decayed(self.grams, self.decay, both, gram)
        self.gram_totals = decayed(self.gram_totals, self.decay, both, both)
        self.sums = self.sums * decay.astype(np.float32)[:, None] + gradients * here[:, None].astype(np.float32)
        self.totals = self.totals * decay + here

    @property
    def shares(self) -> Array:
        """c_ij, [K, K]."""
        return self.pairs / np.outer(self.totals, self.totals)

    @property
    def averages(self) -> Array:
        """B, [R, K, K]: the Gram matrix of the averages, noise and all."""
        return inner(self.sums, self.sums) / np.outer(self.totals, self.totals)

    @property
    def less_the_average(self) -> Array:
        """(B − cA)/(1 − c): right if the noise is the same at all steps."""
        return (self.averages - self.shares * self.grams / self.gram_totals) / (1 - self.shares)

    @property
    def estimate(self) -> Array:
        """Ĝ = (B − C)/(1 − c), [R, K, K]."""
        return (self.averages - self.same / np.outer(self.totals, self.totals)) / (1 - self.shares)

    def variance(self, few_samples: bool = True) -> Array:
        """The bound on the variance of `estimate`, [R, K, K]; with or without the factor ν/(ν − 2)."""
        own = np.diag(self.shares)
        spread = self.half_squares / np.maximum(self.weight, 1e-300)
        joint = self.half_products / np.maximum(self.joint_weight, 1e-300)
        bound = own[None, :] * spread + own[:, None] * spread.swapaxes(1, 2) + 2 * self.shares * joint
        freedom = 2 / 3 * self.weight**2 / np.maximum(self.square_weight, 1e-300)
        factor = np.where(freedom > 2, freedom / np.maximum(freedom - 2, 1e-300), np.inf)
        return bound * factor if few_samples else bound


def inner(first: Array, second: Array) -> Array:
    """⟨first_i, second_j⟩, fp64 [R, K, K] of [R, K, N]."""
    return np.asarray(first @ second.swapaxes(1, 2), np.float64)


def decayed(sums: Array, decay: float, where: Array, new: Array) -> Array:
    """A sum with weights that decay, where something comes in."""
    return np.where(where, decay * sums + new, sums)


def evidence(estimate: Array, error: Array) -> Array:
    """0 up to two standard errors, 1 from three on."""
    return np.clip(estimate / error - 2, 0, 1)


def believed(estimate: Array, error: Array, averages: Array, doubt_products: bool = False) -> Array:
    """Of one run [K, K]: as far as there is evidence of both lengths, or of each product; then floored and clipped."""
    trust = evidence(np.diag(estimate), np.diag(error))
    kept = estimate * (evidence(np.abs(estimate), error) if doubt_products else np.minimum.outer(trust, trust))
    np.fill_diagonal(kept, np.maximum(np.diag(estimate), np.minimum(np.diag(error), np.diag(averages))))
    values, vectors = np.linalg.eigh(kept)
    return np.asarray((vectors * np.maximum(values, 0)) @ vectors.T)


def blended(found: Array, preference: Array, trust: Array) -> Array:
    """Shares [K]: what the weighting says where it is founded, the preference elsewhere."""
    founded = trust * found
    total = founded.sum()
    return (1 - trust) * preference + ((trust @ preference) * founded / total if total > 0 else trust * preference)


# --------------------------------------------------------------------------------------------------------------------
# What is drawn


def noise(rng: np.random.Generator, repetitions: int, lengths: Array, size: int) -> Array:
    """[R, K, N], E‖ε_k‖² = lengths_k²."""
    drawn = rng.standard_normal((repetitions, len(lengths), size), dtype=np.float32)
    return drawn * (np.asarray(lengths) / size**0.5).astype(np.float32)[:, None]


def mean_gradients(rng: np.random.Generator, cosines: Array, lengths: Array, size: int) -> Array:
    """[K, N] with given cosines and lengths."""
    basis = np.linalg.qr(rng.normal(size=(size, len(lengths))))[0]
    return np.ascontiguousarray((np.linalg.cholesky(cosines) @ basis.T) * np.asarray(lengths)[:, None], np.float32)


def problem(rng: np.random.Generator, share: float, size: int) -> tuple[Array, Array, Array]:
    """Mean gradients [4, N], the lengths of their noise [4], losses [4]; `share` of E‖g‖² is noise, on average."""
    spread = rng.normal(size=(4, 6))
    cosines = spread @ spread.T / np.outer(*2 * [np.linalg.norm(spread, axis=1)])
    means = mean_gradients(rng, cosines, np.exp(rng.normal(0, 0.3, 4)), size)
    sigma = (share / (1 - share)) ** 0.5 * np.exp(rng.normal(0, 0.3, 4))
    return means, sigma, rng.uniform(0.3, 0.7, 4)


def min_norm(gram: Array) -> Array:
    return min_norm_weights(torch.from_numpy(np.ascontiguousarray(gram))).weights.numpy()


def decoupled(gram: Array, losses: Array) -> Array:
    """Weights of MGDA-Decoupled."""
    return min_norm(gram / np.outer(losses, losses))


def distance(first: Array, second: Array) -> float:
    return float(np.abs(first - second).sum())


def mean_of(values: Any, digits: int = 3) -> str:
    """Mean ± two standard errors."""
    values = np.asarray(values, float)
    error = 2 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


# --------------------------------------------------------------------------------------------------------------------
# Tables


def weights(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    problems, batches, size = max(2, int(10 * scale)), max(2, int(40 * scale)), 4000
    for share in (0.0, 0.5, 0.9, 0.99, 0.999):
        far, near, nearest, bounds, broken = [], [], [], [], 0
        for _ in range(problems):
            means, sigma, losses = problem(rng, share, size)
            right = decoupled(inner(means[None], means[None])[0], losses)
            inverse = losses**2 / np.maximum(sigma, 1e-9) ** 2
            found = []
            for rows in means + noise(rng, batches, sigma, size):
                gram = inner(rows[None], rows[None])[0]
                w = decoupled(gram, losses)
                own = losses**2 / np.diag(gram)
                roots = np.sqrt(np.diag(gram))
                off = float(np.abs(np.linalg.eigvalsh(gram / np.outer(roots, roots) - np.eye(4))).max())
                bound = off / (1 - off**2) ** 0.5 if off < 1 else np.inf
                found.append(
                    (distance(w, right), distance(w, inverse / inverse.sum()), distance(w, own / own.sum()), bound)
                )
            each = np.array(found)
            broken += int((each[:, 2] > each[:, 3]).sum())
            for values, column in zip((far, near, nearest, bounds), each.T, strict=True):
                values.append(float(np.median(column) if values is bounds else column.mean()))
        yield {
            "noise": f"{share:.1%}",
            "from mean gradients'": mean_of(far),
            "from L²/σ²": mean_of(near) if share else "",
            "from L²/‖g‖²": mean_of(nearest),
            "bound, median": f"{np.median(bounds):.3f}" if np.median(bounds) < np.inf else "none",
            "above it": broken,
        }


def bound(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    for count in (2, 3, 4, 8):
        attained = []
        for _ in range(max(2, int(2000 * scale))):
            diagonal = np.exp(rng.normal(0, rng.choice([0.1, 1, 2]), count))
            rest = rng.normal(size=(count, count))
            np.fill_diagonal(rest, 0)
            rest += rest.T
            rest *= rng.uniform() / np.abs(np.linalg.eigvalsh(rest)).max()
            off = float(np.abs(np.linalg.eigvalsh(rest)).max())
            gram = np.sqrt(np.outer(diagonal, diagonal)) * (np.eye(count) + rest)
            simple = (1 / diagonal) / (1 / diagonal).sum()
            attained.append(distance(min_norm(gram), simple) * (1 - off**2) ** 0.5 / off)
        yield {
            "K": count,
            "matrices": len(attained),
            "distance / bound: median": f"{np.median(attained):.3f}",
            "largest": f"{max(attained):.3f}",
        }


def alignment(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    batches, size = max(2, int(300 * scale)), 4000
    cosines = np.full((4, 4), 0.4)
    cosines[0, 1:] = cosines[1:, 0] = -0.45
    np.fill_diagonal(cosines, 1)
    means = mean_gradients(rng, cosines, np.ones(4), size)
    direction = means.mean(0)
    for share in (0.0, 0.5, 0.9, 0.99):
        variance = share / (1 - share)
        rows = means + noise(rng, batches, np.full(4, variance**0.5), size)
        ways = rows.mean(1)
        products = np.einsum("rn,rn->r", ways, rows[:, 0])
        lengths = np.linalg.norm(ways, axis=1) * np.linalg.norm(rows[:, 0], axis=1)
        yield {
            "noise": f"{share:.1%}",
            "⟨d̄, ḡ⟩": f"{float(direction @ means[0]):.4f}",
            "E⟨d, g⟩ by the formula": f"{float(direction @ means[0]) + variance / 4:.4f}",
            "E⟨d, g⟩": mean_of(products, 4),
            "cosine d̄, ḡ": f"{float(direction @ means[0]) / float(np.linalg.norm(direction)):.3f}",
            "mini-batch's": mean_of(products / lengths),
            "says that it hurts": f"{float((products < 0).mean()):.0%}",
        }


def estimators(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size, steps, variance = max(2, int(300 * scale)), 500, 120, 19.0
    means = mean_gradients(rng, np.array([[1, -0.2], [-0.2, 1]]), np.ones(2), size)
    truth = inner(means[None], means[None])[0]
    cases: dict[str, Callable[[int], Any]] = {
        "alike at all steps": lambda t: 1.0,
        "samples shared": lambda t: 1.0,
        "rising": lambda t: np.exp((t - steps) / 40),
        "falling": lambda t: np.exp((steps - t) / 40),
        "lengths vary": lambda t: np.exp(rng.normal(0, 0.5, (repetitions, 2, 1)) - 0.25).astype(np.float32),
    }
    for case, factor in cases.items():
        run = Tracked(repetitions, 2)
        for t in range(1, steps + 1):
            drawn = noise(rng, repetitions, np.full(2, variance**0.5), size)
            if case == "samples shared":
                drawn = (drawn + noise(rng, repetitions, np.full(1, variance**0.5), size)) / np.float32(2**0.5)
            run.step((means + drawn * factor(t)).astype(np.float32))
        for entry, (i, j) in {"‖ḡ‖²": (0, 0), "⟨ḡ_1, ḡ_2⟩": (0, 1)}.items():
            row: Row = {"noise": case, "entry": entry}
            for name, found in {"B": run.averages, "B − cA": run.less_the_average, "Ĝ": run.estimate}.items():
                off = found[:, i, j] - truth[i, j]
                row |= {f"{name}: bias": mean_of(off), f"{name}: sd": f"{off.std():.3f}"}
            yield row


def errors(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size = max(4, int(1200 * scale)), 100
    means = mean_gradients(rng, np.array([[1, -0.2], [-0.2, 1]]), np.ones(2), size)
    truth = inner(means[None], means[None])[0]
    moments = (6, 10, 20, 40, 160)
    for share in (0.1, 0.5, 0.9, 0.99):
        run = Tracked(repetitions, 2)
        line: dict[str, Row] = {entry: {"noise": f"{share:.0%}", "entry": entry} for entry in ("‖ḡ‖²", "⟨ḡ_1, ḡ_2⟩")}
        for t in range(1, max(moments) + 1):
            run.step(means + noise(rng, repetitions, np.full(2, (share / (1 - share)) ** 0.5), size))
            if t not in moments:
                continue
            off, bound, bare = run.estimate - truth, run.variance(), run.variance(few_samples=False)
            for entry, (i, j) in {"‖ḡ‖²": (0, 0), "⟨ḡ_1, ḡ_2⟩": (0, 1)}.items():
                ratio = bare[:, i, j].mean() / off[:, i, j].var()
                outside = (np.abs(off[:, i, j]) > 2 * np.sqrt(bound[:, i, j])).mean()
                line[entry][f"step {t}"] = f"{ratio:.2f} {outside:5.1%}"
        yield from line.values()


def reach(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, steps = max(2, int(30 * scale)), 120
    for size in (100, 1000, 4000):
        means = mean_gradients(rng, np.array([[1, -0.5], [-0.5, 1]]), np.ones(2), size)
        row: Row = {"directions": size}
        for scale_of_noise in (10, 30, 100, 300):
            run = Tracked(repetitions, 2)
            for _ in range(steps):
                run.step(means + noise(rng, repetitions, np.full(2, scale_of_noise**0.5), size))
            trust = evidence(run.estimate, np.sqrt(run.variance()))
            row[f"N = {scale_of_noise}"] = f"{trust[:, 0, 0].mean():.2f}"
        row["√r/6c"] = f"{size**0.5 / 6 / run.shares[0, 0]:.0f}"
        yield row


def shares(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    problems, repetitions, size, steps = max(2, int(8 * scale)), max(2, int(6 * scale)), 2000, 120
    for share in (0.5, 0.9, 0.99, 0.999):
        columns: dict[str, list[float]] = {}
        for _ in range(problems):
            means, sigma, losses = problem(rng, share, size)
            right = decoupled(inner(means[None], means[None])[0], losses)
            run = Tracked(repetitions, 4)
            for _ in range(steps):
                rows = means + noise(rng, repetitions, sigma, size)
                run.step(rows)
            error = np.sqrt(run.variance())
            trust = np.einsum("rkk->rk", evidence(run.estimate, error))
            founded = [
                blended(decoupled(believed(g, e, b), losses), np.full(4, 0.25), t)
                for g, e, b, t in zip(run.estimate, error, run.averages, trust, strict=True)
            ]
            ways = {
                "a mini-batch's": [decoupled(g, losses) for g in inner(rows, rows)],
                "of averaged Grams": [decoupled(g, losses) for g in run.grams],
                "of B": [decoupled(g, losses) for g in run.averages],
                "of Ĝ, with evidence": founded,
                "uniform": [np.full(4, 0.25)] * repetitions,
            }
            for name, found in ways.items():
                columns.setdefault(name, []).append(float(np.mean([distance(w, right) for w in found])))
            columns.setdefault("evidence", []).append(float(trust.mean()))
        yield {"noise": f"{share:.1%}", **{name: mean_of(values) for name, values in columns.items()}}


def guarantee(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size, steps = max(2, int(40 * scale)), 2000, 120
    cosines = np.full((8, 8), 0.4)
    cosines[0, 1:] = cosines[1:, 0] = -0.25
    np.fill_diagonal(cosines, 1)
    means = mean_gradients(rng, cosines, np.ones(8), size)
    truth = inner(means[None], means[None])[0]
    uniform = np.full(8, 1 / 8)
    for scale_of_noise in (10, 30, 100, 200):
        run = Tracked(repetitions, 8)
        for _ in range(steps):
            rows = means + noise(rng, repetitions, np.full(8, scale_of_noise**0.5), size)
            run.step(rows)
        known = list(zip(run.estimate, np.sqrt(run.variance()), run.averages, strict=True))
        trust = np.mean([evidence(np.diag(g), np.diag(e)) for g, e, _ in known])
        row: Row = {"N": scale_of_noise, "evidence": f"{trust:.2f}"}
        ways = {
            "none": [truth * 0] * repetitions,
            "a mini-batch's": list(inner(rows, rows)),
            "products doubted": [believed(g, e, b, doubt_products=True) for g, e, b in known],
            "lengths doubted": [believed(g, e, b) for g, e, b in known],
        }
        for name, grams in ways.items():
            chosen = np.stack([descent(gram, uniform) for gram in grams])
            lengths = np.sqrt(np.einsum("rk,kj,rj->r", chosen, truth, chosen))
            worst = (chosen @ truth).min(1) / lengths
            row[name] = f"{worst.mean():+.3f} {float((worst < -0.05).mean()):4.0%}"
        yield row


def descent(gram: Array, weights: Array) -> Array:
    """Weights of the nearest direction that hurts nobody."""
    return descent_weights(torch.from_numpy(np.ascontiguousarray(gram)), torch.from_numpy(weights)).weights.numpy()


def drift(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size, variance = max(2, int(60 * scale)), 1000, 9.0
    basis = mean_gradients(rng, np.eye(2), np.ones(2), size)
    for degrees in (0.0, 0.3, 1.0, 3.0):
        row: Row = {"degrees a step": degrees}
        for decay in (0.9, 0.95, 0.98):
            run, steps = Tracked(repetitions, 2, decay), int(5 / (1 - decay))
            speed = np.deg2rad(degrees)
            for t in range(1, steps + 1):
                angle = np.pi / 2 + speed * (steps - t)  # at right angles now, and more before
                turned = np.cos(angle) * basis[0] + np.sin(angle) * basis[1]
                means = np.stack([basis[0], turned]).astype(np.float32)
                run.step(means + noise(rng, repetitions, np.full(2, variance**0.5), size))
            off = run.estimate[:, 0, 1]
            bound = 2 * np.sin(speed / 2) * (1 + decay + 2 * decay**2) / (2 * (1 - decay**2))
            row[f"{decay}: bias"] = f"{off.mean():+.3f}"
            row[f"{decay}: bound"] = f"{bound:.3f}"
            row[f"{decay}: rms"] = f"{np.sqrt((off**2).mean()):.3f}"
        yield row


def sketches(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    seeds, size, steps, variance = max(3, int(80 * scale)), 16_384, 20, 9.0
    means = mean_gradients(rng, np.array([[1, -0.5], [-0.5, 1]]), np.ones(2), size)
    rows = (means[None] + noise(rng, steps, np.full(2, variance**0.5), size)).astype(np.float32)
    exact = Tracked(1, 2)
    for step in rows:
        exact.step(step[None])
    averages, truth = exact.averages[0], exact.estimate[0]
    for dimension in (256, 1024):
        run = Tracked(seeds, 2)
        maps = [SignedSketch([size], dimension, seed=seed, device=torch.device("cpu")) for seed in range(seeds)]
        for step in torch.from_numpy(rows):
            sketched = torch.zeros(seeds, 2, dimension)
            for place, each in zip(sketched, maps, strict=True):
                for row, gradient in zip(place, step, strict=True):
                    each.add_(row, 0, gradient)
            run.step(sketched.numpy())
        off = run.estimate - truth
        line: Row = {"d": dimension}
        for entry, (i, j) in {"‖ḡ‖²": (0, 0), "⟨ḡ_1, ḡ_2⟩": (0, 1)}.items():
            bound = ((averages[i, i] * averages[j, j] + averages[i, j] ** 2) / dimension) ** 0.5
            line[f"{entry}: mean error"] = mean_of(off[:, i, j])
            line[f"{entry}: sd"] = f"{off[:, i, j].std():.3f}"
            line[f"{entry}: bound"] = f"{bound:.3f}"
        line["bound for a mini-batch's ‖g‖²"] = f"{(1 + variance) * (2 / dimension) ** 0.5:.3f}"
        yield line


def clocks(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size, steps, variance = max(2, int(200 * scale)), 200, 600, 9.0
    means = mean_gradients(rng, np.array([[1, -0.5], [-0.5, 1]]), np.ones(2), size)
    truth = inner(means[None], means[None])[0]
    for name, own in {"of each objective": True, "of steps": False}.items():
        run = Tracked(repetitions, 2, own_clock=own)
        for t in range(1, steps + 1):
            rows = means + noise(rng, repetitions, np.full(2, variance**0.5), size)
            run.step(rows, np.array([True, t % 5 == 0]))
        off = run.estimate - truth
        yield {
            "clock": name,
            "1/c of the first": f"{1 / run.shares[0, 0]:.1f}",
            "of the second": f"{1 / run.shares[1, 1]:.1f}",
            "‖ḡ_2‖²: bias": mean_of(off[:, 1, 1]),
            "‖ḡ_2‖²: sd": f"{off[:, 1, 1].std():.3f}",
            "⟨ḡ_1, ḡ_2⟩: bias": mean_of(off[:, 0, 1]),
            "⟨ḡ_1, ḡ_2⟩: sd": f"{off[:, 0, 1].std():.3f}",
        }


def microbatches(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size, parts, variance = max(4, int(2000 * scale)), 30, 8, 90.0
    first = np.zeros(size, np.float32)
    first[0] = 1
    for name, decay, steps in (("β = 0.95", DECAY, 160), ("39 steps alike", 1.0, 39)):
        sums, per_step, per_part = np.zeros((repetitions, size)), np.zeros(repetitions), np.zeros(repetitions)
        weight = decay ** np.arange(steps)[::-1]
        weight = weight / weight.sum()
        for w in weight:
            rows = (first + noise(rng, repetitions, np.full(parts, (variance * parts) ** 0.5), size)) * (w / parts)
            whole = rows.sum(1)
            sums += whole
            per_step += (whole**2).sum(1)
            per_part += (rows**2).sum((1, 2))
        share = float((weight**2).sum())
        across = ((sums**2).sum(1) - per_step) / (1 - share)
        within = ((sums**2).sum(1) - per_part) / (1 - share / parts)
        drawn = rng.integers(repetitions, size=(200, repetitions))
        ratios = within[drawn].var(1) / across[drawn].var(1)
        expected = [variance_of_norm(weight, p, variance, size) for p in (1, parts)]
        yield {
            "weights": name,
            "c": f"{share:.4f}",
            "between steps": f"{across.var():.3f}",
            "formula": f"{expected[0]:.3f}",
            "and of 8 parts": f"{within.var():.3f}",
            "ratio": f"{within.var() / across.var():.4f} ± {2 * ratios.std():.4f}",
            "ratio by the formula": f"{expected[1] / expected[0]:.4f}",
        }


def variance_of_norm(weight: Array, parts: int, variance: float, size: int) -> float:
    """Var Ĝ_kk for ‖ḡ‖ = 1 and noise alike in all directions, from products of different parts of steps."""
    share = float((weight**2).sum()) / parts
    linear = 4 * float((weight**2 * (1 - weight / parts) ** 2).sum()) * variance / size
    square = 2 * float((weight**2).sum() ** 2 - (weight**4).sum() / parts) * variance**2 / size
    return (linear + square) / (1 - share) ** 2


def steps(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size, count = max(2, int(150 * scale)), 300, 120
    curvature = 1 / np.sqrt(np.arange(1, size + 1))
    curvature = (curvature / curvature.mean()).astype(np.float32)
    start = mean_gradients(rng, np.array([[1, -0.3], [-0.3, 1]]), np.ones(2), size)
    minima = -start / curvature
    w = np.array([0.5, 0.5], np.float32)
    for share in (0.9, 0.99):
        variance = share / (1 - share)
        trace = float(curvature.mean()) * variance  # tr(HΣ)
        way = w @ start
        best = float(way @ way) / (float((curvature * way * way).sum()) + float((w**2).sum()) * trace)
        for part in (0.0, 0.03, 0.1, 0.3, 1.0):
            rate = part * best
            at = np.zeros((repetitions, 1, size), np.float32)
            run, path = Tracked(repetitions, 2), Tracked(repetitions, 2)
            for _ in range(count):
                clean = curvature * (at - minima)
                rows = clean + noise(rng, repetitions, np.full(2, variance**0.5), size)
                run.step(rows)
                path.step(clean)
                at = at - np.float32(rate) * np.einsum("k,rkn->rn", w, rows)[:, None]
            off = run.estimate - path.estimate
            yield {
                "noise": f"{share:.0%}",
                "η / best": part,
                "‖ḡ_1‖²": f"{path.estimate[:, 0, 0].mean():.2f}",
                "bias": mean_of(off[:, 0, 0]),
                "⟨ḡ_1, ḡ_2⟩": f"{path.estimate[:, 0, 1].mean():+.2f}",
                "its bias": mean_of(off[:, 0, 1]),
                "its error": f"{np.sqrt(run.variance()[:, 0, 1]).mean():.3f}",
                "−η w tr HΣ": f"{-rate * 0.5 * trace:.3f}",
            }


def epochs(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    repetitions, size, per_batch, variance, count = max(2, int(150 * scale)), 30, 4, 9.0, 200
    weight = DECAY ** np.arange(count)[::-1]
    weight /= weight.sum()
    pairs = np.outer(weight, weight) * ~np.eye(count, dtype=bool)
    pairs /= pairs.sum()
    for batches in (10, 40, 200):
        samples = batches * per_batch
        population = np.zeros((repetitions, samples, size))
        population[:, :, 0] = 1
        population += rng.normal(size=population.shape) * (variance * per_batch / size) ** 0.5
        mean = population.mean(1)
        run = Tracked(repetitions, 1)
        for t in range(count):
            if t % batches == 0:
                order = rng.permuted(np.tile(np.arange(samples), (repetitions, 1)), axis=1)
            drawn = order[:, (t % batches) * per_batch :][:, :per_batch]
            rows = np.take_along_axis(population, drawn[:, :, None], axis=1).mean(1, keepdims=True)
            run.step(rows.astype(np.float32))
        epoch = np.arange(count) // batches
        together = float((pairs * (epoch[:, None] == epoch[None, :])).sum())
        estimate = run.estimate[:, 0, 0]
        yield {
            "mini-batches an epoch": batches,
            "pairs of one epoch": f"{together:.2f}",
            "less the training set's": mean_of(estimate - (mean**2).sum(1)),
            "formula": f"{-together * variance / batches:.3f}",
            "less the population's": mean_of(estimate - 1),
            "its formula": f"{(1 - together) * variance / batches:.3f}",
        }


def scale_changes(rng: np.random.Generator, scale: float) -> Iterator[Row]:
    count = 400
    weight = DECAY ** np.arange(count)[::-1]
    weight /= weight.sum()
    pairs = np.outer(weight, weight) * ~np.eye(count, dtype=bool)
    pairs /= pairs.sum()
    for factor in (2.0, 0.5):
        ratios = []
        for ago in range(1, count, max(1, int(1 / scale))):
            scales = np.where(np.arange(count) >= count - ago, factor, 1.0)
            ratios.append(float(weight @ scales**2 / (scales @ pairs @ scales)))
        worst = int(np.argmax(ratios))
        yield {
            "gradients times": factor,
            "(N̂ + 1)/(N + 1), largest": f"{ratios[worst]:.3f}",
            "steps after": worst + 1,
            "after 100 steps": f"{ratios[99]:.3f}" if len(ratios) > 99 else "",
        }


TABLES: dict[str, Callable[[np.random.Generator, float], Iterator[Row]]] = {
    each.__name__: each
    for each in (
        weights, bound, alignment, estimators, errors, reach, shares, guarantee,
        drift, sketches, clocks, microbatches, steps, epochs, scale_changes,
    )
}  # fmt: skip


def print_table(name: str, rows: list[Row]) -> None:
    """Columns as wide as they have to be."""
    print(f"\n{name}")
    columns = list(rows[0])
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) + 2 for column in columns]
    for cells in [columns, *(list(row.values()) for row in rows)]:
        left = f"{cells[0]!s:{widths[0]}}"
        print(left + "".join(f"{cell!s:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)))


def main() -> None:
    """Parse, simulate, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help="tables (default: all)")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the repetitions: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()

    torch.set_num_threads(1)
    machine = describe("numpy")
    print(*(f"{key}: {value}" for key, value in machine.items()), sep=" · ")
    print(f"seed {options.seed}")
    records = []
    for name, table in TABLES.items():
        if name in options.only:
            rng = np.random.default_rng([options.seed, *name.encode()])  # the same, whatever else is asked for
            rows = list(table(rng, 0.01 if options.quick else 1.0))
            print_table(name, rows)
            records += [{"table": name, **row} for row in rows]
    if options.json:
        document = {"machine": machine, "seed": options.seed, "records": records}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
