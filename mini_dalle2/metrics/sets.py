"""Generated sets against real sets: Fréchet distance, precision and recall, CLIP score, retrieval.

    FID = |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½)

These are the field's usual figures (unCLIP §5): Table 2 has the Fréchet distance, Figure 13
precision and recall. The Fréchet distance is biased upward for small sets, even between two sets of
one distribution. `intervals.bootstrap(extrapolate=True)` removes most of the bias.

Shapes: N, M pictures, D width of features or embeddings, (N, D) arrays or tensors. Sums are done
in float64.
References: Heusel et al. 2017, 1706.08500 (FID); Kynkäänniemi et al. 2019, 1904.06991 (precision
and recall); Hessel et al. 2021, 2104.08718 (CLIP score). Read next: intervals.py.
"""

import torch

from ..runtime.device import off_mps


def features(x, name, least=1):
    """Check features: a float64 copy (N, D), on their own device if it has float64.

    Raises ValueError if they are not (N ≥ least, D) or not finite.
    """
    x = off_mps(torch.as_tensor(x).detach()).double()
    if x.ndim != 2 or x.shape[0] < least or x.shape[1] < 1:
        raise ValueError(
            f"{name} must have shape (N, D) with N at least {least}, got {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds values that are not finite")
    return x


def same_width(a, b):
    """Raise ValueError unless both feature sets (N, D) have the same width D."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of different widths: {a.shape[1]} and {b.shape[1]}")


def frechet_distance(a, b):
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (N, D), (M, D): a float.

    0 for equal mean and covariance. Heusel et al., Eq. 6, with covariances over N − 1. It is "FID"
    only with Inception features. Small sets overstate it: see `bootstrap`. Raises ValueError for
    fewer than two rows, different widths or values that are not finite.
    """
    a, b = features(a, "a", 2), features(b, "b", 2)
    same_width(a, b)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    # Σ = xᵀ·x
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = trace_of_root(a, b)
    return max(0.0, float(gap + a.square().sum() + b.square().sum() - 2 * cross))


def trace_of_root(a, b):
    """Tr (Σ_a·Σ_b)^½ for Σ_a = aᵀ·a and Σ_b = bᵀ·b, of a (N, D) and b (M, D)."""
    if max(len(a), len(b)) < a.shape[1]:
        # With fewer rows than columns the singular values of a·bᵀ give the same, and sooner.
        return torch.linalg.svdvals(a @ b.T).sum()
    # Σ_a·Σ_b is not symmetric, but has the eigenvalues of Σ_a^½·Σ_b·Σ_a^½, which is. So no root
    # is complex.
    values, vectors = torch.linalg.eigh(a.T @ a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return torch.linalg.eigvalsh(root @ (b.T @ b) @ root).clamp(min=0).sqrt().sum()


def distances(a, b):
    """Euclidean distances (N, M), by differences.

    |a|² − 2ab + |b|² would be faster, but inexact between near neighbours.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def covered(points, centres, k=3):
    """Which points (N, D) lie in the ball of at least one centre (M, D): (N,) bool.

    A centre's ball reaches to its k-th nearest other centre. Raises ValueError for k centres or
    fewer, different widths or values that are not finite.
    """
    points, centres = features(points, "points"), features(centres, "centres", k + 1)
    same_width(points, centres)
    # The nearest of all centres is the centre itself.
    radii = torch.cat([
        distances(part, centres).topk(k + 1, largest=False).values[:, -1]
        for part in centres.split(1024)])
    return torch.cat([
        (distances(part, centres) <= radii).any(1) for part in points.split(1024)])


def precision_recall(real, fake, k=3):
    """Improved precision and recall of generated features against real ones: both in [0, 1].

    real: (N, D); fake: (M, D). A set's territory is the union of the balls around its points (see
    `covered`). Precision is the share of generated points in the real territory: does it look
    real? Recall is the share of real points in the generated territory: is everything real also
    generated? Kynkäänniemi et al., Eq. 1 and 2. Raises ValueError for k < 1, sets of k points or
    fewer, different widths or values that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, fake = features(real, "real", k + 1), features(fake, "fake", k + 1)
    same_width(real, fake)
    precision = covered(fake, real, k).double().mean()
    recall = covered(real, fake, k).double().mean()
    return float(precision), float(recall)


def clip_score(z_img, z_txt):
    """Mean of 2.5·max(cos(z_img, z_txt), 0) over N pairs (N, D), (N, D): a float in [0, 2.5].

    The embeddings may have any length. Hessel et al., Eq. 1. Raises ValueError if the two differ
    in shape or hold values that are not finite.
    """
    z_img, z_txt = features(z_img, "z_img"), features(z_txt, "z_txt")
    if z_img.shape != z_txt.shape:
        raise ValueError("clip_score needs one caption embedding per picture, got "
                         f"{tuple(z_img.shape)} and {tuple(z_txt.shape)}")
    return float(2.5 * torch.cosine_similarity(z_img, z_txt, dim=1).clamp(min=0).mean())


def retrieval_hits(z_img, z_txt, captions):
    """Which of N pictures have their own caption nearest, among all N: a list of N booleans.

    z_img, z_txt: (N, D); row i of both belongs to captions[i]. Identical captions count as one,
    because no picture could tell them apart. Raises ValueError if the three differ in number.
    """
    z_img, z_txt = features(z_img, "z_img"), features(z_txt, "z_txt")
    if not z_img.shape == z_txt.shape or len(captions) != len(z_img):
        raise ValueError("retrieval needs N embeddings of each kind and N captions, got "
                         f"{len(z_img)}, {len(z_txt)} and {len(captions)}")
    z_img, z_txt = (z / z.norm(dim=1, keepdim=True).clamp(min=1e-12) for z in (z_img, z_txt))
    found = torch.cat([(part @ z_txt.T).argmax(1) for part in z_img.split(1024)]).tolist()
    return [captions[i] == caption for i, caption in zip(found, captions)]


def retrieval_accuracy(z_img, z_txt, captions):
    """Share of pictures that find their own caption, in [0, 1]; see `retrieval_hits`."""
    hits = retrieval_hits(z_img, z_txt, captions)
    return sum(hits) / len(hits)
