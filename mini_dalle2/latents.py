"""From picture to picture: variations, interpolations, text diffs, reconstructions, inpainting.

    picture x  →  bipartite latent (z_img, x_T)  →  picture                             (unCLIP §3)

z_img is what CLIP sees in a picture. x_T is the noise from which the decoder samples just this
picture, found by running DDIM backwards. Each verb changes one of the two, or both, and runs the
decoder again. PCA reconstructions (§4) keep only a few components of z_img. Inpainting is GLIDE's
(§4 there).

`Latents` is the second half of DALLE2 (pipeline.py), which inherits from it. It uses the models of
DALLE2 and these methods: `at_work`, `check`, `tokens`, `encode_text`, `embed`, `base`, `enlarge`.

Shapes: B pictures, L context length, D = clip_dim, s side of the decoder's pictures.
References: unCLIP (2204.06125) §3 and §4; GLIDE (2112.10741) §4 for inpainting; FlowEdit
(2412.08629) for text diffs; CLIP (2103.00020) §3.1 for classification.
Read next: sample.py at the top level, which calls all of this.
"""

import functools

import torch
import torch.nn.functional as F
from PIL import Image

from .data.pixels import central_square, from_pil, mask_square, to_float, to_mask, to_rgb
from .diffusion import ModelOutput
from .runtime.checks import check_images
from .runtime.noise import seeded
from .sampling import flow_edit, slerp, strided_timesteps


class Latents:
    """What DALLE2 does with a picture. A part of DALLE2, not to be used alone."""

    # For each picture, inpainting chooses from so many z_img; see `choose_by_known_pixels`.
    CHOICE = 16

    @torch.no_grad()
    def encode_image(self, images):
        """Embed images: z_img (B, D), of unit norm unless CLIP's `unit_norm` is off.

        images: a PIL image, a list of them (any mode and size), or a tensor; see `pixels`.
        Raises ValueError when CLIP has no image encoder, and for anything but such images.
        """
        self.require_image_encoder()
        with self.at_work(self.clip):
            return self.clip.encode_image(self.pixels(images, self.clip.cfg.image_size)).float()

    def pixels(self, images, size):
        """Turn images into a tensor (B, 3, size, size) in [-1, 1] on the device.

        images: a PIL image, a list of them (any mode and size), or a tensor (B, 3, size, size) of
        uint8 or of floats in [-1, 1]. Raises ValueError for anything else.
        """
        if torch.is_tensor(images):
            images = to_float(images) if images.dtype == torch.uint8 else images
            check_images(images, size)
            return images.to(self.device, torch.float32)
        images = [images] if isinstance(images, Image.Image) else images
        check_pictures(images)
        squares = [central_square(image, size) for image in images]
        return torch.stack([to_float(from_pil(square)) for square in squares]).to(self.device)

    def require_image_encoder(self):
        """Raise ValueError when CLIP has only its text encoder.

        This is so for Karlo's diffusers folder without `image_encoder`.
        """
        if self.clip.visual is None:
            raise ValueError(
                "this CLIP has no image encoder: use these weights with captions, not pictures")

    @torch.no_grad()
    def invert(self, images, steps=None, progress=False):
        """Find the bipartite latent (§3): z_img (B, D) and x_T (B, 3, s, s).

        images: a PIL image, or a list of B of them. steps: of DDIM; None takes the decoder's own.
        """
        z_img = self.encode_image(images)
        with self.at_work(self.clip, self.decoder):
            pixels = self.pixels(images, self.decoder.cfg.image_size)      # (B, 3, s, s)
            return z_img, self.decoder.invert(pixels, z_img, steps, progress)

    def start(self, seed):
        """Sample one x_T (1, 3, s, s) that depends only on the seed."""
        size = self.decoder.cfg.image_size
        return torch.randn(1, 3, size, size, generator=seeded(seed, "decoder")).to(self.device)

    @torch.no_grad()
    def classify(self, image, captions):
        """Return the probability (K,) of each of K captions if one of them belongs to the image.

        This is zero-shot classification (CLIP §3.1). Raises ValueError for an empty caption.
        """
        self.require_image_encoder()
        with self.at_work(self.clip):
            pixels = self.pixels(image, self.clip.cfg.image_size)          # (1, 3, S, S)
            return self.clip.zero_shot(pixels, self.tokens(captions))[0].float()

    # ------------------------------------------------------------------ unCLIP §3.1

    def variations(self, image, n=4, eta=1.0, seed=0, guidance=1.0, steps=None, stage="full",
                   progress=True):
        """Sample n variations of an image (§3.1): list of PIL images.

        image: a PIL image of any mode and size.
        eta: from 0 to 1. 0 reconstructs the image (with guidance 1). 1 keeps only what z_img says.
        Raises ValueError for a number out of range.
        """
        self.check(n=n, stage=stage, guidance=guidance, steps=steps, eta=eta)
        z_img, x_T = self.invert(image, steps, progress)
        z_img = z_img.expand(n, -1)                                        # (n, D)
        x_T = x_T.expand(n, -1, -1, -1)                                    # (n, 3, s, s)
        seeds = [seed + j for j in range(n)]
        base = self.base(
            z_img, None, seeds, progress, x_T, guidance=guidance, steps=steps, eta=eta)
        return self.enlarge(base, seeds, stage, progress)

    # ------------------------------------------------------------------ unCLIP §4

    def reconstruct(self, image, components=None, seed=0, steps=None, stage="full", progress=True):
        """Reconstruct an image from its own latents: list of PIL images.

        components None: one picture from (z_img, x_T), close to the image.
        components a list of numbers (§4, Fig. 7): one picture for each number, from z_img with only
        so many principal components. All pictures share one random x_T.
        Raises ValueError for a run without an AR prior, whose PCA this needs.
        """
        self.check(n=1 if components is None else len(components), stage=stage, steps=steps)
        if components is None:
            z_img, x_T = self.invert(image, steps, progress)
        else:
            z_img = self.keep_components(self.encode_image(image), components)
            x_T = self.start(seed).expand(len(z_img), -1, -1, -1)
        seeds = [seed] * len(z_img)
        base = self.base(z_img, None, seeds, progress, x_T, guidance=1.0, steps=steps, eta=0.0)
        return self.enlarge(base, seeds, stage, progress)

    def keep_components(self, z_img, counts):
        """Keep so many principal components of z_img (1, D): (N, D), a row for each of N counts.

        Raises ValueError for a run without an AR prior.
        """
        if self.ar_prior is None:
            raise ValueError("these weights have no autoregressive prior, which knows the principal "
                             "components: reconstruct without components, or give a run of "
                             "train.py one with --stage ar_prior")
        with self.at_work(self.ar_prior):
            return torch.cat([self.ar_prior.codes.project(z_img, count) for count in counts])

    # ------------------------------------------------------------------ unCLIP §3.2

    def interpolate(self, a, b, n=5, seed=0, fixed_noise=False, steps=None, stage="full",
                    progress=True):
        """Sample n ≥ 2 pictures on the way from image a to image b (§3.2): list of PIL images.

        z_img goes along the great circle, and so does x_T. Both ends are reconstructions.
        fixed_noise: use one random x_T for all pictures (the paper's Fig. 4), so that only z_img
        changes. Raises ValueError for n < 2.
        """
        self.check(stage=stage, steps=steps)
        if n < 2:
            raise ValueError(f"{n} pictures: an interpolation has at least two, its ends")
        if fixed_noise:
            z_a, z_b = self.encode_image(a), self.encode_image(b)
            x_a = x_b = self.start(seed)
        else:
            z_a, x_a = self.invert(a, steps, progress)
            z_b, x_b = self.invert(b, steps, progress)
        theta = torch.linspace(0, 1, n, device=self.device)
        z_img = slerp(z_a.expand(n, -1), z_b.expand(n, -1), theta)         # (n, D)
        x_T = slerp(x_a.expand(n, -1, -1, -1), x_b.expand(n, -1, -1, -1), theta)
        seeds = [seed] * n
        base = self.base(z_img, None, seeds, progress, x_T, guidance=1.0, steps=steps, eta=0.0)
        return self.enlarge(base, seeds, stage, progress)

    # ------------------------------------------------------------------ unCLIP §3.3

    def textdiff(self, image, source, target, theta=(0.0, 0.2, 0.3, 0.4, 0.5), seed=0,
                 guidance=2.0, steps=None, stage="full", progress=True):
        """Change an image as the caption `target` differs from the caption `source` (§3.3).

        Returns a PIL image for each theta. x_T stays, z_img moves; see `follow`.
        source: what the image shows, a dummy like "a photo", or None. None takes z_txt(target)
        itself as the difference. A run with whitened z_img needs a caption of the whole picture.
        theta: how far to go, from 0 to 1. The paper goes to between 0.25 and 0.5.
        guidance: 1 reconstructs the image at theta 0; more makes the change stronger.
        seed: of the noise in which the prior compares the captions, and of the upsamplers.
        Raises ValueError for two captions with the same embedding, and for numbers out of range.
        """
        theta = torch.as_tensor(theta, dtype=torch.float32, device=self.device).flatten()
        n = len(theta)
        self.check(n=n, stage=stage, guidance=guidance, steps=steps)
        if not 0 <= theta.min() <= theta.max() <= 1:
            raise ValueError(f"theta {theta.tolist()}: from 0, the picture itself, to 1")
        if source is not None:
            difference = self.encode_text([target]) - self.encode_text([source])
            if difference.norm() < 1e-4:
                raise ValueError("both captions mean the same to this CLIP: there is no difference "
                                 "to follow")
        z_img, x_T = self.invert(image, steps, progress)
        sources = [source] if source else None
        z_img = self.follow(z_img, sources, [target], theta, seed)         # (n, D)
        x_T = x_T.expand(n, -1, -1, -1)                                    # (n, 3, s, s)
        seeds = [seed] * n
        base = self.base(
            z_img, None, seeds, progress, x_T, guidance=guidance, steps=steps, eta=0.0)
        return self.enlarge(base, seeds, stage, progress)

    @torch.no_grad()
    def follow(self, z_img, sources, targets, theta, seed=0):
        """Move z_img from source captions to target captions: z_θ (M, D).

        z_d = normalise(z_txt(target) − z_txt(source)),   z_θ = slerp(z_img, z_d, θ)     (§3.3)

        z_img (N, D); theta (M,) in [0, 1], M = N or N = 1. sources, targets: lists of N captions or
        of one; sources may be None, for z_d = z_txt(target). A run with whitened z_img asks its
        prior instead; see `follow_prior`.
        """
        theta = torch.as_tensor(theta, device=z_img.device)
        if getattr(self.prior.cfg, "whiten_z", False):
            return self.follow_prior(z_img, sources, targets, theta, seed)
        z_d = F.normalize(self.encode_text(targets), dim=-1)               # (N or 1, D)
        if sources is not None:
            z_d = z_d - F.normalize(self.encode_text(sources), dim=-1)
        z_img = z_img.expand(len(theta), -1)                               # (M, D)
        z_d = F.normalize(z_d, dim=-1).expand_as(z_img)                    # (M, D)
        # The length is 1, except for Karlo.
        length = z_img.norm(dim=-1, keepdim=True)                          # (M, 1)
        return length * F.normalize(slerp(z_img / length, z_d, theta), dim=-1)

    # mini: the paper's z_θ means nothing to a decoder of whitened z_img, because whitening
    # magnifies rare directions, and a difference of captions has much of them. So we ask the prior
    # instead.
    def follow_prior(self, z_img, sources, targets, theta, seed=0):
        """Move z_img by the change that the prior sees between two captions: z_θ (M, D).

        w_θ = w + 2θ·d,   w whitened z_img,   d from `flow_edit` (FlowEdit)

        The prior predicts z_img for both captions from the same noised z_img. The two predictions
        differ by what must change in this picture. Add that difference, in full at θ = 0.5 (the
        paper's maximum) and exaggerated above it. Without sources, d leads from the picture to the
        mean of many z_img of the target. Then at θ = 0.5 only x_T remains of the picture.
        Shapes and captions: see `follow`. One seed gives the noise for all N.
        """
        prior = self.prior

        def denoiser(captions):
            if captions is None:
                # Predict 0 for the source: then the whole picture is the difference.
                return lambda x_t, t: ModelOutput(x, torch.zeros_like(x))
            tokens = self.tokens(captions).expand(len(z_img), -1)          # (N, L)
            return prior.denoiser(tokens, self.clip.encode_text(tokens).float())

        with self.at_work(self.clip, prior):
            x = prior.scale(z_img)                                         # (N, D)
            timesteps = strided_timesteps(prior.cfg.num_timesteps, prior.cfg.sampling_steps)
            change = flow_edit(
                prior.diffusion, denoiser(sources), denoiser(targets), x, timesteps,
                seeded(seed, "textdiff"))
            return prior.unscale(x + 2 * theta[:, None] * change)          # (M, D)

    # ------------------------------------------------------------------ GLIDE §4

    @torch.no_grad()
    def inpaint(self, image, mask, caption, n=1, seed=0, prior="diffusion", guidance=None,
                steps=None, stage="full", progress=True):
        """Sample n pictures of the caption that keep each pixel outside the mask.

        Returns a list of PIL images.
        image: a PIL image of any mode. Its central square is taken at the size of the result.
        mask: a PIL image of the same size, white or transparent where something new is wanted; see
        `to_mask`. caption: describes the whole picture.
        Raises ValueError for a mask of another size or without a mark, and for an empty caption.
        """
        self.check(n=n, stage=stage, guidance=guidance, steps=steps, prior=prior)
        # Turn both upright before their sizes are compared.
        image = to_rgb(image)
        mask, _ = to_mask(mask)
        if mask.size != image.size:
            raise ValueError(
                f"the mask has {mask.width} x {mask.height} pixels, the image {image.width} x "
                f"{image.height}: they must be of the same size")

        @functools.cache
        def known(side):
            """Return the picture (1, 3, side, side) and the mask (1, 1, side, side)."""
            return self.pixels(image, side), mask_square(mask, side).to(self.device)

        given = known(self.decoder.cfg.image_size)
        if not given[1].any():
            raise ValueError("nothing in the mask's central square is marked: paint white, or "
                             "erase, where something new is wanted")
        seeds = [seed + j for j in range(n)]
        tokens = self.tokens([caption]).expand(n, -1)                      # (n, L)
        # "z_txt" and "caption" have no second z_img to choose from.
        k = self.CHOICE if prior in ("diffusion", "ar") else 1
        own_seeds = [seed + 10_000 * i for seed in seeds for i in range(k)]
        z_img = self.embed(tokens.repeat_interleave(k, 0), own_seeds, prior, progress, sketches=1)
        if k > 1:
            z_img = self.choose_by_known_pixels(z_img.unflatten(0, (n, k)), seeds, *given)
        base = self.base(
            z_img, tokens, seeds, progress, guidance=guidance, steps=steps, known=given)
        return self.enlarge(base, seeds, stage, progress, known)

    # mini: neither paper has this choice; GLIDE trained a network to inpaint. Our prior invents the
    # background and the places of a whole picture, without seeing what must stay.
    def choose_by_known_pixels(self, z_img, seeds, picture, mask):
        """Choose the z_img whose picture, sampled in four steps, is closest to the known pixels.

        z_img (B, k, D), B seeds, picture (1, 3, s, s), mask (1, 1, s, s) with 0 for known pixels
        -> (B, D). The distance is the squared error outside the mask.
        """
        steps = min(4, self.decoder.cfg.num_timesteps)
        chosen = []
        with self.at_work(self.decoder):
            for z, seed in zip(z_img, seeds):
                x_T = self.start(seed).expand(len(z), -1, -1, -1)
                sampled = self.decoder.sample(
                    z, None, guidance=1.0, steps=steps, x_T=x_T, eta=0.0)  # (k, 3, s, s)
                error = ((sampled - picture) * (1 - mask)).square().flatten(1).sum(1)
                chosen.append(z[error.argmin()])
        return torch.stack(chosen)


def check_pictures(images):
    """Raise ValueError unless these are PIL images, at least one."""
    kinds = {type(image).__name__ for image in images if not isinstance(image, Image.Image)}
    if kinds or len(images) == 0:
        raise ValueError(f"images are {', '.join(sorted(kinds)) or 'none'}: give PIL images, or "
                         "one tensor (B, 3, S, S)")
