"""The autoregressive prior P(z_img | y): the embedding of a picture, written as a row of numbers, one after the other.

    P(z_img | y) = Π_k P(code_k | code_<k, bucket of z_img·z_txt, z_txt, y)                                        (unCLIP §2.2)

A principal component analysis turns z_img into few coordinates, the widest first; each is rounded to one of 1,024 buckets; a causal
transformer, as for words, predicts one code from those before it. The sequence, with what each place predicts below it:

    caption tokens | z_txt | z_img·z_txt | code_1 | code_2 | … | code_{K−1}
                                  code_1   code_2   code_3         code_K

The third item says how well the picture fits its caption. At sampling one asks for a fit from the better half of what training saw.

Shapes: B batch, L context length, W width, D = clip_dim, K coordinates kept, M buckets.
References: unCLIP (2204.06125) §2.2 and its footnotes, App. C, Table 3. Read next: prior.py, which is asked in the same way.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .runtime.checks import check_captions, check_divisible, check_positive, check_range
from .runtime.noise import draw_rows
from .sampling import guide
from .transformer import CaptionEmbedding, Transformer, timestep_embedding
from .tricks.whitening import Whitening


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
    text_drop: float = 0.1              # §2.2
    buckets: int = 1024                 # §2.2; of each coordinate and of the dot product
    pca_error: float = 0.01             # §2.2: share of the variance that the coordinates left out may hold
    top: float = 0.5                    # §2.2: the share of best dot products that sampling draws from
    guidance: float = 1.0               # mini: the paper's scale for the prior is not given; 1 is none
    temperature: float = 1.0            # mini: the paper gives none either; 1 draws codes as often as they are predicted
    whiten_z: bool = False              # mini: see whitening.py; of z_txt, the codes are not concerned
    place_width: int = 0                # hidden width of a network for each place (see PlaceNetworks); 0: none, as in the paper
    places: int = 0                     # mini: the most codes there is room for, whatever pca_error asks; 0: as many as clip_dim

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "width", "layers", "heads", "text_width", "text_layers", "text_heads", "buckets")
        check_range(self, 0, 1, "text_drop", "pca_error", "top")
        check_range(self, 0, math.inf, "guidance", "temperature", "place_width")
        check_range(self, 0, self.clip_dim, "places")
        check_divisible(self, "width", "heads")
        check_divisible(self, "text_width", "text_heads")
        if self.buckets < 2 or self.width % 2:
            raise ValueError(f"buckets {self.buckets} must be at least 2, width {self.width} even")


class Codes(nn.Module):
    """z_img (B, D) <-> codes (B, K) of whole numbers 0..M−1: principal components, then M equal buckets from least to greatest seen.

    Coordinate k of z − mean lies in [low_k, high_k] for all of the training embeddings. Bucket i is the i-th of M equal parts of that
    interval and stands for its middle; what lies outside goes to the first or the last.
    """

    def __init__(self, dim, buckets, most=None):
        super().__init__()
        self.buckets, self.most = buckets, most or dim                     # most: of the codes kept
        # mini: the paper says neither where the buckets' edges lie nor what a bucket stands for: here as the class describes.
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("directions", torch.eye(dim))                 # (D, D), columns by decreasing variance
        self.register_buffer("low", torch.full((dim,), -1.0))              # (D,)
        self.register_buffer("high", torch.ones(dim))
        self.register_buffer("kept", torch.tensor(self.most))              # K

    @property
    def count(self):
        """K. While only shapes are followed (torch's "meta" device) it is the most there can be."""
        return self.most if self.kept.is_meta else int(self.kept)

    @torch.no_grad()
    def fit(self, z, error):
        """Measures z (N, D) and keeps the fewest coordinates that leave out at most `error` of the variance, but not over the most.

        -> (K, share of the variance that is lost by leaving out the others, share lost with the rounding to buckets too).
        """
        z = z.double()
        mean = z.mean(0)
        variance, directions = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
        variance, directions = variance.flip(0).clamp(min=0), directions.flip(1)           # eigh has the smallest first
        lost = 1 - variance.cumsum(0) / variance.sum()                     # (D,): when the first k + 1 are kept
        kept = int((lost > error).sum()) + 1
        coordinates = (z - mean) @ directions                              # (N, D)
        self.mean.copy_(mean)
        self.directions.copy_(directions)
        self.low.copy_(coordinates.amin(0))
        self.high.copy_(coordinates.amax(0))
        self.kept.fill_(min(kept, self.most))
        back = self.decode(self.encode(z.float())).double()
        return self.count, float(lost[self.count - 1].clamp(min=0)), float((back - z).square().sum(1).mean() / variance.sum())

    def encode(self, z):
        """z (B, D) -> codes (B, K) int64."""
        K = self.count
        place = ((z - self.mean) @ self.directions[:, :K] - self.low[:K]) / (self.high[:K] - self.low[:K])     # 0..1
        return (place * self.buckets).long().clamp(0, self.buckets - 1)

    def middle(self, codes):
        """codes (B, k) -> the middles of their buckets, 0..1: how far along its interval each lies."""
        return (codes + 0.5) / self.buckets

    def decode(self, codes):
        """codes (B, K) -> z (B, D), not normalised."""
        K = self.count
        coordinates = self.low[:K] + self.middle(codes) * (self.high[:K] - self.low[:K])
        return coordinates @ self.directions[:, :K].T + self.mean

    def project(self, z, count):
        """z (B, D) with all but the `count` widest components at their mean, of unit norm again. Raises ValueError for another count."""
        if not 1 <= count <= len(self.mean):
            raise ValueError(f"{count} components: there are 1 to {len(self.mean)}")
        kept = self.directions[:, :count]                                  # (D, count)
        return F.normalize((z - self.mean) @ kept @ kept.T + self.mean, dim=-1)


# mini: not in the paper; `place_width` asks for it. A transformer of few steps is slow to find out that a code mostly follows, at each place
# in another way, from the text and from the values of all codes before it. After 900 steps, 4.6 minutes, one of four blocks predicted codes
# worse (5.82 nats) than linear regression does (5.76); one block with these networks came to 5.28 in half that time.
class PlaceNetworks(nn.Module):
    """For each place k a network of its own, W_k SiLU(U_k values_<k + V_k text + b_k): what the text and all earlier codes say of code k.

    Its output is added to what enters the transformer at that place. W_k is at first zero.
    """

    def __init__(self, places, width, hidden, text_width=64):
        super().__init__()
        self.text = nn.Sequential(nn.Linear(width, 4 * text_width), nn.SiLU(), nn.Linear(4 * text_width, text_width))
        self.from_values = nn.Parameter(torch.randn(places, places, hidden) / math.sqrt(places))
        self.from_text = nn.Parameter(torch.randn(places, text_width, hidden) / math.sqrt(text_width))
        self.bias = nn.Parameter(torch.zeros(places, hidden))
        self.leave = nn.Parameter(torch.zeros(places, hidden, width))

    def forward(self, values, text, first=0):
        """Places `first` to k, (B, k + 1 − first, W), when k codes are known: their values (B, k), about -3..3, text (B, W)."""
        k = values.shape[1]
        before = torch.ones(k + 1, k, device=values.device).tril(-1)[first:, :, None]         # place i knows the values 0..i−1
        h = torch.einsum("bj,ijh->bih", values.to(text.dtype), self.from_values[first:k + 1, :k] * before)
        h = h + torch.einsum("bt,ith->bih", self.text(text), self.from_text[first:k + 1]) + self.bias[first:k + 1]
        return torch.einsum("bih,ihw->biw", F.silu(h), self.leave[first:k + 1])


class ARPrior(nn.Module):
    """Codes, text encoder, the causal transformer, its loss and its sampler."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.codes = Codes(cfg.clip_dim, cfg.buckets, cfg.places)
        self.whitening_txt = Whitening(cfg.clip_dim)                       # unless fitted: times √D
        # mini: buckets of z_img·z_txt are quantiles: each holds as many training pictures as another. The top half "of the distribution"
        # is then the upper 512; the paper does not say of which, and a prediction for this very caption is not at hand before z_img is.
        self.register_buffer("dots", torch.linspace(-1, 1, cfg.buckets + 1)[1:])           # (M,), the largest of each bucket
        self.caption = CaptionEmbedding(cfg.vocab_size, cfg.context_length, cfg.text_width, cfg.eot_id)
        self.text = Transformer(cfg.text_layers, cfg.text_width, cfg.text_heads)           # bidirectional
        self.ln_text = nn.LayerNorm(cfg.text_width)
        self.text_proj = nn.Linear(cfg.text_width, cfg.width)
        self.z_txt_proj = nn.Linear(cfg.clip_dim, cfg.width)
        # mini: the paper does not say what stands for dropped text: a learned vector in z_txt's place, padding in the caption's.
        self.null_z_txt = nn.Parameter(torch.empty(cfg.width))
        self.dot_embedding = nn.Embedding(cfg.buckets, cfg.width)
        # mini: one table of buckets for all coordinates, in and out; the place says which coordinate it is.
        self.code_embedding = nn.Embedding(cfg.buckets, cfg.width)
        self.position = nn.Parameter(torch.empty(cfg.clip_dim + 1, cfg.width))             # of z_txt, z_img·z_txt, code_1 … code_{D−1}
        self.places = PlaceNetworks(self.codes.most, cfg.width, cfg.place_width) if cfg.place_width else None
        self.transformer = Transformer(cfg.layers, cfg.width, cfg.heads, causal=True)
        self.ln_final = nn.LayerNorm(cfg.width)
        self.init_weights()

    def init_weights(self):
        """Small normals; the tables of buckets start as waves, so that neighbouring buckets mean nearly the same from the start."""
        for parameter in (self.null_z_txt, self.position):
            nn.init.normal_(parameter, std=0.02)
        with torch.no_grad():
            waves = timestep_embedding(torch.arange(self.cfg.buckets), self.cfg.width, max_period=self.cfg.buckets)
            for table in (self.dot_embedding, self.code_embedding):
                table.weight.copy_(waves / math.sqrt(self.cfg.width / 2))  # rows of length 1

    @torch.no_grad()
    def measure(self, z_img, z_txt):
        """Fits what is fixed before training to the training embeddings (N, D): the codes, the fit's quantiles, the whitening of z_txt."""
        kept, lost, rounded = self.codes.fit(z_img, self.cfg.pca_error)
        short = kept == self.cfg.places and lost > self.cfg.pca_error
        print(f"ar_prior: {kept} of {self.cfg.clip_dim} components leave out {lost:.2%} of the variance, {rounded:.2%} with the rounding "
              f"to {self.cfg.buckets} buckets" + ("; ar_prior.places is too small for less" if short else ""))
        dots = (z_img * z_txt).sum(-1).sort().values
        at = torch.arange(1, self.cfg.buckets + 1, device=dots.device) * len(dots) // self.cfg.buckets - 1
        self.dots.copy_(dots[at.clamp(min=0)])
        if self.cfg.whiten_z:
            self.whitening_txt.fit(z_txt)

    def bucket(self, dot):
        """z_img·z_txt (B,) -> the bucket it falls in (B,): 0 for the worst fits of the training pictures, M − 1 for the best."""
        return torch.bucketize(dot, self.dots[:-1])

    def prefix(self, tokens, z_txt, keep=None):
        """Caption and z_txt as the first places of the sequence, (B, L + 1, W): tokens (B, L), z_txt (B, D); keep (B,) bool: text kept?"""
        text = self.z_txt_proj(self.whitening_txt(z_txt))                  # (B, W)
        if keep is not None:
            text = torch.where(keep[:, None], text, self.null_z_txt)
        # mini: caption, z_txt, z_img·z_txt and codes stand in one sequence; the paper says neither in which order, nor how the encoded
        # caption is attended to.
        states = self.text_proj(self.ln_text(self.text(self.caption(tokens, keep))))       # (B, L, W)
        return torch.cat([states, (text + self.position[0])[:, None]], dim=1)

    def items(self, codes, dot, text, first=0):
        """What stands behind the text, from item `first` on, (B, k + 1 − first, W): codes (B, k) known so far, dot (B,), text (B, W)."""
        k = codes.shape[1]
        items = torch.cat([self.dot_embedding(dot)[:, None], self.code_embedding(codes)], dim=1) + self.position[1:k + 2]
        if self.places is None:
            return items[:, first:]
        values = self.codes.middle(codes) * 6 - 3                          # the ends of an interval are some three spreads from the mean
        return items[:, first:] + self.places(values, text, first)

    def logits(self, states):
        """States (B, n, W) -> logits (B, n, M) of the next code."""
        return self.ln_final(states) @ self.code_embedding.weight.T

    def forward(self, codes, dot, tokens, z_txt, keep=None):
        """Logits (B, K, M) of all codes, each from those before it: codes (B, K), dot (B,) bucket, tokens (B, L), z_txt (B, D)."""
        prefix = self.prefix(tokens, z_txt, keep)
        items = self.items(codes[:, :-1], dot, prefix[:, -1])              # (B, K, W)
        return self.logits(self.transformer(torch.cat([prefix, items], dim=1))[:, prefix.shape[1]:])

    def loss(self, z_img, z_txt, tokens, generator=None):
        """Mean negative log-likelihood of a code in nats (chance: ln M): z_img, z_txt (B, D) of unit norm, tokens (B, L)."""
        B, device = len(z_img), z_img.device
        keep = draw_rows(torch.rand, (B,), generator, device) >= self.cfg.text_drop
        codes = self.codes.encode(z_img)                                   # (B, K)
        # mini: the bucket of z_img·z_txt stays when the text is dropped; the paper does not say.
        dot = self.bucket((z_img * z_txt).sum(-1))                         # (B,)
        return F.cross_entropy(self(codes, dot, tokens, z_txt, keep).flatten(0, 1).float(), codes.flatten())

    @torch.no_grad()
    def sample(self, tokens, z_txt, guidance=None, generator=None, progress=False, use_cache=True):
        """z_img (B, D) of unit norm for captions tokens (B, L) with z_txt (B, D).

        Guidance acts on the logits. use_cache: keys and values of earlier places are kept, so that each code costs one place instead of
        the whole sequence. `generator`: one, or a list with one per picture.
        """
        cfg, B, K = self.cfg, len(tokens), self.codes.count
        guidance = cfg.guidance if guidance is None else guidance
        u = draw_rows(torch.rand, (B, K + 1), generator, z_txt.device)     # all that is random: one number per place
        rank = ((1 - cfg.top * u[:, 0]) * cfg.buckets).long().clamp(max=cfg.buckets - 1)
        dot = self.bucket(self.dots[rank])                                 # not `rank` itself: with few pictures some buckets are empty
        copies = 1 if guidance == 1.0 else 2                               # guided: each row once more, without its text
        keep = None if copies == 1 else torch.arange(2 * B, device=z_txt.device) < B
        prefix, dot = self.prefix(tokens.repeat(copies, 1), z_txt.repeat(copies, 1), keep), dot.repeat(copies)
        codes = torch.empty(B, 0, dtype=torch.long, device=z_txt.device)
        cache, sequence = self.transformer.new_cache() if use_cache else None, prefix
        for k in tqdm(range(K), disable=not progress, leave=False, desc="ar_prior"):
            item = self.items(codes.repeat(copies, 1), dot, prefix[:, -1], first=k)            # (copies · B, 1, W)
            sequence = item if use_cache and k else torch.cat([sequence, item], dim=1)
            logits = self.logits(self.transformer(sequence, cache)[:, -1:])[:, 0]              # (copies · B, M)
            if copies == 2:
                logits = guide(*logits.chunk(2), guidance)
            codes = torch.cat([codes, draw(logits / max(cfg.temperature, 1e-6), u[:, k + 1])[:, None]], dim=1)
        # mini: what the codes give is normalised to the unit sphere, where CLIP's embeddings lie; the paper does not say.
        return F.normalize(self.codes.decode(codes), dim=-1)


def draw(logits, u):
    """One bucket per row, by the inverse of the distribution function: logits (B, M), u (B,) in [0, 1) -> (B,) int64."""
    below = logits.double().softmax(dim=-1).cumsum(dim=-1)                 # (B, M)
    return (below <= u[:, None]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
