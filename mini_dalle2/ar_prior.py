"""The autoregressive prior P(z_img | y): a picture's embedding as a row of codes, one by one.

    P(z_img | y) = Π_k P(code_k | code_<k, bucket of z_img·z_txt, z_txt, y)        (unCLIP §2.2)

A principal component analysis turns z_img into few coordinates, the widest first. Each coordinate
is rounded to one of 1,024 buckets. A causal transformer, as for words, predicts each code from the
codes before it. The sequence, with what each place predicts below it:

    caption tokens | z_txt | z_img·z_txt | code_1 | code_2 | … | code_{K−1}
                                  code_1   code_2   code_3         code_K

The third item says how well the picture fits its caption. Sampling asks for a fit from the better
half of those seen in training.

Shapes: B batch, N examples, L context length, W width, D = clip_dim, K coordinates kept, M buckets.
References: unCLIP (2204.06125) §2.2 and its footnotes, App. C, Table 3.
Read next: prior.py, which is called in the same way.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .runtime.checks import check_captions, check_divisible, check_positive, check_range
from .runtime.noise import rand
from .sampling import guide
from .transformer import CaptionEmbedding, Transformer, timestep_embedding


@dataclass(frozen=True)
class ARPriorConfig:
    """Sizes of both transformers, and how embeddings become codes."""

    clip_dim: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4
    vocab_size: int = 600
    context_length: int = 16
    eot_id: int = 599
    text_width: int = 128
    text_layers: int = 1
    text_heads: int = 4
    # §2.2
    text_drop: float = 0.1
    # §2.2: of each coordinate, and of the dot product.
    buckets: int = 1024
    # §2.2: the share of the variance that the coordinates left out may hold.
    pca_error: float = 0.01
    # §2.2: the share of best dot products that sampling chooses from.
    top: float = 0.5
    # mini: the paper does not give this prior's guidance scale. The default of 1 is no guidance.
    guidance: float = 1.0
    # mini: the paper gives no temperature. The default of 1 samples codes as often as predicted.
    temperature: float = 1.0

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "width", "layers", "heads", "text_width", "text_layers",
                       "text_heads", "buckets")
        check_range(self, 0, 1, "text_drop", "pca_error", "top")
        check_range(self, 0, math.inf, "guidance", "temperature")
        check_divisible(self, "width", "heads")
        check_divisible(self, "text_width", "text_heads")
        if self.buckets < 2 or self.width % 2:
            raise ValueError(f"buckets {self.buckets} must be at least 2, width {self.width} even")


class Codes(nn.Module):
    """z_img (B, D) <-> codes (B, K), whole numbers 0..M−1: principal components in M buckets.

    In training, coordinate k of z − mean lies in [low_k, high_k]. Bucket i is the i-th of M equal
    parts of this interval and stands for its middle. Values outside go to the first or last bucket.
    """

    def __init__(self, dim, buckets, most=None):
        super().__init__()
        self.buckets = buckets
        # The largest number of coordinates that may be kept.
        self.most = most or dim
        # mini: the paper says neither where the edges of the buckets lie nor which value a bucket
        # stands for. Here buckets are equally wide and stand for their middles.
        self.register_buffer("mean", torch.zeros(dim))
        # Columns by decreasing variance.
        self.register_buffer("directions", torch.eye(dim))                 # (D, D)
        self.register_buffer("low", torch.full((dim,), -1.0))              # (D,)
        self.register_buffer("high", torch.ones(dim))                      # (D,)
        # K.
        self.register_buffer("kept", torch.tensor(self.most))

    @property
    def count(self):
        """K. On torch's "meta" device, which only follows shapes, it is the most possible."""
        return self.most if self.kept.is_meta else int(self.kept)

    @torch.no_grad()
    def find_components(self, z, error):
        """Measure z (N, D); keep the fewest coordinates that lose at most `error` of the variance.

        Never keeps more than `most`. Returns K, the share of the variance lost with the other
        coordinates, and the share lost when the codes are rounded to buckets as well.
        """
        z = z.double()
        mean = z.mean(0)
        covariance = (z - mean).T @ (z - mean) / len(z)                    # (D, D)
        variance, directions = torch.linalg.eigh(covariance)
        # eigh has the smallest first.
        variance = variance.flip(0).clamp(min=0)                           # (D,)
        directions = directions.flip(1)                                    # (D, D)
        if variance.sum() <= (1e-5 * z.norm(dim=1).max()).square():
            # Copies of one picture: what differs is rounding. One coordinate keeps everything.
            variance = torch.eye(len(mean), dtype=z.dtype, device=z.device)[0]
        # What is lost when the first k + 1 are kept.
        lost = 1 - variance.cumsum(0) / variance.sum()                     # (D,)
        kept = int((lost > error).sum()) + 1
        coordinates = (z - mean) @ directions                              # (N, D)
        self.mean.copy_(mean)
        self.directions.copy_(directions)
        self.low.copy_(coordinates.amin(0))
        self.high.copy_(coordinates.amax(0))
        # An interval without any length would have no buckets.
        self.high.add_(self.low == self.high)
        self.kept.fill_(min(kept, self.most))
        decoded = self.decode(self.encode(z.float())).double()             # (N, D)
        squared_error = (decoded - z).square().sum(1).mean()
        lost_without_others = float(lost[self.count - 1].clamp(min=0))
        return self.count, lost_without_others, float(squared_error / variance.sum())

    def encode(self, z):
        """z (B, D) -> codes (B, K), int64."""
        K = self.count
        coordinates = (z - self.mean) @ self.directions[:, :K]             # (B, K)
        # How far along its interval each coordinate lies, 0..1.
        place = (coordinates - self.low[:K]) / (self.high[:K] - self.low[:K])
        return (place * self.buckets).long().clamp(0, self.buckets - 1)

    def middle(self, codes):
        """Return how far along its interval the middle of each code's bucket lies, 0..1."""
        return (codes + 0.5) / self.buckets

    def decode(self, codes):
        """codes (B, K) -> z (B, D), not normalised."""
        K = self.count
        coordinates = self.low[:K] + self.middle(codes) * (self.high[:K] - self.low[:K])
        return coordinates @ self.directions[:, :K].T + self.mean

    def project(self, z, count):
        """Return z (B, D) with only the `count` widest components left, of unit norm again.

        The other components are at their mean. Raises ValueError for a count that cannot be.
        """
        if not 1 <= count <= len(self.mean):
            raise ValueError(f"{count} components: there are 1 to {len(self.mean)}")
        kept = self.directions[:, :count]                                  # (D, count)
        return F.normalize((z - self.mean) @ kept @ kept.T + self.mean, dim=-1)


class ARPrior(nn.Module):
    """Codes, text encoder, the causal transformer, its loss and its sampler."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.codes = self.new_codes()
        # mini: the paper does not say whose top half is asked for. Here the buckets of z_img·z_txt
        # are quantiles of the training pictures, and the top half is the upper 512 of them.
        # The buffer holds the largest z_img·z_txt of each bucket.
        self.register_buffer("dots", torch.linspace(-1, 1, cfg.buckets + 1)[1:])           # (M,)
        self.caption = CaptionEmbedding(
            cfg.vocab_size, cfg.context_length, cfg.text_width, cfg.eot_id)
        # Bidirectional.
        self.text = Transformer(cfg.text_layers, cfg.text_width, cfg.text_heads)
        self.ln_text = nn.LayerNorm(cfg.text_width)
        self.text_proj = nn.Linear(cfg.text_width, cfg.width)
        self.z_txt_proj = nn.Linear(cfg.clip_dim, cfg.width)
        # mini: the paper does not say what replaces dropped text. Here a learned vector replaces
        # z_txt, and padding replaces the caption.
        self.null_z_txt = nn.Parameter(torch.empty(cfg.width))
        self.dot_embedding = nn.Embedding(cfg.buckets, cfg.width)
        # mini: the paper does not say whether coordinates share an embedding table. Here one table
        # serves all of them, in and out; the position tells them apart.
        self.code_embedding = nn.Embedding(cfg.buckets, cfg.width)
        # Of z_txt, z_img·z_txt, code_1 … code_{D−1}.
        self.position = nn.Parameter(torch.empty(cfg.clip_dim + 1, cfg.width))
        self.add_transformer()
        self.ln_final = nn.LayerNorm(cfg.width)
        self.init_weights()

    def new_codes(self):
        """Make the translation of embeddings to codes, not yet fitted."""
        return Codes(self.cfg.clip_dim, self.cfg.buckets)

    def add_transformer(self):
        """Add the layers that read the sequence of items."""
        cfg = self.cfg
        self.transformer = Transformer(cfg.layers, cfg.width, cfg.heads, causal=True)

    def init_weights(self):
        """Draw the free vectors from small normals, and start the tables of buckets as waves.

        With waves, neighbouring buckets mean nearly the same from the start.
        """
        nn.init.normal_(self.null_z_txt, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        M = self.cfg.buckets
        with torch.no_grad():
            waves = timestep_embedding(torch.arange(M), self.cfg.width, max_period=M)
            for table in (self.dot_embedding, self.code_embedding):
                # Rows of length 1.
                table.weight.copy_(waves / math.sqrt(self.cfg.width / 2))

    @torch.no_grad()
    def measure(self, z_img, z_txt):
        """Fit what is fixed before training to the training embeddings (N, D).

        That is the codes and the quantiles of z_img·z_txt. Returns the share of the variance that
        the codes leave out.
        """
        kept, lost, rounded = self.codes.find_components(z_img, self.cfg.pca_error)
        print(f"ar_prior: {kept} of {self.cfg.clip_dim} components leave out {lost:.2%} of the "
              f"variance, {rounded:.2%} with the rounding to {self.cfg.buckets} buckets")
        dots = (z_img * z_txt).sum(-1).sort().values                       # (N,)
        ends = torch.arange(1, self.cfg.buckets + 1, device=dots.device)   # (M,)
        ends = ends * len(dots) // self.cfg.buckets - 1
        self.dots.copy_(dots[ends.clamp(min=0)])
        return lost

    def bucket(self, dot):
        """z_img·z_txt (B,) -> its bucket (B,): 0 for the worst fits in training, M − 1 the best."""
        return torch.bucketize(dot, self.dots[:-1])

    def scale_text(self, z_txt):
        """Scale z_txt (B, D), a unit vector, to unit variance per coordinate."""
        # mini: the paper does not scale z_txt. A linear layer learns faster from unit variance.
        return z_txt * math.sqrt(self.cfg.clip_dim)

    def prefix(self, tokens, z_txt, keep=None):
        """Return caption and z_txt as the first places of the sequence, (B, L + 1, W).

        tokens (B, L), z_txt (B, D), keep (B,) bool: False drops the text.
        """
        text = self.z_txt_proj(self.scale_text(z_txt))                     # (B, W)
        if keep is not None:
            text = torch.where(keep[:, None], text, self.null_z_txt)
        # mini: the paper says neither how the encoded caption is attended to nor in which order
        # the items stand. Here caption, z_txt, z_img·z_txt and codes form one sequence.
        encoded = self.text(self.caption(tokens, keep))                    # (B, L, text_width)
        states = self.text_proj(self.ln_text(encoded))                     # (B, L, W)
        return torch.cat([states, (text + self.position[0])[:, None]], dim=1)

    def items(self, codes, dot, text, first=0):
        """Return what stands behind the text, from item `first` on: (B, k + 1 − first, W).

        codes (B, k) known so far, dot (B,) the bucket of z_img·z_txt; text (B, W), the item of
        z_txt, is for subclasses.
        """
        k = codes.shape[1]
        items = torch.cat([self.dot_embedding(dot)[:, None], self.code_embedding(codes)], dim=1)
        items = items + self.position[1:k + 2]                             # (B, k + 1, W)
        return items[:, first:]

    def logits(self, states):
        """States (B, n, W) -> logits (B, n, M) of the next code."""
        return self.ln_final(states) @ self.code_embedding.weight.T

    def forward(self, codes, dot, tokens, z_txt, keep=None):
        """Return logits (B, K, M) of all codes, each from the codes before it.

        codes (B, K), dot (B,) bucket, tokens (B, L), z_txt (B, D), keep (B,) bool.
        """
        prefix = self.prefix(tokens, z_txt, keep)                          # (B, L + 1, W)
        items = self.items(codes[:, :-1], dot, prefix[:, -1])              # (B, K, W)
        states = self.transformer(torch.cat([prefix, items], dim=1))
        return self.logits(states[:, prefix.shape[1]:])

    def loss(self, z_img, z_txt, tokens, generator=None):
        """Return the mean negative log-likelihood of a code, in nats; chance is ln M.

        z_img, z_txt (B, D) of unit norm, tokens (B, L).
        """
        keep = rand((len(z_img),), generator, z_img.device) >= self.cfg.text_drop
        codes = self.codes.encode(z_img)                                   # (B, K)
        # mini: the paper does not say whether dropped text also drops z_img·z_txt. Here its bucket
        # stays.
        dot = self.bucket((z_img * z_txt).sum(-1))                         # (B,)
        logits = self(codes, dot, tokens, z_txt, keep)                     # (B, K, M)
        return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())

    @torch.no_grad()
    def sample(self, tokens, z_txt, guidance=None, steps=None, generator=None, progress=False,
               use_cache=True):
        """Sample z_img (B, D) of unit norm for captions, tokens (B, L), with z_txt (B, D).

        Guidance acts on the logits; None takes the configuration's. `steps` is accepted so that
        both priors are called alike, and ignored: this prior takes one step for each code.
        `generator`: one, or a list with one per caption. use_cache: keep the keys and values of
        earlier places, so that a code costs one place instead of the whole sequence.
        """
        cfg = self.cfg
        B = len(tokens)
        K = self.codes.count
        guidance = cfg.guidance if guidance is None else guidance
        # All that is random: one number per place.
        u = rand((B, K + 1), generator, z_txt.device)
        dot = self.sample_fit(u[:, 0])                                     # (B,)
        # With guidance, each row comes once more without its text.
        copies = 1 if guidance == 1.0 else 2
        keep = None
        if copies == 2:
            keep = torch.arange(2 * B, device=z_txt.device) < B            # (2B,)
        prefix = self.prefix(tokens.repeat(copies, 1), z_txt.repeat(copies, 1), keep)
        dot = dot.repeat(copies)
        codes = torch.empty(B, 0, dtype=torch.long, device=z_txt.device)
        cache = self.transformer.new_cache() if use_cache else None
        sequence = prefix
        for k in tqdm(range(K), disable=not progress, leave=False, desc="ar_prior"):
            known = codes.repeat(copies, 1)                                # (copies · B, k)
            item = self.items(known, dot, prefix[:, -1], first=k)          # (copies · B, 1, W)
            sequence = item if use_cache and k else torch.cat([sequence, item], dim=1)
            states = self.transformer(sequence, cache)
            logits = self.logits(states[:, -1:])[:, 0]                     # (copies · B, M)
            if copies == 2:
                cond, null = logits.chunk(2)
                logits = guide(cond, null, guidance)                       # (B, M)
            code = sample_bucket(logits / max(cfg.temperature, 1e-6), u[:, k + 1])
            codes = torch.cat([codes, code[:, None]], dim=1)
        # mini: the paper does not say whether the decoded z_img is normalised. Here it is, because
        # CLIP's embeddings lie on the unit sphere.
        return F.normalize(self.codes.decode(codes), dim=-1)

    def sample_fit(self, u):
        """Choose the bucket (B,) of z_img·z_txt from the top share; u (B,) in [0, 1)."""
        M = self.cfg.buckets
        rank = ((1 - self.cfg.top * u) * M).long().clamp(max=M - 1)        # (B,)
        # Not `rank` itself: with few training pictures some buckets are empty.
        return self.bucket(self.dots[rank])


def sample_bucket(logits, u):
    """Sample one bucket per row by the inverse distribution function.

    logits (B, M), u (B,) in [0, 1) -> (B,) int64.
    """
    below = logits.double().softmax(dim=-1).cumsum(dim=-1)                 # (B, M)
    return (below <= u[:, None]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
