"""CLIP: an image encoder and a text encoder that meet in one space, trained to tell which caption belongs to which image.

    logits = e^τ · z_img z_txtᵀ,   loss = (cross-entropy over rows + cross-entropy over columns) / 2           (CLIP §2.3, Fig. 3)

with z_img, z_txt unit vectors. Everything in DALL·E 2 hangs on this space: the prior maps a caption to a z_img, the decoder draws
a picture from z_img (unCLIP §2; appendix C gives the sizes, ViT-H/16 with a 24-block text transformer).

Shapes: B batch, S image side, P patch side, N = (S/P)² patches, L context length, W tower width, D = clip_dim, the joint space.
References: CLIP (2103.00020) and its public code; SAM (2010.01412), which unCLIP trains CLIP with, lives in training.py.
Read next: diffusion.py, then prior.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .runtime.checks import (
    check_above_zero, check_captions, check_divisible, check_positive, check_range)
from .transformer import QuickGELU, Transformer, eot_position
from .runtime.device import in_float32


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; `clip_dim` is the width of the joint space, `eot_id` the tokenizer's end-of-text."""

    clip_dim: int = 128
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 160
    vision_layers: int = 4
    vision_heads: int = 5
    vocab_size: int = 600
    context_length: int = 16
    eot_id: int = 599
    text_width: int = 160
    text_layers: int = 3
    text_heads: int = 5
    # What pixels in [0, 1] are normalised by, for each of the three colours. OpenAI's CLIP has the mean and spread of its pictures here;
    # the default does nothing to pixels in [-1, 1].
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    unit_norm: bool = True              # False: embeddings are given as long as they come (Karlo's models want them so)
    picture_weight: float = 0.0         # mini: see CLIP.picture_loss; the paper's CLIP has none

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "image_size", "patch_size", "vision_width", "vision_layers", "vision_heads",
                       "text_width", "text_layers", "text_heads")
        check_divisible(self, "image_size", "patch_size")
        check_divisible(self, "vision_width", "vision_heads")
        check_divisible(self, "text_width", "text_heads")
        check_above_zero(self, "image_std")
        check_range(self, 0, math.inf, "picture_weight")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("image_mean and image_std have three numbers each, one for each colour")


class VisionTransformer(nn.Module):
    """ViT: patches and a class token through a transformer; the class token's last state is the image. (B, 3, S, S) -> (B, D)."""

    def __init__(self, cfg):
        super().__init__()
        width, patches = cfg.vision_width, (cfg.image_size // cfg.patch_size) ** 2
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (cfg.image_mean, cfg.image_std))
        self.register_buffer("mean", 2 * mean - 1, persistent=False)       # of pixels in [-1, 1]
        self.register_buffer("std", 2 * std, persistent=False)
        self.patch_embedding = nn.Conv2d(3, width, cfg.patch_size, cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(cfg.vision_layers, width, cfg.vision_heads, activation=QuickGELU)
        self.ln_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, cfg.clip_dim, bias=False)

    def forward(self, images):
        images = (images - self.mean) / self.std
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)        # (B, N, W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)  # (B, N + 1, W)
        x = self.transformer(self.ln_pre(x + self.position_embedding), place=0)
        return self.projection(self.ln_post(x[:, 0]))                      # (B, D)


class TextTransformer(nn.Module):
    """Causal transformer over a caption; the state at its end-of-text, which alone has seen all of it, is the caption. (B, L) -> (B, D)."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.text_width
        self.eot_id = cfg.eot_id
        self.token_embedding = nn.Embedding(cfg.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(cfg.context_length, width))
        self.transformer = Transformer(cfg.text_layers, width, cfg.text_heads, causal=True, activation=QuickGELU)
        self.ln_final = nn.LayerNorm(width)
        self.projection = nn.Linear(width, cfg.clip_dim, bias=False)

    def states(self, tokens):
        """What each place knows of the caption up to it: tokens (B, L) -> (B, L, W)."""
        x = self.token_embedding(tokens) + self.position_embedding[:tokens.shape[1]]       # (B, L, W)
        return self.ln_final(self.transformer(x))

    def embedding(self, states, tokens):
        """states (B, L, W) of tokens (B, L) -> (B, D), not normalised."""
        eot = eot_position(tokens, self.eot_id)
        return self.projection(states[torch.arange(len(states), device=states.device), eot])

    def forward(self, tokens):
        return self.embedding(self.states(tokens), tokens)


class CLIP(nn.Module):
    """Both towers and the temperature."""

    MAX_LOG_SCALE = math.log(100)

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTransformer(cfg)
        self.text = TextTransformer(cfg)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # τ, learned as a logarithm
        self.redraw = None
        if cfg.picture_weight:                                             # z_img -> the picture; as wide as the transformer's own layers
            wide = 4 * cfg.vision_width
            self.redraw = nn.Sequential(nn.Linear(cfg.clip_dim, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU(),
                                        nn.Linear(wide, 3 * cfg.image_size ** 2))
        self.init_weights()

    def init_weights(self):
        """As in CLIP's code: tokens 0.02, positions 0.01, projections width^-½ (the blocks: see Transformer.init_weights)."""
        vision_std, text_std = self.cfg.vision_width ** -0.5, self.cfg.text_width ** -0.5
        nn.init.normal_(self.visual.class_embedding, std=vision_std)
        nn.init.normal_(self.visual.position_embedding, std=vision_std)
        nn.init.normal_(self.visual.projection.weight, std=vision_std)
        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text.position_embedding, std=0.01)
        nn.init.normal_(self.text.projection.weight, std=text_std)

    def encode_image(self, images):
        """images (B, 3, S, S) in [-1, 1] -> z_img (B, D), of unit norm unless `unit_norm` is off."""
        return self.normalised(self.visual(images))

    def encode_text(self, tokens):
        """tokens (B, L), each row with an end-of-text -> z_txt (B, D), of unit norm unless `unit_norm` is off."""
        return self.normalised(self.text(tokens))

    def normalised(self, z):
        """z (B, D) with unit norm, if the configuration asks for it."""
        return F.normalize(z, dim=-1) if self.cfg.unit_norm else z

    @torch.no_grad()
    def read(self, tokens):
        """tokens (B, L) -> states of the text transformer (B, L, W), z_txt (B, D): what models with `frozen_text` are told of captions."""
        states = self.text.states(tokens)
        return states, self.normalised(self.text.embedding(states, tokens))

    def forward(self, images, tokens):
        """-> logits (B, K): row i, column j says how well image i and caption j of K fit; e^τ is kept at most 100 (CLIP §2.5)."""
        return self.logits(*self.unit(images, tokens))

    def unit(self, images, tokens):
        """-> z_img (B, D), z_txt (K, D) of unit norm, in float32 whatever the networks ran in."""
        return (F.normalize(z.float(), dim=-1) for z in (self.visual(images), self.text(tokens)))

    def logits(self, z_img, z_txt):
        """z_img (B, D), z_txt (K, D) of unit norm -> logits (B, K)."""
        with in_float32(z_img):                                            # the scale magnifies rounding
            return self.logit_scale.clamp(max=self.MAX_LOG_SCALE).exp() * z_img @ z_txt.T

    def loss(self, images, tokens, wrong=None, gather=None):
        """Symmetric contrastive loss, a scalar: images (B, 3, S, S) in [-1, 1], tokens (B, L). Chance is ln B. See also `picture_loss`.

        wrong (K, L): further captions, which belong to none of these images (or are the same as one of `tokens`). They make
        choosing a caption harder, not choosing an image, so that the two halves then have different levels of chance.
        gather: rows of this process -> rows of all (distributed.gather_rows): each computes the loss of the whole batch.
        """
        # The parameter itself is cut too, as in CLIP's code: above the bound it would have no gradient, and no way back.
        with torch.no_grad():
            self.logit_scale.clamp_(max=self.MAX_LOG_SCALE)
        captions = tokens if wrong is None else torch.cat([tokens, wrong]) # (B + K, L)
        z_img, z_txt = self.unit(images, captions)
        pictures = self.picture_loss(z_img, images)
        if gather is not None:
            b, z_img, tokens = len(tokens), gather(z_img), gather(tokens)
            z_txt, captions = (torch.cat([gather(x[:b]), gather(x[b:])]) for x in (z_txt, captions))
        logits = self.logits(z_img, z_txt)                                 # (B, B + K)
        # mini: in a small world captions repeat. A second picture of "a small red circle" is no wrong answer to that
        # caption, so such pairs are taken out of the softmax instead of being pushed apart.
        same = (tokens[:, None] == captions[None]).all(-1)                 # (B, B + K)
        same[:, :len(tokens)].fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :len(tokens)].T, labels)) / 2 + pictures

    def picture_loss(self, z_img, images):
        """`picture_weight` times the mean squared error of the pictures redrawn from z_img (B, D), a scalar; 0 without."""
        # mini: not in the paper, whose captions say nearly everything of some picture or other. What captions leave unsaid (ours: where
        # things are) CLIP has no reason to keep, and keeps by accident: in directions far narrower than the others, which neither the prior
        # nor the decoder learns well. So z_img is also made to hold what the picture can be redrawn from. After six minutes of training with
        # it (weight 50), a sketch of 5,000 steps had a squared error of 0.0118; with a CLIP of 5,000 steps without it, 0.0216.
        if self.redraw is None:
            return 0.0
        redrawn = self.redraw(math.sqrt(self.cfg.clip_dim) * z_img).view_as(images)
        return self.cfg.picture_weight * F.mse_loss(redrawn.float(), images)

    @torch.no_grad()
    def zero_shot(self, images, tokens):
        """Classification without training for it (CLIP §3.1): probabilities (B, K) of K captions, tokens (K, L), for each image."""
        return self(images, tokens).softmax(dim=-1)
