"""Degradations: making, from a sharp picture, the flawed small one that an upsampler must learn to enlarge.

    blur (first upsampler):   low = blur_{3×3, σ 0.6}(high ↓ factor)                                    (unCLIP §2.1, citing SR3)
    BSR (second upsampler):   low = JPEG ∘ shuffle{blur, downsample, resize, noise, JPEG}(high)         (unCLIP §2.1, citing BSRGAN, LDM)

An upsampler trained on perfectly shrunk photographs trips over the small flaws of the pictures it is given in earnest, which come from
another model. So it is trained on flawed ones ("conditioning augmentation"), and at inference gets the picture as it is. BSR, blind
super-resolution, draws a different chain of flaws, of different strengths and in a different order, for every picture.

Shapes: B batch, h × w the sharp picture, h/f × w/f the small one (f = factor, 4 in the paper), k side of a kernel.
All randomness comes from one generator; each picture gets its own seed from it, so it is degraded the same way in any company.
References: BSRGAN (2103.14006) §3; latent diffusion (2112.10752) appendix, which prefers a milder BSR; SR3 (2104.07636).
Read next: upsampler.py.
"""

import functools
import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .runtime.checks import check_choice
from .runtime.noise import draw_rows


@dataclass(frozen=True)
class BSRStrength:
    """How hard the blind super-resolution degradation hits. Noise levels are standard deviations in 1/255, quality is JPEG's 0..100."""

    blurs: int                          # how many blurs stand in the shuffle
    blur_scale: float                   # factor on the widths of the blurs
    kernel_radius: tuple[int, int]      # a kernel has 2 · radius + 1 pixels a side; lowest and highest
    resize_prob: float                  # intermediate downsample: interpolation (else Gaussian and subsampling)
    noise: tuple[int, int]
    quality: tuple[int, int]


BSR_LIGHT = BSRStrength(blurs=1, blur_scale=0.25, kernel_radius=(2, 6), resize_prob=0.8, noise=(1, 2), quality=(80, 95))
BSR_FULL = BSRStrength(blurs=2, blur_scale=1.0, kernel_radius=(3, 12), resize_prob=0.75, noise=(2, 25), quality=(30, 95))
# mini: BSRGAN's camera-sensor noise (a learned-from-data ISP model) is left out, as latent diffusion leaves it out.

DEGRADATIONS = ("blur", "bsr", "bsr_full")

# mini: the paper does not say whether every picture is blurred. Half of them, as in cascaded diffusion (2106.15282),
# so that an unblurred input, which is what inference gives, is as familiar as a blurred one.
BLUR_PROB = 0.5


def degrade(high, kind, factor=4, generator=None):
    """Small flawed pictures (B, 3, h/f, w/f) for sharp ones, high (B, 3, h, w), both in [-1, 1].

    kind "blur": shrunk by averaging, then with probability BLUR_PROB blurred; "bsr": the mild BSR; "bsr_full": BSRGAN's own strength.
    Raises ValueError for an unknown kind or a side that `factor` does not divide.
    """
    check_choice("degradation", kind, DEGRADATIONS)
    if high.shape[-2] % factor or high.shape[-1] % factor:
        raise ValueError(f"pictures of {high.shape[-2]} × {high.shape[-1]} pixels cannot be shrunk by {factor} evenly")
    if kind == "blur":
        # mini: the paper does not say whether the blur comes before or after the shrinking. After: three small pixels are wide enough to be seen.
        low = F.avg_pool2d(high, factor)                                   # (B, 3, h/f, w/f)
        blurred = draw_rows(torch.rand, (len(high),), generator, high.device) < BLUR_PROB
        return torch.where(blurred[:, None, None, None], filter2d(low, gaussian_kernel(3, 0.6)), low)
    strength = BSR_LIGHT if kind == "bsr" else BSR_FULL
    seeds = draw_rows(functools.partial(torch.randint, 2 ** 62), (len(high),), generator, high.device).tolist()
    images = ((high.detach() + 1) / 2).clamp(0, 1).to("cpu", torch.float32).contiguous()   # a few small operations each: no work for a GPU
    low = torch.cat([bsr(image[None], factor, strength, torch.Generator().manual_seed(seed)) for image, seed in zip(images, seeds)])
    return (low * 2 - 1).to(high)


# ---------------------------------------------------------------------- blur

def gaussian_kernel(size, sigma, sigma2=None, theta=0.0, shift=0.0):
    """Gaussian kernel (size, size) that sums to 1: standard deviations sigma and sigma2 (None: the same) along axes turned by theta.

    k(d) ∝ exp(−½ dᵀΣ⁻¹d),  Σ = R(θ) diag(σ², σ2²) R(θ)ᵀ. `shift` moves its centre right and down, in pixels.
    """
    sigma2 = sigma if sigma2 is None else sigma2
    sigma, sigma2 = max(sigma, 1e-2), max(sigma2, 1e-2)                    # narrower than this is the identity anyway
    d = torch.arange(size, dtype=torch.float64) - (size - 1) / 2 - shift
    dy, dx = d[:, None], d[None, :]
    along = math.cos(theta) * dx + math.sin(theta) * dy                    # (k, k) coordinates in the turned axes
    across = math.cos(theta) * dy - math.sin(theta) * dx
    exponent = (along / sigma).square() + (across / sigma2).square()
    kernel = torch.exp(-0.5 * (exponent - exponent.min()))                 # the largest is 1, so that a sum of 0 cannot happen
    return (kernel / kernel.sum()).float()


def filter2d(x, kernel, stride=1):
    """Each channel of x (B, C, H, W) under the kernel (k, k), k odd; mirrored at the border, so that a flat picture stays flat."""
    pad, C = kernel.shape[-1] // 2, x.shape[1]
    mode = "reflect" if pad < min(x.shape[-2:]) else "replicate"           # a very small picture has too little to mirror
    x = F.pad(x, (pad, pad, pad, pad), mode=mode)
    return F.conv2d(x, kernel.to(x).expand(C, 1, -1, -1), stride=stride, groups=C)


# ---------------------------------------------------------------------- BSR, one picture at a time: (1, 3, h, w) in [0, 1]

def bsr(image, factor, strength, rng):
    """The whole chain for one picture: (1, 3, h, w) in [0, 1] -> (1, 3, h/f, w/f) in [0, 1], as an 8-bit JPEG would hold it."""
    h, w = image.shape[-2] // factor, image.shape[-1] // factor            # where it must end
    if factor % 4 == 0 and uniform(rng) < 0.25:
        image = resize(image, image.shape[-2] // 2, image.shape[-1] // 2, pick(rng, MODES), antialias=uniform(rng) < 0.5)
        factor //= 2                                                       # the rest of the chain has half the way to go
    for step in bsr_order(strength.blurs, rng):
        if step == "blur":
            image = random_blur(image, factor, strength, rng)
        elif step == "downsample":
            image = random_downsample(image, factor, strength.resize_prob, rng)
        elif step == "resize":
            image = resize(image, h, w, pick(rng, MODES))
        elif step == "noise":
            image = random_noise(image, strength.noise, rng)
        elif uniform(rng) < 0.9:
            image = jpeg(image, integer(rng, *strength.quality))
    return jpeg(image, integer(rng, *strength.quality))


def bsr_order(blurs, rng):
    """The steps in random order, except that the resize to the final size comes after the intermediate downsample."""
    steps = ["blur"] * blurs + ["downsample", "resize", "noise", "jpeg"]
    order = [steps[i] for i in torch.randperm(len(steps), generator=rng).tolist()]
    first, last = sorted((order.index("downsample"), order.index("resize")))
    order[first], order[last] = "downsample", "resize"
    return order


def random_blur(image, factor, strength, rng):
    """A Gaussian blur, half of the time longer in one direction than in the other.

    Anisotropic: variances along the two axes (4 + f)·s·U(0, 1) each; isotropic: standard deviation (2 + 0.2f)·s·U(0, 1).
    """
    size = 2 * integer(rng, *strength.kernel_radius) + 1                   # odd, so that blurring never shifts the picture
    if uniform(rng) < 0.5:
        variance = (4 + factor) * strength.blur_scale
        sigma, sigma2, theta = math.sqrt(variance * uniform(rng)), math.sqrt(variance * uniform(rng)), math.pi * uniform(rng)
        return filter2d(image, gaussian_kernel(size, sigma, sigma2, theta))
    return filter2d(image, gaussian_kernel(size, (2 + 0.2 * factor) * strength.blur_scale * uniform(rng)))


def random_downsample(image, factor, resize_prob, rng):
    """To some smaller size: interpolated by 1/U(1, 2f), or a Gaussian (25 pixels, σ in U(0.1, 0.6f)) and every f-th pixel."""
    if uniform(rng) < resize_prob:
        scale = uniform(rng, 1, 2 * factor)
        h, w = (max(1, int(side / scale)) for side in image.shape[-2:])
        return resize(image, h, w, pick(rng, MODES))
    # Every f-th pixel, from the first: the small pixel's middle lies (f − 1)/2 right of and below the one that is kept. The kernel
    # looks there, or else the whole picture would move.
    kernel = gaussian_kernel(25, uniform(rng, 0.1, 0.6 * factor), shift=(factor - 1) / 2)
    return filter2d(image, kernel, stride=factor).clamp(0, 1)


MODES = ("bilinear", "bicubic", "area")


def resize(image, h, w, mode, antialias=False):
    """To h × w pixels by interpolation; without antialiasing it may skip pixels, one of the flaws BSR is meant to have."""
    if mode == "area":
        if h <= image.shape[-2] and w <= image.shape[-1]:
            return F.interpolate(image, size=(h, w), mode="area")
        mode = "bilinear"                                                  # there is no area to average when enlarging
    return F.interpolate(image, size=(h, w), mode=mode, align_corners=False, antialias=antialias).clamp(0, 1)


def random_noise(image, levels, rng):
    """Gaussian noise: 40 % independent per channel, 40 % the same in all (grey), 20 % correlated between channels at the top level.

    Correlated: covariance L²·QᵀDQ, Q a random rotation, D diagonal with entries U(0, 1) (BSRGAN's three-dimensional Gaussian).
    """
    kind, sigma = uniform(rng), integer(rng, *levels) / 255
    noise = torch.randn(image.shape, generator=rng)                        # (1, 3, h, w)
    if kind < 0.4:
        noise = sigma * noise
    elif kind < 0.8:
        noise = sigma * noise[:, :1]                                       # one plane for red, green and blue
    else:
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=rng)).Q
        mix = rotation * torch.rand(3, generator=rng).sqrt()               # columns √d_i q_i: the covariance is mix · mixᵀ
        noise = levels[1] / 255 * torch.einsum("ij,bjhw->bihw", mix, noise)
    return (image + noise).clamp(0, 1)


def jpeg(image, quality):
    """The picture after a real JPEG file of this quality (1..95): 8-bit, 8 × 8 blocks, colour at half the resolution."""
    pixels = (image[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    pixels = torch.from_numpy(np.array(Image.open(file, formats=("JPEG",))))
    return pixels.permute(2, 0, 1)[None].contiguous() / 255               # (1, 3, h, w)


# ---------------------------------------------------------------------- small draws

def uniform(rng, low=0.0, high=1.0):
    """A float from U(low, high)."""
    return low + (high - low) * torch.rand((), generator=rng).item()


def integer(rng, low, high):
    """An int from low..high, both included."""
    return torch.randint(low, high + 1, (), generator=rng).item()


def pick(rng, items):
    """One of the items, each as likely."""
    return items[integer(rng, 0, len(items) - 1)]
