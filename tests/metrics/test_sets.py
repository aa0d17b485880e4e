"""Fréchet distance, precision and recall, CLIP score, retrieval against independent oracles."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from mini_dalle2.metrics.sets import (
    clip_score,
    covered,
    frechet_distance,
    precision_recall,
    retrieval_accuracy,
)


def test_frechet_distance_in_closed_form():
    """Two sets made to have exactly diagonal covariances: |μ_a − μ_b|² + Σ (σ_a − σ_b)²."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(400, 6))
    white = np.linalg.qr(white - white.mean(0))[0] * math.sqrt(
        399
    )  # columns of mean zero, covariance exactly the identity
    s_a, s_b, shift = (
        np.arange(1, 7) / 3,
        np.array([1, 1, 0.5, 2, 3, 0.1]),
        np.array([1, 0, 0, -2, 0, 0.5]),
    )
    expected = (shift**2).sum() + ((s_a - s_b) ** 2).sum()
    assert frechet_distance(white * s_a, white * s_b + shift) == pytest.approx(expected, rel=1e-9)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert frechet_distance(
        white * s_a @ rotation, (white * s_b + shift) @ rotation
    ) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(white * s_a, white * s_a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n, d", [(300, 20), (12, 20)])
def test_frechet_distance_against_scipy(n, d):
    """The textbook formula with scipy's matrix square root.

    With fewer points than dimensions, covariances are singular.
    """
    rng = np.random.default_rng(1)
    a, b = (
        rng.normal(size=(n, d)) @ rng.normal(size=(d, d)),
        rng.normal(size=(n + 3, d)) @ rng.normal(size=(d, d)) + 0.3,
    )
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b + (1e-12 if n < d else 0) * np.eye(d))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(
        expected, rel=1e-4 if n < d else 1e-9
    )
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def brute_force(points, centres, k):
    hits = 0
    radii = [
        sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[k - 1]
        for i, c in enumerate(centres)
    ]
    for p in points:
        hits += any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii))
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_against_brute_force(k):
    rng = np.random.default_rng(2)
    real, fake = rng.normal(size=(60, 4)), rng.normal(size=(45, 4)) * 0.6 + 0.4
    precision, recall = precision_recall(real, fake, k)
    assert (precision, recall) == (brute_force(fake, real, k), brute_force(real, fake, k))
    assert precision > recall, "a narrow crowd inside the real one: precise, not covering"


def test_precision_recall_extremes():
    rng = np.random.default_rng(3)
    real = rng.normal(size=(1500, 3))  # more than one chunk
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    copies = np.repeat(real[:1], 50, axis=0)
    assert precision_recall(real, copies) == (1.0, 1 / 1500), (
        "one picture over and over: looks real, covers nothing but itself"
    )


def test_clip_score():
    z_img, z_txt = (
        torch.tensor([[1.0, 0], [0, 2], [1, 1], [3, 0]]),
        torch.tensor([[5.0, 0], [1, 0], [1, 0], [-1, 0]]),
    )
    assert clip_score(z_img, z_txt) == pytest.approx(2.5 * (1 + 0 + math.sqrt(0.5) + 0) / 4)


def test_retrieval_counts_identical_captions_as_one():
    captions = ["a", "b", "a", "c"]
    z_txt = torch.eye(4)[[0, 1, 0, 2]]
    z_img = torch.tensor([[0.9, 0.1, 0, 0], [0.8, 0.1, 0, 0], [1.0, 0, 0, 0], [0, 0, 9.0, 0]])
    assert retrieval_accuracy(z_img, z_txt, captions) == 0.75  # the second picture finds "a"
    assert (
        retrieval_accuracy(z_img, z_txt, ["a", "b", "A", "c"]) == 0.5
    )  # and as another caption, the third loses to the first
    x = np.random.default_rng(0).normal(size=(1200, 8))  # more than one chunk
    y = x + np.random.default_rng(1).normal(size=x.shape) * 0.5
    angles = [
        [
            np.arccos(np.clip(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
            for b in y[:150]
        ]
        for a in x[:150]
    ]
    expected = np.mean([np.argmin(row) == i for i, row in enumerate(angles)])
    assert 0.2 < expected < 0.9
    assert retrieval_accuracy(x[:150], y[:150], list(range(150))) == pytest.approx(expected)
    assert retrieval_accuracy(x, x * 3, list(range(1200))) == 1.0


def test_bad_features():
    good = np.random.default_rng(0).normal(size=(10, 3))
    calls = {
        frechet_distance: [
            (good, good[:, :2]),
            (good[:1], good),
            (good[0], good),
            (good * np.nan, good),
        ],
        precision_recall: [(good[:3], good), (good, good, 0), (good, good[:, :1])],
        clip_score: [(good, good[:4])],
        retrieval_accuracy: [(good, good, ["x"]), (good, good[:5], list("abcdefghij"))],
    }
    for function, wrong in calls.items():
        for arguments in wrong:
            with pytest.raises(ValueError):
                function(*arguments)


def test_coverage_checks_what_it_is_given():
    points = torch.randn(8, 3)
    assert covered(points, points, k=2).all()
    for a, b, said in (
        (points, points[:2], "N at least 3"),
        (points[:, :2], points, "different widths"),
        (points * torch.nan, points, "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            covered(a, b, k=2)
