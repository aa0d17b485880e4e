"""Intervals: how far off a number measured on some pictures may be.

Read next: evaluate/experiments.py.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch


class Figure(NamedTuple):
    """A measured number and the interval in which, 95 times out of 100, the true one lies."""
    value: float
    low: float
    high: float


def deviations(level):
    """How many standard deviations to either side hold this share of a normal distribution: 1.96 for 95 %."""
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson(p, n, level=0.95):
    """A share p of n answers with Wilson's interval, which holds for few answers and near 0 and 1 too: a Figure.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). Raises ValueError for no answers.
    """
    if n < 1:
        raise ValueError("a share of nothing")
    z = deviations(level)
    middle, spread = p + z ** 2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z ** 2 / (4 * n ** 2))
    low, high = ((middle + sign * spread) / (1 + z ** 2 / n) for sign in (-1, 1))
    return Figure(p, max(0.0, min(low, p)), min(1.0, max(high, p)))        # at 0 and 1 rounding may put them on the wrong side


def share(hits, level=0.95):
    """The share of yes-or-no answers (N,) that are yes, with Wilson's interval: a Figure. Raises ValueError for no answers."""
    return wilson(sum(map(bool, hits)) / max(1, len(hits)), len(hits), level)


def share_gap(a, b, level=0.95):
    """The share of yes in a minus that in b, answers (N,) to the same N questions: a Figure, with `mean_change`'s interval. Raises ValueError."""
    a, b = (np.asarray(x, dtype=bool) for x in (a, b))
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"share_gap needs two answers to each question, got {a.shape} and {b.shape}")
    value, low, high = mean_change(a.astype(int) - b, level)
    return Figure(value, max(-1.0, low), min(1.0, high))


def mean_change(d, level=0.95):
    """The mean of what answers to N questions changed by, d (N,) of −1, 0, 1 (or sums of such), with the interval of Agresti and Min: a Figure.

    One more change of half a question each way, and one question more without a change, keep few answers that agree from being a certainty:
    m ± z·√((Σd² + 1)/(N + 2) − m²)/√(N + 2), m = Σd/(N + 2).
    """
    n, d = len(d) + 2, np.asarray(d, dtype=float)
    middle = d.sum() / n
    spread = deviations(level) * math.sqrt((((d ** 2).sum() + 1) / n - middle ** 2) / n)
    return Figure(float(d.mean()), float(middle - spread), float(middle + spread))


def share_apart(a, b, level=0.95):
    """The share of yes in a (N,) minus that in b (M,), answers to different questions, with Newcombe's interval, out of both Wilson's: a Figure."""
    p, q = share(a, level), share(b, level)
    d = p.value - q.value
    return Figure(d, d - math.hypot(p.value - p.low, q.high - q.value), d + math.hypot(p.high - p.value, q.value - q.low))


def wider(figure, *others):
    """A Figure with an interval that also holds those of others. A bootstrap believes a share near 0 or 1 at once; closed forms do not."""
    return Figure(figure.value, min(f.low for f in (figure, *others)), max(f.high for f in (figure, *others)))


def bootstrap(statistic, *samples, times=1000, seed=0, level=0.95, halves=False, extrapolate=False):
    """statistic(*samples) with its percentile interval, from `times` samples drawn out of the samples themselves: a Figure.

    samples: arrays or tensors (N, ...); those in one tuple are drawn together, row by row (pictures and their captions, two models asked the
    same), the others each by itself. A statistic that returns a tuple of numbers gives a list of Figures.
    halves: for what rows drawn twice would spoil, such as distances to neighbours, and what depends on how many rows there are, such as the
    Fréchet distance: instead of N rows with repetition, half of them without, which spread as much as N drawn anew (the variance of a mean
    of half the rows about that of all is σ²/N), moved to where the statistic of all rows is.
    extrapolate: with halves, the statistic of infinitely many rows (Chong and Forsyth). A Fréchet distance F(N) is too large by about c/N, for
    the spread of N rows, and their mean, are off by chance, and being off in any direction is a distance. F(N/2) is then too large by 2c/N, and

        F(∞) = 2·F(N) − F(N/2),   F(N/2) the mean of all halves.

    About 1/10 of the error stays (more with fewer rows than columns), and a true distance near zero may come out below it. To first order
    each row moves F(∞) as much as F(N), so that it has the same interval. Raises ValueError for fewer than two rows.
    """
    groups = [group if isinstance(group, tuple) else (group,) for group in samples]
    for group in groups:
        if len(group[0]) < 2 or any(len(sample) != len(group[0]) for sample in group):
            raise ValueError(f"bootstrap needs at least two rows, as many in all samples of a group, got {[len(sample) for sample in group]}")
    rng = np.random.default_rng(seed)

    def once():
        drawn = []
        for group in groups:
            n = len(group[0])
            rows = rng.permutation(n)[:n // 2] if halves else rng.integers(0, n, n)
            drawn += [sample[torch.from_numpy(rows).to(sample.device)] if torch.is_tensor(sample) else np.asarray(sample)[rows] for sample in group]
        return np.atleast_1d(statistic(*drawn)).astype(np.float64)

    value = statistic(*(sample if torch.is_tensor(sample) else np.asarray(sample) for group in groups for sample in group))
    whole, found = np.atleast_1d(value).astype(np.float64), np.stack([once() for _ in range(times)])       # (K,), (times, K)
    if halves:
        whole, found = 2 * whole - found.mean(0) if extrapolate else whole, found - found.mean(0)
        found = found + whole
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    figures = [Figure(*map(float, numbers)) for numbers in zip(whole, low, high)]
    return figures if isinstance(value, tuple) else figures[0]


def agrees(difference):
    """Whether a difference is above zero, as a claim says: "yes" or "no" if its interval lies on one side, else "cannot tell"."""
    return "yes" if difference.low > 0 else "no" if difference.high < 0 else "cannot tell"
