"""Intervals hold as often as they say, and verdicts are read off them."""

import math

import numpy as np
import pytest
import torch

from mini_dalle2.metrics.intervals import (
    Figure,
    agrees,
    bootstrap,
    mean_change,
    share,
    share_apart,
    share_gap,
    wider,
    wilson,
)
from mini_dalle2.metrics.sets import frechet_distance


def coverage(trials, inside):
    """Does an interval of 95 % hold the truth in about 95 % of the trials?

    Within four standard deviations of that binomial.
    """
    spread = math.sqrt(trials * 0.95 * 0.05)
    assert abs(inside - 0.95 * trials) <= 4 * spread + 0.01 * trials, inside / trials


@pytest.mark.parametrize("halves", [False, True])
def test_bootstrap_holds_the_mean_as_often_as_it_says(halves):
    rng, trials, inside = np.random.default_rng(0), 300, 0
    for trial in range(trials):
        x = rng.exponential(size=120)  # mean 1, and not symmetric
        value, low, high = bootstrap(np.mean, x, times=200, seed=trial, halves=halves)
        assert value == pytest.approx(x.mean())
        inside += low <= 1 <= high
    coverage(trials, inside)


@pytest.mark.parametrize("halves", [False, True])
def test_bootstrap_is_as_wide_as_the_closed_form(halves):
    x = np.random.default_rng(1).normal(size=400)
    value, low, high = bootstrap(np.mean, x, times=4000, halves=halves)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(400), rel=0.06)
    assert bootstrap(np.mean, x) == bootstrap(np.mean, x) != bootstrap(np.mean, x, seed=1)


def test_bootstrap_of_a_distance_stays_where_the_distance_is():
    """Repeated rows, or fewer rows, move a Fréchet distance.

    The interval must still be about the number that is given.
    """
    rng, trials, inside = np.random.default_rng(2), 60, 0
    truth = np.mean(
        [
            frechet_distance(rng.normal(size=(60, 6)), 0.5 + rng.normal(size=(200, 6)))
            for _ in range(300)
        ]
    )
    for trial in range(trials):
        a, b = rng.normal(size=(60, 6)), 0.5 + rng.normal(size=(200, 6))
        value, low, high = bootstrap(
            frechet_distance, a, torch.from_numpy(b), times=60, seed=trial, halves=True
        )
        assert low < value < high
        inside += low <= truth <= high
    assert inside >= 0.85 * trials
    off = [
        (low + high) / 2 - value
        for value, low, high in (
            bootstrap(frechet_distance, a, b, times=200, halves=halves) for halves in (True, False)
        )
    ]
    assert abs(off[0]) < off[1] / 2, (
        "and this is why halves are there: rows drawn twice make crowds narrower than they are"
    )


def test_an_extrapolated_distance_is_nearly_unbiased_and_its_interval_holds():
    """80 rows of 32 columns, spread as a trained network's: some directions far wider."""
    rng, trials, inside, plain, found = np.random.default_rng(6), 80, 0, [], []
    spread, shift = np.linspace(1.5, 0.1, 32), 0.15
    truth = 32 * shift**2 + ((0.2 * spread) ** 2).sum()  # |μ_a − μ_b|² + Σ (σ_a − σ_b)²
    for trial in range(trials):
        a, b = spread * rng.normal(size=(80, 32)), 0.8 * spread * rng.normal(size=(160, 32)) + shift
        value, low, high = bootstrap(
            frechet_distance, a, b, times=40, seed=trial, halves=True, extrapolate=True
        )
        plain.append(frechet_distance(a, b) - truth)
        found.append(value - truth)
        inside += low <= truth <= high
    assert abs(np.mean(found)) < np.mean(plain) / 7, (np.mean(found), np.mean(plain))
    assert inside >= 0.9 * trials, inside


def test_rows_of_one_tuple_are_drawn_together():
    x = np.random.default_rng(3).normal(size=200)
    assert bootstrap(lambda a, b: (a - b).mean(), (x, x + 1), times=50)[1:] == pytest.approx(
        (-1, -1)
    )
    several = bootstrap(lambda a: (a.min(), a.max()), x, times=50)
    assert [f.value for f in several] == [x.min(), x.max()] and all(
        isinstance(f, Figure) for f in several
    )
    for wrong in ((x[:1],), ((x, x[:5]),)):
        with pytest.raises(ValueError, match="at least two rows"):
            bootstrap(np.mean, *wrong)


@pytest.mark.parametrize("p", [0.02, 0.3, 1.0])
def test_share_against_the_binomial(p):
    rng, n = np.random.default_rng(4), 60
    inside = sum(
        low <= p <= high for _, low, high in (share(rng.random(n) < p) for _ in range(500))
    )
    exact = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson(k / n, n).low <= p <= wilson(k / n, n).high
    )
    assert exact > 0.92 and abs(inside / 500 - exact) < 0.05
    assert share([True] * 10).low == pytest.approx(
        10 / (10 + 1.96**2), rel=1e-3
    )  # the closed form at p = 1
    with pytest.raises(ValueError):
        share([])


def test_share_gap_against_many_samples():
    rng, n, inside = np.random.default_rng(5), 80, 0
    for _ in range(500):
        u = rng.random(n)
        a, b = (
            u < 0.4,
            (u < 0.25) | (rng.random(n) < 0.1),
        )  # answers to the same questions, not independent
        inside += share_gap(a, b).low <= 0.4 - (0.25 + 0.75 * 0.1) <= share_gap(a, b).high
    coverage(500, inside)
    none = share_gap([False] * 16, [False] * 16)
    assert none.value == 0 and none.low < -0.05 and none.high > 0.05, (
        "sixteen answers that agree are no certainty"
    )
    with pytest.raises(ValueError):
        share_gap([True], [True, False])
    assert none == mean_change(np.zeros(16)), "and no more when changes are added up"


def test_share_apart_against_many_samples():
    rng, inside = np.random.default_rng(7), 0
    for _ in range(500):
        value, low, high = share_apart(rng.random(60) < 0.1, rng.random(40) < 0.3)
        inside += low <= -0.2 <= high
    coverage(500, inside)
    assert share_apart([True] * 20, [True] * 20).low < -0.1, "twenty answers are no certainty"
    assert wider(Figure(0.5, 0.4, 0.6), Figure(0.5, 0.3, 0.55)) == (0.5, 0.3, 0.6)


def test_a_verdict_is_read_off_the_interval():
    cases = {
        (0.1, 0.01, 0.2): "yes",
        (-0.1, -0.2, -0.01): "no",
        (0.1, -0.1, 0.3): "cannot tell",
        (0, 0, 0): "cannot tell",
    }
    assert {numbers: agrees(Figure(*numbers)) for numbers in cases} == cases
