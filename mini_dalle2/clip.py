"""CLIP: an image encoder and a text encoder that share one space.

    logits = e^τ · z_img z_txtᵀ
    loss   = (cross-entropy over rows + cross-entropy over columns) / 2     (CLIP §2.3, Fig. 3)

z_img and z_txt are unit vectors. Training asks which caption belongs to which image. DALL·E 2 is
built on this space: the prior maps a caption to a z_img, and the decoder maps z_img to a picture
(unCLIP §2). Appendix C gives the sizes: ViT-H/16 with a text transformer of 24 blocks.

Shapes: B batch, S image side, P patch side, N = (S/P)² patches, L context length, W tower width,
D = clip_dim, the joint space, K captions.
References: CLIP (2103.00020) and its public code. unCLIP trains CLIP with SAM (2010.01412), which
is in training/state.py. Read next: diffusion.py, then prior.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .runtime.checks import (
    check_above_zero, check_captions, check_divisible, check_images, check_positive)
from .runtime.device import in_float32
from .transformer import QuickGELU, Transformer, eot_position


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers.

    clip_dim is the width of the joint space, eot_id the tokenizer's end-of-text. image_mean and
    image_std normalise pixels in [0, 1], one number for each colour; the defaults leave pixels
    in [-1, 1] as they are.
    """

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
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "image_size", "patch_size", "vision_width",
                       "vision_layers", "vision_heads", "text_width", "text_layers", "text_heads")
        check_divisible(self, "image_size", "patch_size")
        check_divisible(self, "vision_width", "vision_heads")
        check_divisible(self, "text_width", "text_heads")
        check_above_zero(self, "image_std")
        if len(self.image_mean) != 3 or len(self.image_std) != 3:
            raise ValueError("image_mean and image_std have three numbers each, "
                             "one for each colour")


class VisionTransformer(nn.Module):
    """ViT, (B, 3, S, S) -> (B, D): the last state of the class token stands for the image."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg.vision_width
        patches = (cfg.image_size // cfg.patch_size) ** 2
        mean = torch.tensor(cfg.image_mean).view(3, 1, 1)
        std = torch.tensor(cfg.image_std).view(3, 1, 1)
        # From pixels in [0, 1] to pixels in [-1, 1].
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("std", 2 * std, persistent=False)
        self.patch_embedding = nn.Conv2d(3, width, cfg.patch_size, cfg.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            cfg.vision_layers, width, cfg.vision_heads, activation=QuickGELU)
        self.ln_post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, cfg.clip_dim, bias=False)

    def forward(self, images):
        images = (images - self.mean) / self.std
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)        # (B, N, W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)  # (B, N + 1, W)
        x = self.transformer(self.ln_pre(x + self.position_embedding), place=0)
        return self.projection(self.ln_post(x[:, 0]))                      # (B, D)


class TextTransformer(nn.Module):
    """Causal transformer, (B, L) -> (B, D): the state at end-of-text stands for the caption.

    It is the only state that has seen the whole caption.
    """

    def __init__(self, cfg):
        super().__init__()
        width = cfg.text_width
        self.eot_id = cfg.eot_id
        self.token_embedding = nn.Embedding(cfg.vocab_size, width)
        self.position_embedding = nn.Parameter(torch.empty(cfg.context_length, width))
        self.transformer = Transformer(
            cfg.text_layers, width, cfg.text_heads, causal=True, activation=QuickGELU)
        self.ln_final = nn.LayerNorm(width)
        self.projection = nn.Linear(width, cfg.clip_dim, bias=False)

    def states(self, tokens):
        """Return the state at each place, which has seen the caption up to it: (B, L, W)."""
        positions = self.position_embedding[:tokens.shape[1]]              # (L, W)
        x = self.token_embedding(tokens) + positions                       # (B, L, W)
        return self.ln_final(self.transformer(x))

    def embedding(self, states, tokens):
        """Project the states (B, L, W) at each end-of-text: (B, D), not normalised."""
        eot = eot_position(tokens, self.eot_id)                            # (B,)
        rows = torch.arange(len(states), device=states.device)             # (B,)
        return self.projection(states[rows, eot])

    def forward(self, tokens):
        return self.embedding(self.states(tokens), tokens)


class CLIP(nn.Module):
    """Both towers and the temperature τ."""

    MAX_LOG_SCALE = math.log(100)
    # Noise may go beyond [-1, 1], but not so far.
    MAX_PIXEL = 8

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTransformer(cfg)
        self.text = TextTransformer(cfg)
        # τ, learned as a logarithm.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.add_layers()
        self.init_weights()

    def add_layers(self):
        """Add what a subclass has besides the two towers, before weights are initialised."""

    def init_weights(self):
        """Initialise as CLIP's code does: tokens 0.02, positions 0.01, projections width^-½.

        Transformer.init_weights initialises the blocks.
        """
        vision_std = self.cfg.vision_width ** -0.5
        text_std = self.cfg.text_width ** -0.5
        nn.init.normal_(self.visual.class_embedding, std=vision_std)
        nn.init.normal_(self.visual.position_embedding, std=vision_std)
        nn.init.normal_(self.visual.projection.weight, std=vision_std)
        nn.init.normal_(self.text.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text.position_embedding, std=0.01)
        nn.init.normal_(self.text.projection.weight, std=text_std)

    def encode_image(self, images):
        """Embed images (B, 3, S, S) in [-1, 1] as z_img (B, D) of unit norm.

        Raises ValueError for another type or side, and for pixels from 0 to 255.
        """
        check_images(images, self.cfg.image_size, self.MAX_PIXEL)
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, tokens):
        """Embed captions, tokens (B, L) with an end-of-text each, as z_txt (B, D) of unit norm.

        Raises ValueError for anything else than a tensor with an end-of-text in each row.
        """
        if not isinstance(tokens, torch.Tensor):
            raise ValueError(f"tokens are a {type(tokens).__name__}: give captions to a "
                             f"BPETokenizer's `tokenize`, and its tensor to this model")
        return F.normalize(self.text(tokens), dim=-1)

    def forward(self, images, tokens):
        """Return logits (B, K): how well image i of B and caption j of K fit.

        Raises ValueError for other images than `encode_image` takes.
        """
        check_images(images, self.cfg.image_size, self.MAX_PIXEL)
        return self.logits(*self.unit(images, tokens))

    def unit(self, images, tokens):
        """Embed both: z_img (B, D), z_txt (K, D) of unit norm, in float32 even under autocast."""
        z_img = F.normalize(self.visual(images).float(), dim=-1)
        z_txt = F.normalize(self.text(tokens).float(), dim=-1)
        return z_img, z_txt

    def logits(self, z_img, z_txt):
        """Compare z_img (B, D) and z_txt (K, D) of unit norm: e^τ z_img z_txtᵀ, (B, K).

        e^τ is at most 100 (CLIP §2.5). It magnifies rounding, hence float32.
        """
        with in_float32(z_img):
            scale = self.logit_scale.clamp(max=self.MAX_LOG_SCALE).exp()
            return scale * z_img @ z_txt.T

    def loss(self, images, tokens, gather=None):
        """Return the symmetric contrastive loss, a scalar; chance is ln B.

        images (B, 3, S, S) in [-1, 1]. tokens (K, L), K ≥ B: the first B captions belong to the
        images, in order. Further captions belong to none of them; they make choosing a caption
        harder, and choosing an image not.
        gather: a function from the rows of this process to the rows of all processes, so that
        each process computes the loss of the whole batch.
        """
        self.bound_scale()
        z_img, z_txt = self.unit(images, tokens)
        return self.contrastive_loss(z_img, z_txt, tokens, gather)

    @torch.no_grad()
    def bound_scale(self):
        """Cut τ itself to its bound, as CLIP's code does. Beyond the bound it has no gradient."""
        self.logit_scale.clamp_(max=self.MAX_LOG_SCALE)

    def contrastive_loss(self, z_img, z_txt, tokens, gather=None):
        """Return the loss for z_img (B, D), z_txt (K, D) and the captions' tokens (K, L)."""
        B = len(z_img)
        if gather is not None:
            z_img = gather(z_img)
            z_txt = torch.cat([gather(z_txt[:B]), gather(z_txt[B:])])
            tokens = torch.cat([gather(tokens[:B]), gather(tokens[B:])])
            B = len(z_img)
        logits = self.logits(z_img, z_txt)                                 # (B, K)
        # mini: the captions of a small data set repeat. A second picture of "a small red circle"
        # is no wrong answer, so pairs with equal captions are taken out of the softmax.
        same = (tokens[:B, None] == tokens[None]).all(-1)                  # (B, K)
        same[:, :B].fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
        labels = torch.arange(B, device=logits.device)
        which_caption = F.cross_entropy(logits, labels)
        which_image = F.cross_entropy(logits[:, :B].T, labels)
        return (which_caption + which_image) / 2

    @torch.no_grad()
    def zero_shot(self, images, tokens):
        """Classify without training for it (CLIP §3.1).

        Returns the probabilities (B, K) of K captions, tokens (K, L), for each image.
        """
        return self(images, tokens).softmax(dim=-1)
