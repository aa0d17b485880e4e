"""Intervals: how far off a number measured on some pictures may be.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n)        Wilson's interval of a share p of n

Closed forms give the interval of a share and of a difference of two shares. `bootstrap` gives the
interval of everything else, such as a Fréchet distance. Every Figure has a 95 % interval.

Shapes: N rows (pictures, captions), K numbers of one statistic.
References: Efron 1979 (bootstrap); Chong and Forsyth 2020, 1911.07023 (extrapolated FID); Wilson
1927 (a share); Agresti and Min 2005 (two shares, same questions); Newcombe 1998 (two shares,
different questions). Read next: evaluate/measures.py.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch


class Figure(NamedTuple):
    """A measured number, and the interval that holds the true one 95 times out of 100."""
    value: float
    low: float
    high: float


# ---------------------------------------------------------------- shares

def deviations(level):
    """How many standard deviations hold this share of a normal distribution: 1.96 for 95 %."""
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson(p, n, level=0.95):
    """A share p of n answers with Wilson's interval: a Figure.

    It also holds for few answers and near 0 and 1. Raises ValueError for no answers.
    """
    if n < 1:
        raise ValueError("a share of nothing: there must be at least one answer")
    z = deviations(level)
    middle = p + z ** 2 / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z ** 2 / (4 * n ** 2))
    low = (middle - spread) / (1 + z ** 2 / n)
    high = (middle + spread) / (1 + z ** 2 / n)
    # At 0 and 1 rounding may put a limit on the wrong side of p.
    return Figure(p, max(0.0, min(low, p)), min(1.0, max(high, p)))


def share(hits, level=0.95):
    """The share of yes among answers (N,), with Wilson's interval: a Figure.

    Raises ValueError for no answers.
    """
    return wilson(sum(map(bool, hits)) / max(1, len(hits)), len(hits), level)


def share_gap(a, b, level=0.95):
    """The share of yes in a minus the share in b, answers (N,) to the same N questions: a Figure.

    The interval is that of `mean_change`. Raises ValueError unless both answer as many questions.
    """
    a, b = (np.asarray(x, dtype=bool) for x in (a, b))
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(
            f"share_gap needs two answers to each question, got {a.shape} and {b.shape}")
    value, low, high = mean_change(a.astype(int) - b, level)
    return Figure(value, max(-1.0, low), min(1.0, high))


def mean_change(d, level=0.95):
    """The mean change of the answers to N questions, with Agresti and Min's interval: a Figure.

    d: (N,), −1, 0, 1 or sums of these. Half a question is added that changed each way, and one
    that did not change. So a few answers that agree are no certainty:
    m ± z·√((Σd² + 1)/(N + 2) − m²)/√(N + 2), with m = Σd/(N + 2).
    """
    d = np.asarray(d, dtype=float)
    n = len(d) + 2
    middle = d.sum() / n
    spread = deviations(level) * math.sqrt((((d ** 2).sum() + 1) / n - middle ** 2) / n)
    return Figure(float(d.mean()), float(middle - spread), float(middle + spread))


def share_apart(a, b, level=0.95):
    """The share of yes in a (N,) minus the share in b (M,), for different questions: a Figure.

    The interval is Newcombe's, made from Wilson's two.
    """
    p, q = share(a, level), share(b, level)
    d = p.value - q.value
    low = d - math.hypot(p.value - p.low, q.high - q.value)
    high = d + math.hypot(p.high - p.value, q.value - q.low)
    return Figure(d, low, high)


def wider(figure, *others):
    """Widen a Figure's interval until it holds the intervals of other Figures too.

    A bootstrap takes a share near 0 or 1 for certain. Closed forms do not.
    """
    figures = figure, *others
    return Figure(figure.value, min(f.low for f in figures), max(f.high for f in figures))


# ---------------------------------------------------------------- everything else

def bootstrap(statistic, *samples, times=1000, seed=0, level=0.95, halves=False, extrapolate=False):
    """statistic(*samples) with its percentile interval from `times` bootstrap samples: a Figure.

    samples: arrays or tensors (N, ...). Those in one tuple are resampled together, row by row, such
    as pictures and their captions. The others are resampled separately. A statistic that returns a
    tuple of numbers gives a list of Figures.
    halves: take half of the rows without repetition, instead of N rows with repetition. Repeated
    rows spoil distances to neighbours. Half of the rows spread as much as N new rows: the mean of
    half of them has a variance of σ²/N about the mean of all. The interval is then moved to the
    statistic of all rows.
    extrapolate: with halves, estimate the statistic of infinitely many rows (Chong and Forsyth). A
    Fréchet distance F(N) of N rows is too large by about c/N, F(N/2) by about 2c/N, so

        F(∞) = 2·F(N) − F(N/2),   F(N/2) the mean over all halves.

    About a tenth of the bias stays, more with fewer rows than columns. A true distance near zero
    may come out below zero. To first order, each row moves F(∞) as much as F(N): the interval is
    the same. Raises ValueError for fewer than two rows.
    """
    groups = [group if isinstance(group, tuple) else (group,) for group in samples]
    check_groups(groups)
    value = statistic(*(as_rows(sample) for group in groups for sample in group))
    whole = as_numbers(value)    # (K,)
    rng = np.random.default_rng(seed)
    found = np.stack([as_numbers(statistic(*resampled(groups, rng, halves)))
                      for _ in range(times)])    # (times, K)
    if halves:
        middle = found.mean(0)
        if extrapolate:
            whole = 2 * whole - middle
        found = found - middle + whole
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    figures = [Figure(*map(float, numbers)) for numbers in zip(whole, low, high)]
    return figures if isinstance(value, tuple) else figures[0]


def check_groups(groups):
    """Raise ValueError unless each tuple of samples has two rows, and all of it as many."""
    for group in groups:
        rows = [len(sample) for sample in group]
        if rows[0] < 2 or len(set(rows)) > 1:
            raise ValueError("bootstrap needs at least two rows, as many in all samples of a "
                             f"group, got {rows}")


def as_rows(sample):
    """A sample as a tensor or an array."""
    return sample if torch.is_tensor(sample) else np.asarray(sample)


def as_numbers(value):
    """One number, or a tuple of them, as float64 (K,)."""
    return np.atleast_1d(value).astype(np.float64)


def resampled(groups, rng, halves):
    """Resample all groups of samples: half of the rows of each, or N rows with repetition."""
    found = []
    for group in groups:
        n = len(group[0])
        rows = rng.permutation(n)[:n // 2] if halves else rng.integers(0, n, n)
        for sample in group:
            if torch.is_tensor(sample):
                found.append(sample[torch.from_numpy(rows).to(sample.device)])
            else:
                found.append(np.asarray(sample)[rows])
    return found


def agrees(difference):
    """Whether a difference (a Figure) is above zero: "yes", "no" or "cannot tell".

    "cannot tell" if its interval holds zero.
    """
    if difference.low > 0:
        return "yes"
    return "no" if difference.high < 0 else "cannot tell"
