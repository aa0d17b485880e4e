"""Karlo's models: where they differ from the paper, as subclasses of the paper's models.

    text           both prior and decoder read the states of a frozen CLIP, instead of tokens
    CLIP           embeddings keep their length
    prior          each coordinate of z_img is standardised; x̂_0 is bounded; variance β̃
    decoder        a learned vector stands for a dropped z_img
    upsampler      AdaGN only shifts; variance β̃; a second U-Net takes the last step

Karlo made the second U-Net out of the first by losses that are not published. So these models load
Karlo's weights and sample, and are not trained here.

Shapes: B batch, L context length, W width, D = clip_dim, E the width of emb.
References: the public code of Karlo v1.0.alpha (kakaobrain/karlo). Read next: karlo.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..clip import CLIP, CLIPConfig
from ..decoder import Decoder, DecoderConfig
from ..prior import DiffusionPrior, PriorConfig
from ..runtime.checks import check_images, check_positive, check_range
from ..sampling import ddpm_step
from ..transformer import eot_position
from ..tricks.whitening import Whitening
from ..unet import UNet
from ..upsampler import Upsampler, UpsamplerConfig


class FrozenText(nn.Module):
    """Captions as a frozen text encoder sees them, its states projected to n_embd.

    `encoder(tokens (B, L)) -> (states (B, L, state_width), z_txt (B, D))` is lent by `lend_clip`.
    It is no part of this model's weights. A dropped caption is the empty one: start and end of
    text.
    """

    def __init__(self, state_width, n_embd, eot_id):
        super().__init__()
        self.eot_id = eot_id
        self.encoder = None
        self.proj = nn.Linear(state_width, n_embd)

    def forward(self, tokens, keep=None):
        """Read captions, tokens (B, L), keep (B,) bool: False drops the caption.

        Returns the projected states (B, L, n_embd), z_txt (B, D), and a mask (B, L) that is False
        behind the end of text.
        """
        if self.encoder is None:
            raise ValueError("this model reads captions through a frozen CLIP: "
                             "lend it one with lend_clip")
        if keep is not None:
            tokens = torch.where(keep[:, None], tokens, self.empty_caption(tokens))
        states, z_txt = self.encoder(tokens)
        place = torch.arange(tokens.shape[1], device=tokens.device)        # (L,)
        mask = place <= eot_position(tokens, self.eot_id)[:, None]         # (B, L)
        return self.proj(states), z_txt, mask

    def empty_caption(self, tokens):
        """Return the tokens of "" in the shape of `tokens`."""
        empty = torch.zeros_like(tokens)
        # CLIP's tokenizer has the start of text one below the end.
        empty[:, 0] = self.eot_id - 1
        empty[:, 1] = self.eot_id
        return empty


def lend_clip(clip, *models):
    """Let Karlo's prior and decoder read captions through this CLIP."""
    for model in models:
        model.caption.encoder = clip.read


@dataclass(frozen=True)
class KarloCLIPConfig(CLIPConfig):
    """CLIP's sizes. unit_norm is always off; a checkpoint's settings tell Karlo's CLIP by it."""

    unit_norm: bool = False


class KarloCLIP(CLIP):
    """CLIP whose embeddings keep their length."""

    def encode_image(self, images):
        """Embed images (B, 3, S, S) in [-1, 1] as z_img (B, D), not normalised."""
        check_images(images, self.cfg.image_size, self.MAX_PIXEL)
        return self.visual(images)

    def encode_text(self, tokens):
        """Embed captions, tokens (B, L), as z_txt (B, D), not normalised."""
        return self.text(tokens)

    @torch.no_grad()
    def read(self, tokens):
        """Return the text transformer's states (B, L, W) and z_txt (B, D) of tokens (B, L)."""
        states = self.text.states(tokens)
        return states, self.text.embedding(states, tokens)


@dataclass(frozen=True)
class KarloPriorConfig(PriorConfig):
    """The prior's settings; frozen_text is the width of CLIP's text states.

    clip_x_start bounds |x̂_0|; None: no bound.
    """

    std_per_dim: float = 1.0
    sampler: str = "ddpm"
    candidates: int = 1
    frozen_text: int = 768
    clip_x_start: float | None = 10.0

    # Settings of older checkpoints that this class now stands for; see configs.model_config.
    IMPLIED = {"z_scale": 1.0, "unit_norm": False}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "frozen_text")
        check_range(self, 0, math.inf, "clip_x_start")


class KarloPrior(DiffusionPrior):
    """The prior that reads CLIP's text states, on standardised embeddings."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # A dropped caption is the empty one, which has a z_txt.
        del self.null_z_txt
        # Filled with the mean and spread of CLIP's embeddings that come with the weights.
        self.whitening = Whitening(cfg.clip_dim, scale=1.0)

    def add_caption(self):
        """Add the projection of CLIP's states."""
        cfg = self.cfg
        self.caption = FrozenText(cfg.frozen_text, cfg.width, cfg.eot_id)
        self.caption_position = nn.Parameter(torch.empty(cfg.context_length, cfg.width))

    def init_weights(self):
        """Draw the free vectors from small normals."""
        for vector in (self.query, self.position, self.caption_position):
            nn.init.normal_(vector, std=0.02)

    def scale(self, z_img):
        """Standardise each coordinate of z_img (B, D)."""
        return self.whitening(z_img) * self.cfg.std_per_dim

    def unscale(self, x_start):
        """Invert `scale`, (B, D) -> (B, D). The length stays."""
        return self.whitening.inverse(x_start / self.cfg.std_per_dim)

    def condition(self, tokens, z_txt, keep=None):
        """Compute what depends on neither x_t nor t; see DiffusionPrior.condition.

        z_txt is taken from the frozen CLIP, which also has one for dropped text. The argument is
        not used.
        """
        states, z_txt, mask = self.caption(tokens, keep)
        caption = states + self.caption_position                           # (B, L, W)
        # The four items behind the caption are always seen.
        return caption, self.z_txt_proj(z_txt.float()), F.pad(mask, (0, 4), value=True)

    def interpret(self, raw, x_t, t):
        """Turn a prediction (B, D) at x_t into a ModelOutput, with x̂_0 bounded."""
        return self.diffusion.interpret(
            raw, x_t, t, objective="x_start", clip=self.cfg.clip_x_start)


class KarloCondition(NamedTuple):
    """A Condition, and a mask of the context: False hides a token."""

    emb: torch.Tensor                                                      # (B, E)
    context: torch.Tensor                                                  # (B, 4 + L, W)
    mask: torch.Tensor                                                     # (B, 4 + L)


@dataclass(frozen=True)
class KarloDecoderConfig(DecoderConfig):
    """The decoder's settings; frozen_text is the width of CLIP's text states.

    text_layers and text_heads are not used, because there is no text transformer to train.
    """

    frozen_text: int = 768

    IMPLIED = {"z_scale": 1.0, "learned_null": True}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "frozen_text")


class KarloDecoder(Decoder):
    """The decoder that reads CLIP's text states, with a learned vector for a dropped z_img."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # In place of the paper's buffer of zeros.
        del self.null_z
        self.null_z = nn.Parameter(torch.zeros(cfg.clip_dim))

    def add_text(self, emb_dim):
        """Add the projections of CLIP's states and of its z_txt."""
        cfg = self.cfg
        self.caption = FrozenText(cfg.frozen_text, cfg.text_width, cfg.eot_id)
        self.text_to_emb = nn.Linear(cfg.clip_dim, emb_dim)

    def scale(self, z_img):
        """Take z_img (B, D) as it is."""
        return z_img.float()

    def read(self, tokens, keep=None):
        """Read captions: states (B, L, W), what is added to emb (B, E), and a mask (B, L)."""
        states, z_txt, mask = self.caption(tokens, keep)
        return self.ln_final(states), self.text_to_emb(z_txt), mask

    def join(self, z, states, text_emb, mask):
        """Put z_img (B, D) and the caption together; the tokens of z_img are always seen."""
        condition = super().join(z, states, text_emb)
        return KarloCondition(*condition, F.pad(mask, (self.Z_TOKENS, 0), value=True))

    def forward(self, x_t, t, condition):
        """Return the raw output (B, 6, S, S), as Decoder.forward does."""
        return self.unet(x_t, t, condition.emb, condition.context, condition.mask).float()


@dataclass(frozen=True)
class KarloUpsamplerConfig(UpsamplerConfig):
    """An upsampler's sizes. last_unet is always on; a checkpoint's settings tell Karlo's by it."""

    last_unet: bool = True

    IMPLIED = {"sampler": "ddpm", "use_adagn": False}

    def unet_settings(self):
        """Return the U-Net's settings as a dict."""
        return super().unet_settings() | dict(use_adagn=False)


class KarloUpsampler(Upsampler):
    """The upsampler with a second U-Net for the last step, t = 0."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.unet_last = UNet(cfg.unet()).requires_grad_(False)

    def forward(self, x_t, t, enlarged):
        """Return the raw output (B, 3, S, S), at t = 0 from the second U-Net."""
        if self.training or t.any():
            return super().forward(x_t, t, enlarged)
        return self.unet_last(torch.cat([x_t, enlarged], dim=1), t).float()

    def step_rule(self):
        """Return the rule of a sampling step: ancestral, with the fixed variance β̃."""
        return ddpm_step


# {stage: {configuration class: model class}}, as configs.MODELS has them.
MODELS = {
    "clip": {KarloCLIPConfig: KarloCLIP},
    "prior": {KarloPriorConfig: KarloPrior},
    "decoder": {KarloDecoderConfig: KarloDecoder},
    "upsampler1": {KarloUpsamplerConfig: KarloUpsampler}}
