"""Sets of pictures compared: Fréchet distance, precision and recall, CLIP score, retrieval.

Read next: intervals.py.
"""

import torch


def features(x, name, least=1):
    """Checked float64 copy (N, D) of an array or tensor, on its own device. Raises ValueError if it is not (N ≥ least, D) and finite."""
    x = torch.as_tensor(x).detach().double()
    if x.ndim != 2 or x.shape[0] < least or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (N, D) with N at least {least}, got {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds values that are not finite")
    return x


def same_width(a, b):
    """Raise ValueError unless both feature sets (N, D) have the same width D."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of different widths: {a.shape[1]} and {b.shape[1]}")


def frechet_distance(a, b):
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (N_a, D), (N_b, D): a float, 0 for equal mean and covariance.

    |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½) (Heusel et al., Eq. 6), covariances over N − 1. It is "FID" only with Inception features,
    and small sets overstate it: see `bootstrap`. Σ_a·Σ_b is not symmetric, but it has the eigenvalues of Σ_a^½·Σ_b·Σ_a^½, which is: no
    complex roots. With fewer rows than columns it is quicker, and the same, to sum up the singular values of A·Bᵀ, of centred A and B.
    Raises ValueError for fewer than two rows, different widths or values that are not finite.
    """
    a, b = features(a, "a", 2), features(b, "b", 2)
    same_width(a, b)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))                         # Σ = xᵀ·x
    if max(len(a), len(b)) < a.shape[1]:
        cross = torch.linalg.svdvals(a @ b.T).sum()                                        # Tr (Σ_a·Σ_b)^½
    else:
        values, vectors = torch.linalg.eigh(a.T @ a)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T                          # Σ_a^½
        cross = torch.linalg.eigvalsh(root @ (b.T @ b) @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(gap + a.square().sum() + b.square().sum() - 2 * cross))


def distances(a, b):
    """Euclidean distances (N_a, N_b), by differences: the quicker |a|² − 2ab + |b|² would lose exactly those of near neighbours."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def covered(points, centres, k=3):
    """Which points (N, D) lie within some ball around a centre (M, D), its radius the distance to its k-th nearest fellow centre: (N,) bool."""
    chunks = centres.split(1024)
    radii = torch.cat([distances(c, centres).topk(k + 1, largest=False).values[:, -1] for c in chunks])   # the nearest of all is itself
    return torch.cat([(distances(p, centres) <= radii).any(1) for p in points.split(1024)])


def precision_recall(real, fake, k=3):
    """Improved precision and recall of fake against real features, (N, D) and (M, D): (precision, recall), both in [0, 1].

    Each set's territory is the union of balls around its points, out to their k-th neighbour. Precision is the share of fakes in the
    territory of the real ones (does it look real?), recall the converse (is everything real also made?). Kynkäänniemi et al., Eq. 1 and 2.
    Raises ValueError for k < 1, sets of k points or fewer, different widths or values that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, fake = features(real, "real", k + 1), features(fake, "fake", k + 1)
    same_width(real, fake)
    return tuple(float(covered(points, centres, k).double().mean()) for points, centres in ((fake, real), (real, fake)))


def clip_score(z_img, z_txt):
    """Mean of 2.5·max(cos(z_img, z_txt), 0) over N pairs of embeddings (N, D), (N, D) of any length: a float in [0, 2.5].

    Hessel et al., Eq. 1. Raises ValueError if the two differ in shape or hold values that are not finite.
    """
    z_img, z_txt = features(z_img, "z_img"), features(z_txt, "z_txt")
    if z_img.shape != z_txt.shape:
        raise ValueError(f"clip_score needs one caption embedding per picture, got {tuple(z_img.shape)} and {tuple(z_txt.shape)}")
    return float(2.5 * torch.cosine_similarity(z_img, z_txt, dim=1).clamp(min=0).mean())


def retrieval_hits(z_img, z_txt, captions):
    """Of N pictures, those whose most similar caption embedding is their own, among all N: a list of N booleans.

    z_img, z_txt: (N, D), row i of both belongs to captions[i]. Identical captions count as one: no picture could tell them apart.
    Raises ValueError if the three differ in number.
    """
    z_img, z_txt = features(z_img, "z_img"), features(z_txt, "z_txt")
    if not z_img.shape == z_txt.shape or len(captions) != len(z_img):
        raise ValueError(f"retrieval needs N embeddings of each kind and N captions, got {len(z_img)}, {len(z_txt)} and {len(captions)}")
    z_img, z_txt = (z / z.norm(dim=1, keepdim=True).clamp(min=1e-12) for z in (z_img, z_txt))
    found = torch.cat([(z @ z_txt.T).argmax(1) for z in z_img.split(1024)]).tolist()       # (N,)
    return [captions[i] == caption for i, caption in zip(found, captions)]


def retrieval_accuracy(z_img, z_txt, captions):
    """Share of pictures that find their own caption, a float in [0, 1]; see `retrieval_hits`."""
    hits = retrieval_hits(z_img, z_txt, captions)
    return sum(hits) / len(hits)
