"""Degradations: from a sharp picture to the flawed small one that an upsampler learns to enlarge.

    blur (first upsampler):   low = blur_{3×3, σ 0.6}(high ↓ factor)             (unCLIP §2.1, SR3)
    BSR (second upsampler):   low = JPEG ∘ shuffle{blur, downsample, resize, noise, JPEG}(high)
                                                                    (unCLIP §2.1, BSRGAN, LDM)

At sampling time an upsampler enlarges pictures of another model. They have small flaws, which
perfectly shrunk photographs do not have. So the upsampler is trained on flawed pictures
("conditioning augmentation"). At sampling time it gets the picture as it is. BSR, blind
super-resolution, chooses a new chain of flaws for each picture, of random strengths and in random
order.
All random numbers come from one generator. Each picture gets its own seed from this generator, so
its flaws do not depend on the other pictures of the batch.

Shapes: B batch, h × w the sharp picture, h/f × w/f the small one (f = factor, 4 in the paper),
k side of a kernel.
References: BSRGAN (2103.14006) §3; latent diffusion (2112.10752) appendix, which prefers a milder
BSR; SR3 (2104.07636). Read next: upsampler.py.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .runtime.checks import check_choice
from .runtime.device import off_mps
from .runtime.noise import rand, randint


@dataclass(frozen=True)
class BSRStrength:
    """How strong the flaws of BSR are."""

    # How many blurs the shuffle holds, and a factor on their widths.
    blurs: int
    blur_scale: float
    # A kernel has 2 · radius + 1 pixels a side. Lowest and highest radius.
    kernel_radius: tuple[int, int]
    # How often the intermediate downsample interpolates. Otherwise it blurs and keeps every f-th
    # pixel.
    resize_prob: float
    # Lowest and highest standard deviation, in 1/255.
    noise: tuple[int, int]
    # Lowest and highest JPEG quality, 0..100.
    quality: tuple[int, int]


BSR_LIGHT = BSRStrength(
    blurs=1, blur_scale=0.25, kernel_radius=(2, 6), resize_prob=0.8, noise=(1, 2), quality=(80, 95))
BSR_FULL = BSRStrength(
    blurs=2, blur_scale=1.0, kernel_radius=(3, 12), resize_prob=0.75, noise=(2, 25),
    quality=(30, 95))
# mini: we leave out BSRGAN's camera-sensor noise (a learned model), as latent diffusion does.

DEGRADATIONS = ("blur", "bsr", "bsr_full")

# mini: the paper does not say whether every picture is blurred. We blur half of them, as cascaded
# diffusion (2106.15282) does: the pictures at sampling time are not blurred.
BLUR_PROB = 0.5


def degrade(high, kind, factor=4, generator=None):
    """Make small flawed pictures (B, 3, h/f, w/f) from sharp ones, high (B, 3, h, w).

    All pictures have values in [-1, 1].
    kind: "blur" averages each f × f square, then blurs with probability BLUR_PROB; "bsr" is the
    mild BSR; "bsr_full" has BSRGAN's own strength. generator: see runtime/noise.py.
    Raises ValueError for an unknown kind, and for a side that `factor` does not divide.
    """
    check_choice("degradation", kind, DEGRADATIONS)
    if high.shape[-2] % factor or high.shape[-1] % factor:
        raise ValueError(
            f"pictures of {high.shape[-2]} × {high.shape[-1]} pixels cannot be shrunk by {factor} "
            f"evenly: both sides must be multiples of {factor}")
    if kind == "blur":
        return shrink_and_blur(high, factor, generator)
    strength = BSR_LIGHT if kind == "bsr" else BSR_FULL
    seeds = randint(2 ** 62, (len(high),), generator, high.device).tolist()
    # BSR does a few small operations for each picture, so it runs on the CPU.
    images = ((high.detach() + 1) / 2).clamp(0, 1).to("cpu", torch.float32).contiguous()
    low = []
    for image, seed in zip(images, seeds):
        rng = torch.Generator().manual_seed(seed)
        low.append(bsr(image[None], factor, strength, rng))
    return (torch.cat(low) * 2 - 1).to(high)


# ---------------------------------------------------------------------- blur

def shrink_and_blur(high, factor, generator=None):
    """Average each f × f square, then blur with probability BLUR_PROB.

    (B, 3, h, w) -> (B, 3, h/f, w/f).
    """
    # mini: the paper does not say whether the blur comes before or after the shrinking. We blur
    # the small picture: there a kernel of three pixels is wide enough to be seen.
    low = F.avg_pool2d(high, factor)                                       # (B, 3, h/f, w/f)
    chance = rand((len(high),), generator, high.device)
    is_blurred = (chance < BLUR_PROB)[:, None, None, None]
    return torch.where(is_blurred, filter2d(low, gaussian_kernel(3, 0.6)), low)


def gaussian_kernel(size, sigma, sigma2=None, theta=0.0, shift=0.0):
    """Return a Gaussian kernel (size, size) that sums to 1.

    k(d) ∝ exp(−½ dᵀΣ⁻¹d),  Σ = R(θ) diag(σ², σ2²) R(θ)ᵀ.
    sigma, sigma2: standard deviations along two axes, in pixels; None means the same.
    theta: how far the axes are turned, in radians.
    shift: moves the centre right and down, in pixels.
    """
    sigma2 = sigma if sigma2 is None else sigma2
    # A kernel narrower than 0.01 pixels does not change a picture.
    sigma = max(sigma, 1e-2)
    sigma2 = max(sigma2, 1e-2)
    d = torch.arange(size, dtype=torch.float64) - (size - 1) / 2 - shift
    dy = d[:, None]
    dx = d[None, :]
    # Coordinates along the turned axes.
    along = math.cos(theta) * dx + math.sin(theta) * dy                    # (k, k)
    across = math.cos(theta) * dy - math.sin(theta) * dx                   # (k, k)
    exponent = (along / sigma).square() + (across / sigma2).square()
    # Subtracting the minimum makes the largest value 1, so the sum cannot be 0.
    kernel = torch.exp(-0.5 * (exponent - exponent.min()))
    return (kernel / kernel.sum()).float()


def filter2d(x, kernel, stride=1):
    """Filter each channel of x (B, C, H, W) with a kernel (k, k), k odd.

    The border is mirrored, so a flat picture stays flat. stride: keep every stride-th pixel only.
    """
    C = x.shape[1]
    pad = kernel.shape[-1] // 2
    # A very small picture has too few pixels to mirror.
    mode = "reflect" if pad < min(x.shape[-2:]) else "replicate"
    x = F.pad(x, (pad, pad, pad, pad), mode=mode)
    kernel = kernel.to(x.dtype).to(x.device)
    return F.conv2d(x, kernel.expand(C, 1, -1, -1), stride=stride, groups=C)


# ---------------------------------------------------------------------- BSR
# One picture at a time: (1, 3, h, w) in [0, 1].

def bsr(image, factor, strength, rng):
    """Run the whole chain on one picture: (1, 3, h, w) in [0, 1] -> (1, 3, h/f, w/f) in [0, 1].

    The result has whole grey levels, as an 8-bit JPEG file has.
    """
    final_h = image.shape[-2] // factor
    final_w = image.shape[-1] // factor
    if factor % 4 == 0 and uniform(rng) < 0.25:
        mode = pick(rng, MODES)
        antialias = uniform(rng) < 0.5
        image = resize(image, image.shape[-2] // 2, image.shape[-1] // 2, mode, antialias)
        # The rest of the chain now shrinks by half as much.
        factor //= 2
    for step in bsr_order(strength.blurs, rng):
        if step == "blur":
            image = random_blur(image, factor, strength, rng)
        elif step == "downsample":
            image = random_downsample(image, factor, strength.resize_prob, rng)
        elif step == "resize":
            image = resize(image, final_h, final_w, pick(rng, MODES))
        elif step == "noise":
            image = random_noise(image, strength.noise, rng)
        elif uniform(rng) < 0.9:
            image = jpeg(image, integer(rng, *strength.quality))
    return jpeg(image, integer(rng, *strength.quality))


def bsr_order(blurs, rng):
    """Shuffle the steps; the resize to the final size stays after the intermediate downsample."""
    steps = ["blur"] * blurs + ["downsample", "resize", "noise", "jpeg"]
    order = [steps[i] for i in torch.randperm(len(steps), generator=rng).tolist()]
    first, last = sorted((order.index("downsample"), order.index("resize")))
    order[first], order[last] = "downsample", "resize"
    return order


def random_blur(image, factor, strength, rng):
    """Blur with a random Gaussian; half of the kernels are longer in one direction.

    Anisotropic: the variance along each of the two axes is (4 + f)·s·U(0, 1).
    Isotropic: the standard deviation is (2 + 0.2f)·s·U(0, 1).
    """
    # An odd size: an even kernel would shift the picture.
    size = 2 * integer(rng, *strength.kernel_radius) + 1
    if uniform(rng) < 0.5:
        variance = (4 + factor) * strength.blur_scale
        sigma = math.sqrt(variance * uniform(rng))
        sigma2 = math.sqrt(variance * uniform(rng))
        theta = math.pi * uniform(rng)
        kernel = gaussian_kernel(size, sigma, sigma2, theta)
    else:
        kernel = gaussian_kernel(size, (2 + 0.2 * factor) * strength.blur_scale * uniform(rng))
    return filter2d(image, kernel)


def random_downsample(image, factor, resize_prob, rng):
    """Shrink to some smaller size, in one of two ways.

    With probability resize_prob: interpolation by the factor 1/U(1, 2f).
    Otherwise: a Gaussian of 25 pixels, σ in U(0.1, 0.6f), then every f-th pixel.
    """
    if uniform(rng) < resize_prob:
        scale = uniform(rng, 1, 2 * factor)
        h, w = (max(1, int(side / scale)) for side in image.shape[-2:])
        return resize(image, h, w, pick(rng, MODES))
    # The middle of a small pixel lies (f − 1)/2 right of and below the pixel that is kept. The
    # kernel is shifted there; otherwise the whole picture would move.
    kernel = gaussian_kernel(25, uniform(rng, 0.1, 0.6 * factor), shift=(factor - 1) / 2)
    return filter2d(image, kernel, stride=factor).clamp(0, 1)


MODES = ("bilinear", "bicubic", "area")


def resize(image, h, w, mode, antialias=False):
    """Interpolate to h × w pixels.

    Without antialiasing pixels may be skipped, which is one of the flaws of BSR.
    """
    device = image.device
    image = off_mps(image)
    if mode == "area":
        if h <= image.shape[-2] and w <= image.shape[-1]:
            return F.interpolate(image, size=(h, w), mode="area").to(device)
        # Enlarging has no area to average.
        mode = "bilinear"
    image = F.interpolate(image, size=(h, w), mode=mode, align_corners=False, antialias=antialias)
    return image.clamp(0, 1).to(device)


def random_noise(image, levels, rng):
    """Add Gaussian noise of one of three kinds.

    40 %: independent in each channel.
    40 %: the same in all channels (grey).
    20 %: correlated between the channels, at the highest level L, with covariance L²·QᵀDQ.
    Q is a random rotation, D diagonal with entries U(0, 1) (the 3-D Gaussian of BSRGAN).
    """
    kind = uniform(rng)
    sigma = integer(rng, *levels) / 255
    noise = torch.randn(image.shape, generator=rng)                        # (1, 3, h, w)
    if kind < 0.4:
        noise = sigma * noise
    elif kind < 0.8:
        noise = sigma * noise[:, :1]                                       # (1, 1, h, w)
    else:
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=rng)).Q
        # The columns are √d_i · q_i, so the covariance is mix · mixᵀ.
        mix = rotation * torch.rand(3, generator=rng).sqrt()               # (3, 3)
        noise = levels[1] / 255 * torch.einsum("ij,bjhw->bihw", mix, noise)
    return (image + noise).clamp(0, 1)


def jpeg(image, quality):
    """Save a picture (1, 3, h, w) in [0, 1] as a JPEG of this quality (1..95); read it back.

    This is a real file in memory, with 8 bits, blocks of 8 × 8 pixels, and colour at half the
    resolution.
    """
    pixels = (image[0] * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    pixels = torch.from_numpy(np.array(Image.open(file, formats=("JPEG",))))
    return pixels.permute(2, 0, 1)[None].contiguous() / 255               # (1, 3, h, w)


# ---------------------------------------------------------------------- one random number

def uniform(rng, low=0.0, high=1.0):
    """Return a float from U(low, high)."""
    return low + (high - low) * torch.rand((), generator=rng).item()


def integer(rng, low, high):
    """Return an int from low..high, both included."""
    return torch.randint(low, high + 1, (), generator=rng).item()


def pick(rng, items):
    """Return one of the items; all are equally likely."""
    return items[integer(rng, 0, len(items) - 1)]
