"""The whole of DALL·E 2 in one object: caption → prior → z_img → decoder → small picture → two upsamplers → PNG.

    P(x | y) = P(x | z_img, y) · P(z_img | y)                                                                     (unCLIP §2)

The right factor is the prior, the left one decoder and upsamplers. This file only passes tensors from one built module to the next.

Shapes: B pictures, L context length, D = clip_dim.
References: unCLIP (2204.06125) §2 and Table 3 for the steps of each model. Read next: sample.py at the top level, which calls this.
"""

import warnings
import zlib
from pathlib import Path

import torch
from PIL import Image

from .clip import CLIP, CLIPConfig
from .decoder import Decoder, DecoderConfig
from .folder import central_square, from_pil, to_float, to_pil
from .prior import DiffusionPrior, PriorConfig
from .tokenizer import BPETokenizer
from .training import load_checkpoint, pick_device
from .upsampler import Upsampler, UpsamplerConfig

MODELS = {"clip": (CLIP, CLIPConfig), "prior": (DiffusionPrior, PriorConfig), "decoder": (Decoder, DecoderConfig),
          "upsampler1": (Upsampler, UpsamplerConfig), "upsampler2": (Upsampler, UpsamplerConfig)}


def load_model(path):
    """(model with its averaged weights in eval mode, checkpoint) from a stage's file. Raises FileNotFoundError, ValueError."""
    checkpoint = load_checkpoint(path)
    try:
        model_class, config_class = MODELS[checkpoint["stage"]]
        model = model_class(config_class(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["ema"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit this version's models: {str(error).splitlines()[0]}") from None
    return model.eval().requires_grad_(False), checkpoint


def seeded(*key):
    """A random generator for anything that prints, such as (seed, "decoder"): equal keys give equal numbers, other keys other ones.

    The key is hashed to the 32 bits that torch reads of a seed. Generators live on the CPU, so that a GPU draws the same pictures.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def out_of_memory(error):
    """Whether an exception says that memory ran out, of a GPU, of torch on the CPU (which has no type of its own for it), or of Python."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


class DALLE2:
    """Tokenizer, CLIP, prior, decoder and up to two upsamplers, ready to draw."""

    BATCH = 64                          # pictures drawn at once by prior and decoder

    def __init__(self, tokenizer, clip, prior, decoder, upsamplers=(), device="cpu"):
        self.device = torch.device(device)
        self.tokenizer, self.context_length = tokenizer, decoder.cfg.context_length
        self.clip, self.prior, self.decoder = clip.to(self.device), prior.to(self.device), decoder.to(self.device)
        self.upsamplers = [upsampler.to(self.device) for upsampler in upsamplers]
        for model in (self.decoder, *self.upsamplers):
            model.to(memory_format=torch.channels_last)                    # convolutions are faster so, on CPU and GPU

    @classmethod
    def load(cls, path=None, device=None):
        """From a run folder of train.py ("runs/tiny" if none is given); device "cpu", "cuda" or None, the best there is.

        A run whose upsamplers are not trained yet draws base pictures. Raises FileNotFoundError when the folder or one of the
        tokenizer, CLIP, prior and decoder is missing, ValueError for a damaged file or stages that do not belong together.
        """
        run = Path(path or "runs/tiny")
        if not run.is_dir():
            raise FileNotFoundError(f"there is no run folder {run}: train one with `python train.py --out {run}`")
        models, signatures = {}, {}
        for stage in MODELS:
            file = run / f"{stage}.pt"
            if not file.is_file() and stage.startswith("upsampler"):
                break                                                      # the second is of no use without the first
            if not file.is_file():
                raise FileNotFoundError(f"{run} has no {stage}.pt: train it with `python train.py --stage {stage} --out {run}`")
            models[stage], checkpoint = load_model(file)
            signatures[stage] = checkpoint.get("clip_signature")
            if checkpoint["step"] < checkpoint["steps"]:
                warnings.warn(f"{file} is not finished: {checkpoint['step']} of {checkpoint['steps']} steps", stacklevel=2)
            if stage == "clip":
                tokenizer = BPETokenizer.from_state_dict(checkpoint["tokenizer"])
        for stage in ("prior", "decoder"):
            if signatures[stage] != signatures["clip"]:
                raise ValueError(f"{run}/{stage}.pt was trained on the embeddings of another CLIP than {run}/clip.pt: train it again")
        upsamplers = [model for stage, model in models.items() if stage.startswith("upsampler")]
        return cls(tokenizer, models["clip"], models["prior"], models["decoder"], upsamplers, pick_device(device or "auto"))

    # ------------------------------------------------------------------ into CLIP's space

    def tokens(self, captions):
        """Captions (list of str) -> tokens (B, L). Raises ValueError for an empty or overlong caption."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise ValueError("no caption was given")
        for caption in captions:
            if not caption.strip():
                raise ValueError("a caption is empty: say what the picture should show")
        return self.tokenizer.tokenize(captions, self.context_length).to(self.device)

    @torch.no_grad()
    def encode_text(self, captions):
        """z_txt (B, D) of unit norm for captions (list of str)."""
        return self.clip.encode_text(self.tokens(captions))

    @torch.no_grad()
    def encode_image(self, images):
        """z_img (B, D) of unit norm for images: a PIL image, a list of them (any mode and size), or a tensor (B, 3, S, S) in [-1, 1]."""
        size = self.clip.cfg.image_size
        if not torch.is_tensor(images):
            images = [images] if isinstance(images, Image.Image) else images
            images = torch.stack([to_float(from_pil(central_square(image, size))) for image in images])
        return self.clip.encode_image(images.to(self.device))

    # ------------------------------------------------------------------ out of it

    def text_to_image(self, captions, n=1, seed=0, prior="diffusion", guidance=None, steps=None, stage="full", progress=True):
        """Draw n pictures for each caption: list (caption) of lists (n) of PIL images.

        seed: picture j of every caption depends on (caption, seed + j) alone, whatever else is drawn with it. Each stage has noise of
        its own, so that other settings of one leave what the others draw from as it was.
        prior: "diffusion", or "none", which gives z_txt to the decoder in z_img's place (the paper's Fig. 8, middle row;
            with `whiten_z`, through the spread of z_img, which z_txt has not: it then says less than the figure's row).
        guidance, steps: of the decoder; None takes its configuration's. The prior and the upsamplers keep their own.
        stage: "full" for the largest pictures, "base" for the decoder's, "each" for dicts {"base", "up1", "up2"} of PIL images.
        Raises ValueError for captions or numbers that cannot be drawn.
        """
        if prior not in ("diffusion", "none"):
            raise ValueError(f"unknown prior '{prior}': it is 'diffusion' or 'none'")
        if stage not in ("full", "base", "each"):
            raise ValueError(f"unknown stage '{stage}': it is 'full', 'base' or 'each'")
        if n < 1:
            raise ValueError(f"{n} pictures: ask for at least one")
        if steps is not None and not 1 <= steps <= self.decoder.cfg.num_timesteps:
            raise ValueError(f"{steps} sampling steps: the decoder takes 1 to {self.decoder.cfg.num_timesteps}")
        if guidance is not None and not 0 <= guidance < 1e4:
            raise ValueError(f"guidance {guidance}: it is a number from 0 up, 1 for none")
        tokens = self.tokens(captions).repeat_interleave(n, dim=0)         # (B, L), B = captions · n
        seeds = [seed + j for j in range(n)] * (len(tokens) // n)
        pictures = []
        for part, part_seeds in zip(tokens.split(self.BATCH), batched(seeds, self.BATCH)):
            noise = [seeded(s, "prior") for s in part_seeds]
            z_txt = self.clip.encode_text(part)
            z_img = z_txt if prior == "none" else self.prior.sample(part, z_txt, generator=noise, progress=progress)
            pictures += self.decode(z_img, part, part_seeds, guidance, steps, stage, progress)
        return [pictures[i:i + n] for i in range(0, len(pictures), n)]

    def decode(self, z_img, tokens, seeds, guidance=None, steps=None, stage="full", progress=True):
        """From z_img (B, D), tokens (B, L) and B seeds to a list of B pictures, or dicts of them, as `text_to_image` returns them."""
        noise = [seeded(s, "decoder") for s in seeds]
        images = {"base": self.decoder.sample(z_img, tokens, guidance, steps, noise, progress)}
        for i, upsampler in enumerate(self.upsamplers if stage != "base" else (), start=1):
            noise = [seeded(s, f"upsampler{i}") for s in seeds]
            images[f"up{i}"] = upsampler.sample(list(images.values())[-1], generator=noise, progress=progress)
        if stage == "each":
            return [{name: to_pil(batch[i]) for name, batch in images.items()} for i in range(len(tokens))]
        return [to_pil(image) for image in list(images.values())[-1]]


def batched(items, size):
    """Consecutive slices of at most `size` items."""
    return [items[i:i + size] for i in range(0, len(items), size)]
