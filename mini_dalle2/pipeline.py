"""The whole of DALL·E 2 in one object: caption → prior → z_img → decoder → small picture → two upsamplers → PNG.

    P(x | y) = P(x | z_img, y) · P(z_img | y)                                                                     (unCLIP §2)

The right factor is the prior, the left one decoder and upsamplers. This file only passes tensors from one built module to the next: from
captions to pictures, and, by z_img and the noise x_T together, from pictures to others like them, between them, or changed (§3).

Shapes: B pictures, L context length, D = clip_dim, s side of the decoder's pictures, S of the largest.
References: unCLIP (2204.06125) §2, §3, §4, and Table 3 for the steps of each model; FlowEdit (2412.08629) for text diffs. Read next:
sample.py at the top level, which calls this.
"""

import contextlib
import functools
import itertools
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .ar_prior import ARPrior, ARPriorConfig
from .clip import CLIP, CLIPConfig
from .configs import VARIANTS
from .data.pixels import central_square, from_pil, to_float, to_pil, to_rgb
from .decoder import Decoder, DecoderConfig
from .diffusion import ModelOutput
from .prior import DiffusionPrior, PriorConfig
from .runtime.device import pick_device, shorten
from .runtime.files import load_checkpoint
from .runtime.noise import seeded
from .runtime.processes import collect, gather_rows, is_main, own_part
from .sampling import flow_edit, slerp, strided_timesteps
from .tokenizer import BPETokenizer, clean
from .tricks.sketch import Sketch, SketchConfig
from .upsampler import Upsampler, UpsamplerConfig


MODELS = {"clip": (CLIP, CLIPConfig), "prior": (DiffusionPrior, PriorConfig), "ar_prior": (ARPrior, ARPriorConfig),
          "sketch": (Sketch, SketchConfig), "decoder": (Decoder, DecoderConfig),
          "upsampler1": (Upsampler, UpsamplerConfig), "upsampler2": (Upsampler, UpsamplerConfig)}
WEIGHTS = Path(__file__).parent / "weights"                                # those in the box
OPTIONAL = ("ar_prior", "upsampler1", "upsampler2")                        # a run can draw without them


def default_run():
    """What is loaded when no run is named: the weights in the box (shipped.py), or where there are none, runs/tiny."""
    return WEIGHTS if WEIGHTS.is_dir() else Path("runs/tiny")


def results_folder(run):
    """Where what is drawn with a run goes: into its folder, but with the weights in the box, the current one: nobody looks for it in the package."""
    return Path(".") if Path(run).resolve() == WEIGHTS.resolve() else Path(run)


def load_model(path, stage=None):
    """(model with its averaged weights in eval mode, checkpoint) from a stage's file. Raises FileNotFoundError, ValueError."""
    checkpoint = load_checkpoint(path, stage)
    try:
        model_class, config_class = MODELS[VARIANTS.get(checkpoint["stage"], checkpoint["stage"])]
        model = model_class(config_class(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["ema"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this version's models: {reason}") from None
    if not {"step", "steps"} <= checkpoint.keys():
        raise ValueError(f"{path} does not say how many steps of its training it has behind it")
    return model.eval().requires_grad_(False), checkpoint


def parameters(model):
    """How many numbers a model has learned; a decoder's sketch, which is a stage of its own, is not counted again."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("sketch."))


class DALLE2:
    """Tokenizer, CLIP, priors, decoder and up to two upsamplers, ready to draw. Of several processes (distributed.py) each draws a share.

    What one does with a picture, instead of a caption, goes by the paper's bipartite latent (§3): z_img, what CLIP sees in it, and x_T,
    the noise from which the decoder draws just this one of all the pictures with that z_img.
    """

    BATCH = 64                          # pictures drawn at once by the decoder; by the prior, with up to SKETCHES z_img each
    SKETCHES = 8                        # z_img to choose from for each picture, where there are sketches of them; see `choose`
    CHOICE = 16                         # z_img that inpainting chooses from, by what must stay; see `fitting`
    PRIORS = ("diffusion", "ar", "z_txt", "caption")

    def __init__(self, tokenizer, clip, prior, decoder, upsamplers=(), device="cpu", ar_prior=None, dtype=None, offload=False):
        """dtype: torch.float16 or bfloat16 for the matrices (norms and diffusion itself stay in float32); None: float32 throughout.

        offload: models lie on the CPU, and come to the device only for as long as they are at work.
        """
        self.device, self.dtype, self.offload, self.here = torch.device(device), dtype, offload, []
        self.tokenizer, self.context_length = tokenizer, decoder.cfg.context_length
        self.clip, self.prior, self.ar_prior, self.decoder, self.upsamplers = clip, prior, ar_prior, decoder, list(upsamplers)
        for model in (self.decoder, *self.upsamplers):
            model.to(memory_format=torch.channels_last)                    # convolutions are faster so, on CPU and GPU
        for model in filter(None, (clip, prior, ar_prior, decoder, *self.upsamplers)):
            shorten(model, dtype)
            if not offload:
                model.to(self.device)
        for model in (self.prior, self.decoder):
            if model.cfg.frozen_text:
                model.caption.encoder = self.clip.read                     # a function: CLIP does not become part of them

    @contextlib.contextmanager
    def at_work(self, *models):
        """Brings models to the device for as long as they are needed, if they are not always there, and sets their precision."""
        absent = [model for model in models if self.offload and model not in self.here]
        try:
            for model in absent:
                self.here.append(model.to(self.device))
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                yield
        finally:
            for model in absent:
                self.here.remove(model.cpu())

    @classmethod
    def load(cls, path=None, device=None, dtype=None, offload=False):
        """From a run folder of train.py; device "cpu", "cuda" or None, the best there is; the rest: see above.

        path None: see `default_run`.
        A run whose upsamplers are not trained yet draws base pictures; one without the autoregressive prior does without. Raises
        FileNotFoundError when the folder or one of CLIP, prior and decoder is missing, ValueError for a damaged file or stages that do
        not belong together.
        """
        run = Path(path or default_run())
        if not run.is_dir():
            raise FileNotFoundError(f"there is no run folder {run}: train one with `python train.py --out {run}`")
        models, signatures = {}, {}
        for stage in MODELS:
            if stage == "sketch":                                          # is a part of the decoder
                continue
            file = run / f"{stage}.pt"
            if not file.is_file() and stage in OPTIONAL:
                continue
            if not file.is_file():
                raise FileNotFoundError(f"{run} has no {stage}.pt: train it with `python train.py --stage {stage} --out {run}`")
            models[stage], checkpoint = load_model(file, stage)
            signatures[stage] = checkpoint.get("clip_signature")
            if checkpoint["step"] < checkpoint["steps"]:
                warnings.warn(f"{file} is not finished: {checkpoint['step']} of {checkpoint['steps']} steps", stacklevel=2)
            if stage == "clip":
                try:
                    tokenizer = BPETokenizer.from_state_dict(checkpoint.get("tokenizer"))
                except ValueError as error:
                    raise ValueError(f"{file} is damaged: {error}") from None
        for stage in models.keys() & {"prior", "ar_prior", "decoder"}:     # which learned from the embeddings of one CLIP
            if signatures[stage] != signatures["clip"]:
                raise ValueError(f"{run}/{stage}.pt was trained on the embeddings of another CLIP than {run}/clip.pt: train it again")
        upsamplers = [models[stage] for stage in ("upsampler1", "upsampler2") if stage in models]
        if "upsampler1" not in models:
            upsamplers = []                                                # the second is of no use without the first
        side = models["decoder"].cfg.image_size
        for i, upsampler in enumerate(upsamplers, start=1):
            if upsampler.cfg.low_size != side:
                raise ValueError(f"{run}/upsampler{i}.pt enlarges pictures of {upsampler.cfg.low_size} pixels, but is given such of {side}")
            side = upsampler.cfg.high_size
        return cls(tokenizer, models["clip"], models["prior"], models["decoder"], upsamplers, pick_device(device or "auto"),
                   models.get("ar_prior"), dtype, offload)

    @property
    def size(self):
        """Side of the largest pictures that it draws."""
        return list(self.sizes.values())[-1]

    @property
    def sizes(self):
        """Sides of the pictures after each stage: {"base": …, "up1": …, "up2": …}, as far as there are upsamplers."""
        return {"base": self.decoder.cfg.image_size} | {f"up{i}": upsampler.cfg.high_size for i, upsampler in enumerate(self.upsamplers, start=1)}

    # ------------------------------------------------------------------ into CLIP's space

    def tokens(self, captions):
        """Captions (list of str) -> tokens (B, L). Raises ValueError for an empty, unreadable or overlong caption."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise ValueError("no caption was given")
        for caption in captions:
            text = clean(caption)
            if not text:
                raise ValueError("a caption is empty: say what the picture should show")
            if "\N{REPLACEMENT CHARACTER}" in text:                        # what bytes that are no text become
                raise ValueError(f"a caption is not readable as text: {text[:40]!r}")
        return self.tokenizer.tokenize(captions, self.context_length).to(self.device)

    @torch.no_grad()
    def encode_text(self, captions):
        """z_txt (B, D) for captions (list of str), of unit norm unless CLIP's `unit_norm` is off."""
        with self.at_work(self.clip):
            return self.clip.encode_text(self.tokens(captions)).float()

    def pixels(self, images, size):
        """A PIL image, a list of them (any mode and size) or a tensor (B, 3, size, size) in [-1, 1] -> such a tensor, on the device."""
        if not torch.is_tensor(images):
            images = [images] if isinstance(images, Image.Image) else images
            images = torch.stack([to_float(from_pil(central_square(image, size))) for image in images])
        return images.to(self.device)

    @torch.no_grad()
    def encode_image(self, images):
        """z_img (B, D), of unit norm unless CLIP's `unit_norm` is off, for images: a PIL image, a list of them (any mode and size), or a tensor (B, 3, S, S) in [-1, 1]."""
        self.must_see()
        with self.at_work(self.clip):
            return self.clip.encode_image(self.pixels(images, self.clip.cfg.image_size)).float()

    def must_see(self):
        """Raises ValueError when CLIP has only its text half, as in Karlo's diffusers folder without `image_encoder`."""
        if self.clip.visual is None:
            raise ValueError("this CLIP has no image encoder: with these weights one can draw from captions, but not from pictures")

    @torch.no_grad()
    def invert(self, images, steps=None, progress=False):
        """The bipartite latent (§3) of a PIL image, or of a list of them: z_img (B, D), x_T (B, 3, s, s), s the decoder's size."""
        z_img = self.encode_image(images)
        with self.at_work(self.clip, self.decoder):
            return z_img, self.decoder.invert(self.pixels(images, self.decoder.cfg.image_size), z_img, steps, progress)

    @torch.no_grad()
    def classify(self, image, captions):
        """Zero-shot classification (CLIP §3.1): the probability of each of the captions, (K,), if one of them belongs to the image."""
        self.must_see()
        with self.at_work(self.clip):
            return self.clip.zero_shot(self.pixels(image, self.clip.cfg.image_size), self.tokens(captions))[0].float()

    # ------------------------------------------------------------------ out of it

    def text_to_image(self, captions, n=1, seed=0, prior="diffusion", guidance=None, steps=None, stage="full", progress=True, rerank=None,
                      sketches=SKETCHES):
        """Draw n pictures for each caption: list (caption) of lists (n) of PIL images.

        seed: picture j of every caption depends on (caption, seed + j) alone, whatever else is drawn with it. Each stage has noise of
        its own, so that other settings of one leave what the others draw from as it was.
        prior: where z_img comes from: "diffusion" or "ar", the two priors; the rows of the paper's Fig. 8 without one are "z_txt", which
        gives CLIP's text embedding to the decoder in its place, and "caption", which gives it nothing but the caption, as GLIDE;
        with `whiten_z` z_txt passes through the spread of z_img, which is not its own: that row then says less than the figure's.
        guidance, steps: of the decoder; None takes its configuration's. The prior and the upsamplers keep their own.
        stage: "full" for the largest pictures, "base" for the decoder's, "up1" and "up2" for those after an upsampler, "each" for dicts
        {"base", "up1", "up2"} of PIL images.
        rerank: draw so many, and return the n of them that CLIP finds closest to the caption, the best first.
        sketches: draw so many z_img from the prior for each picture, and keep the one whose sketch CLIP finds closest to the caption (see
        `choose`; of two that are equally close rounding may decide). 1, or a run without sketch or image encoder: no choice.
        Raises ValueError for captions or numbers that cannot be drawn.
        """
        self.check(n=n, stage=stage, guidance=guidance, steps=steps, prior=prior, sketches=sketches)
        if rerank is not None and rerank < n:
            raise ValueError(f"rerank {rerank}: to choose {n} pictures, draw at least as many")
        if rerank:
            self.must_see()
        tokens = self.tokens(captions)                                     # (K, L)
        K, drawn = len(tokens), rerank or n
        tokens, seeds = tokens.repeat_interleave(drawn, dim=0), [seed + j for j in range(drawn)] * K
        z_img = self.embed(tokens, seeds, prior, progress, sketches)       # (K · drawn, D)
        base = self.base(z_img, tokens, seeds, progress, guidance=guidance, steps=steps)
        if rerank:                                                         # before the upsamplers, which have less to do then
            fit = self.fit(base, self.encode_text(captions).repeat_interleave(drawn, 0)).view(K, drawn)
            best = fit.topk(n).indices + drawn * torch.arange(K, device=fit.device)[:, None]      # (K, n)
            base, seeds = base[best.flatten()], [seeds[i] for i in best.flatten().tolist()]
        pictures = self.enlarge(base, seeds, stage, progress)
        return [pictures[i:i + n] for i in range(0, len(pictures), n)]

    def check(self, *, n=1, stage="full", guidance=None, steps=None, eta=0.0, prior="diffusion", sketches=1):
        """Raises ValueError unless one can draw with these."""
        if n < 1:
            raise ValueError(f"{n} pictures: ask for at least one")
        if stage not in (*self.sizes, "full", "each"):
            raise ValueError(f"unknown stage '{stage}': it is 'full', 'each', " + " or ".join(f"'{name}'" for name in self.sizes))
        if prior not in self.PRIORS:
            raise ValueError(f"unknown prior '{prior}': it is one of {', '.join(self.PRIORS)}")
        if prior == "ar" and self.ar_prior is None:
            raise ValueError("this run has no autoregressive prior: train it with --stage ar_prior")
        if sketches < 1:
            raise ValueError(f"{sketches} sketches to choose from: ask for at least one")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: it is a number from 0 to 1")
        if steps is not None and not 1 <= steps <= self.decoder.cfg.num_timesteps:
            raise ValueError(f"{steps} sampling steps: the decoder takes 1 to {self.decoder.cfg.num_timesteps}")
        if guidance is not None and not 0 <= guidance < 1e4:
            raise ValueError(f"guidance {guidance}: it is a number from 0 up, 1 for none")

    @torch.no_grad()
    def embed(self, tokens, seeds, prior="diffusion", progress=False, sketches=SKETCHES):
        """z_img (B, D) for tokens (B, L) and B seeds, from what `prior` names, each the best of `sketches` (see `text_to_image`); None for "caption"."""
        if prior == "caption":
            return None
        model, progress = self.ar_prior if prior == "ar" else self.prior, progress and is_main()
        k = sketches if self.has_sketch and prior != "z_txt" else 1
        size = max(1, self.BATCH * self.SKETCHES // max(k, self.SKETCHES))             # captions at once
        drawn, chosen = [], [torch.empty(0, self.clip.cfg.clip_dim, device=self.device)]
        with self.at_work(self.clip, model):
            for part, some in zip(own_part(tokens).split(size), batched(own_part(seeds), size)):
                z_txt = z_img = self.clip.encode_text(part).float()
                if prior != "z_txt":
                    noise = [seeded(s, "prior") for s in some]             # each for k rows
                    z_img = model.sample(part.repeat_interleave(k, 0), z_txt.repeat_interleave(k, 0), generator=noise, progress=progress)
                drawn.append((z_img.unflatten(0, (-1, k)), z_txt))
        for z_img, z_txt in drawn:
            chosen.append(z_img[:, 0] if k == 1 else self.choose(z_img, z_txt))
        return gather_rows(torch.cat(chosen))

    @property
    def has_sketch(self):
        """Whether a z_img can be looked at before it is drawn: there is a sketch of it, and a CLIP with eyes."""
        return self.decoder.sketch is not None and self.clip.visual is not None

    # mini: the paper keeps the better of two z_img by z_img · z_txt (§2.2; prior.py). What a small prior gets wrong, often the number of things,
    # that product hardly sees; CLIP does see it in the sketch, long before a picture is drawn. With the weights in the box, of 512 pictures 95.7 %
    # are right by the best of eight sketches, 91.4 % by the paper's rule alone; of several things of a kind, 78 and 58 %. But the best of many
    # is no draw from P(z_img | y) any more: of one caption's sketches 0.7 of the variance is left.
    def choose(self, z_img, z_txt):
        """Of z_img (B, k, D) the one whose sketch CLIP finds closest to the caption, z_txt (B, D): (B, D)."""
        with self.at_work(self.decoder.sketch):
            sketches = self.decoder.sketch(z_img.flatten(0, 1)).float()    # (B · k, 3, s, s)
        best = self.fit(sketches, z_txt.repeat_interleave(z_img.shape[1], 0)).view(z_img.shape[:2]).argmax(dim=1)
        return z_img[torch.arange(len(z_img), device=best.device), best]

    def fit(self, pictures, z_txt):
        """How well pictures (B, 3, S, S) fit captions, z_txt (B, D), as CLIP sees it: the cosine, (B,)."""
        z_img = torch.cat([self.encode_image([to_pil(picture) for picture in part]) for part in pictures.split(self.BATCH)])
        return F.cosine_similarity(z_img, z_txt, dim=-1)

    def base(self, z_img, tokens, seeds, progress=False, x_T=None, **options):
        """The decoder's pictures (B, 3, s, s) in [-1, 1]: z_img (B, D) or None, tokens (B, L) or None, B seeds, x_T (B, 3, s, s) or None.

        options: guidance, steps, eta, known, as Decoder.sample has them.
        """
        def parts(x):
            return itertools.repeat(None) if x is None else own_part(x).split(self.BATCH)

        size = self.decoder.cfg.image_size
        drawn = [torch.empty(0, 3, size, size, device=self.device)]
        with self.at_work(self.clip, self.decoder):
            for some, z, y, x in zip(batched(own_part(seeds), self.BATCH), parts(z_img), parts(tokens), parts(x_T)):
                noise = [seeded(s, "decoder") for s in some]
                drawn.append(self.decoder.sample(z, y, generator=noise, x_T=x, progress=progress and is_main(), **options))
        return gather_rows(torch.cat(drawn))

    def enlarge(self, base, seeds, stage="full", progress=False, known=None):
        """Base pictures (B, 3, s, s) -> list of B PIL images, or of dicts of them, as `text_to_image` returns them.

        known(side) -> (picture, mask), as the models take them, says at any size what is given and must stay (see `inpaint`).
        """
        pictures, progress = [], progress and is_main()
        for part, some in zip(own_part(base).split(self.BATCH), batched(own_part(seeds), self.BATCH)):
            images = {"base": part}
            for i, upsampler in enumerate(self.upsamplers, start=1):
                if stage in images:                                        # "base", "up1": no farther than this
                    break
                noise = [seeded(s, f"upsampler{i}") for s in some]
                given = known and known(upsampler.cfg.high_size)
                with self.at_work(upsampler):
                    images[f"up{i}"] = upsampler.sample(list(images.values())[-1], generator=noise, progress=progress, known=given)
            if known:                                                      # the models end near what is given, not on its very numbers
                images = {name: torch.where(mask > 0.5, batch, picture) for (name, batch), (picture, mask) in zip(
                    images.items(), (known(batch.shape[-1]) for batch in images.values()))}
            if stage == "each":
                pictures += [{name: to_pil(batch[j]) for name, batch in images.items()} for j in range(len(part))]
            else:
                pictures += [to_pil(image) for image in list(images.values())[-1]]
        return sum(collect(pictures), [])

    def decode(self, z_img, tokens, seeds, guidance=None, steps=None, stage="full", progress=True):
        """From z_img (B, D), tokens (B, L) and B seeds to a list of B pictures, or dicts of them, as `text_to_image` returns them."""
        return self.enlarge(self.base(z_img, tokens, seeds, progress, guidance=guidance, steps=steps), seeds, stage, progress)

    # ------------------------------------------------------------------ from picture to picture (unCLIP §3 and §4)

    def variations(self, image, n=4, eta=1.0, seed=0, guidance=1.0, steps=None, stage="full", progress=True):
        """n pictures of what CLIP sees in this one (§3.1): list of PIL images.

        eta from 0, which reconstructs it (with guidance 1), to 1, which keeps nothing but what z_img says. image: PIL, any mode and size.
        """
        self.check(n=n, stage=stage, guidance=guidance, steps=steps, eta=eta)
        z_img, x_T = self.invert(image, steps, progress)
        seeds = [seed + j for j in range(n)]
        base = self.base(z_img.expand(n, -1), None, seeds, progress, x_T.expand(n, -1, -1, -1), guidance=guidance, steps=steps, eta=eta)
        return self.enlarge(base, seeds, stage, progress)

    def reconstruct(self, image, components=None, seed=0, steps=None, stage="full", progress=True):
        """The picture from its own latents: list of PIL images.

        components None: from (z_img, x_T), one picture, the input again. Otherwise numbers of principal components (§4, Fig. 7): one
        picture for each, from z_img with only so many of them left and one noise for all. Raises ValueError without an AR prior's PCA.
        """
        self.check(n=1 if components is None else len(components), stage=stage, steps=steps)
        if components is None:
            z_img, x_T = self.invert(image, steps, progress)
        else:
            if self.ar_prior is None:
                raise ValueError("the principal components belong to the autoregressive prior: train it with --stage ar_prior")
            z_img = self.encode_image(image)
            with self.at_work(self.ar_prior):
                z_img = torch.cat([self.ar_prior.codes.project(z_img, count) for count in components])
            x_T = self.start(seed).expand(len(z_img), -1, -1, -1)
        seeds = [seed] * len(z_img)
        return self.enlarge(self.base(z_img, None, seeds, progress, x_T, guidance=1.0, steps=steps, eta=0.0), seeds, stage, progress)

    def start(self, seed):
        """One x_T (1, 3, s, s) that follows from the seed alone."""
        size = self.decoder.cfg.image_size
        return torch.randn(1, 3, size, size, generator=seeded(seed, "decoder")).to(self.device)

    def interpolate(self, a, b, n=5, seed=0, fixed_noise=False, steps=None, stage="full", progress=True):
        """n ≥ 2 pictures on the way from image a to image b (§3.2): list of PIL images.

        z_img goes along the great circle, and so does x_T, so that both ends are reconstructions of a and b. With fixed_noise all are
        drawn from one random x_T instead (the paper's Fig. 4), so that only what z_img says changes.
        """
        self.check(stage=stage, steps=steps)
        if n < 2:
            raise ValueError(f"{n} pictures: an interpolation has at least two, its ends")
        (z_a, x_a), (z_b, x_b) = ((self.encode_image(image), self.start(seed)) if fixed_noise else self.invert(image, steps, progress)
                                  for image in (a, b))
        theta = torch.linspace(0, 1, n, device=self.device)
        z_img = slerp(z_a.expand(n, -1), z_b.expand(n, -1), theta)
        x_T = slerp(x_a.expand(n, -1, -1, -1), x_b.expand(n, -1, -1, -1), theta)
        seeds = [seed] * n
        return self.enlarge(self.base(z_img, None, seeds, progress, x_T, guidance=1.0, steps=steps, eta=0.0), seeds, stage, progress)

    def textdiff(self, image, source, target, theta=(0.0, 0.2, 0.3, 0.4, 0.5), seed=0, guidance=2.0, steps=None, stage="full", progress=True):
        """The image, changed as the caption `target` differs from the caption `source` (§3.3): a PIL image for each theta.

        z_d = normalised z_txt(target) − z_txt(source), z_θ = slerp(z_img, z_d, θ); x_T stays. source: what the image shows, a dummy like
        "a photo", or None, which takes z_txt(target) itself. theta: how far, from 0 to 1; the paper goes to between 0.25 and 0.5.
        With `whiten_z` (`tiny` and `micro`): w_θ = w + 2θ·d, whitened; see `follow`. The source should then be a caption of the whole
        picture: with None, at θ = 1/2 nothing is left of the picture but x_T. The seed is that of the noise in which the prior compares the
        captions, and of the upsamplers'. guidance 1 reconstructs the image at theta 0, more brings the change out.
        """
        theta = torch.as_tensor(theta, dtype=torch.float32, device=self.device).flatten()
        self.check(n=len(theta), stage=stage, guidance=guidance, steps=steps)
        if not 0 <= theta.min() <= theta.max() <= 1:
            raise ValueError(f"theta {theta.tolist()}: from 0, the picture itself, to 1")
        if source is not None and (self.encode_text([target]) - self.encode_text([source])).norm() < 1e-4:
            raise ValueError("both captions mean the same to this CLIP: there is no difference to follow")
        z_img, x_T = self.invert(image, steps, progress)
        n, seeds = len(theta), [seed] * len(theta)
        z_img = self.follow(z_img, source and [source], [target], theta, seed)
        base = self.base(z_img, None, seeds, progress, x_T.expand(n, -1, -1, -1), guidance=guidance, steps=steps, eta=0.0)
        return self.enlarge(base, seeds, stage, progress)

    @torch.no_grad()
    def follow(self, z_img, sources, targets, theta, seed=0):
        """z_θ (M, D) of text diffs: z_img (N, D), captions (lists of N or of one; sources may be None), theta (M,) in [0, 1]; M = N, or N = 1.

        The paper's slerp(z_img, z_d, θ), or with `whiten_z` w + 2θ·d, d from `flow_edit` by the prior, without guidance. One seed draws the
        noise for all N. Without sources, d goes all the way from the picture to what is typical of the target, a mean of many such z_img.
        """
        theta = torch.as_tensor(theta, device=z_img.device)
        # mini: whitening magnifies what is rare in pictures, of which a difference of captions has much, so that the paper's z_θ means nothing to
        # the decoder. The prior knows what it does mean: what it predicts for either caption, given the noised z_img, differs by what has to
        # change in this one (FlowEdit). That is added, at θ = 1/2, the paper's farthest, in full; beyond, exaggerated. Of 70 edits 63 were right
        # then; by the difference of what the prior expects of either caption, whatever the picture, 38.
        if self.prior.cfg.whiten_z:
            prior = self.prior

            def denoiser(captions):
                if captions is None:                                       # without a source, all of the picture goes
                    return lambda x_t, t: ModelOutput(x, torch.zeros_like(x))
                tokens = self.tokens(captions).expand(len(z_img), -1)
                return prior.denoiser(tokens, self.clip.encode_text(tokens).float())

            with self.at_work(self.clip, prior):
                x = prior.scale(z_img)
                timesteps = strided_timesteps(prior.cfg.num_timesteps, prior.cfg.sampling_steps)
                change = flow_edit(prior.diffusion, denoiser(sources), denoiser(targets), x, timesteps, seeded(seed, "textdiff"))
                return prior.unscale(x + 2 * theta[:, None] * change)
        z_img = z_img.expand(len(theta), -1)
        z_d = F.normalize(self.encode_text(targets), dim=-1) - (0 if sources is None else F.normalize(self.encode_text(sources), dim=-1))
        length = z_img.norm(dim=-1, keepdim=True)                          # 1, but for Karlo's
        return length * F.normalize(slerp(z_img / length, F.normalize(z_d, dim=-1).expand_as(z_img), theta), dim=-1)

    @torch.no_grad()
    def inpaint(self, image, mask, caption, n=1, seed=0, prior="diffusion", guidance=None, steps=None, stage="full", progress=True):
        """n pictures that show the caption, and outside the mask are the image, pixel for pixel: list of PIL images.

        image: PIL, any mode; it is taken at the size of the result, its central square. mask: PIL, of the same size as the image, light
        where something new is wanted; what is transparent in it is dark. The caption describes the whole picture. Raises ValueError.
        """
        self.check(n=n, stage=stage, guidance=guidance, steps=steps, prior=prior)
        image, light = to_rgb(image), to_mask(mask)                        # upright both, before their sizes are compared
        if light.size != image.size:
            raise ValueError(f"the mask has {light.width} x {light.height} pixels, the image {image.width} x {image.height}: "
                             f"they must be of the same size")

        @functools.cache
        def known(side):                                                   # -> picture (1, 3, side, side), mask (1, 1, side, side)
            return self.pixels(image, side), shrunk_mask(light, side).to(self.device)

        if not known(self.decoder.cfg.image_size)[1].any():
            raise ValueError("nothing in the mask's central square is white: there is nothing to draw")
        seeds, tokens, given = [seed + j for j in range(n)], self.tokens([caption]).expand(n, -1), known(self.decoder.cfg.image_size)
        choice = self.CHOICE if prior in ("diffusion", "ar") else 1        # the others have nothing to choose from
        z_img = self.embed(tokens.repeat_interleave(choice, 0), [s + 10_000 * k for s in seeds for k in range(choice)], prior, progress, sketches=1)
        if choice > 1:
            z_img = self.fitting(z_img.unflatten(0, (n, choice)), seeds, *given)
        base = self.base(z_img, tokens, seeds, progress, guidance=guidance, steps=steps, known=given)
        return self.enlarge(base, seeds, stage, progress, known)

    # mini: neither paper has this; GLIDE trained a network of its own to inpaint. Ours is given z_img of a whole picture, whose ground and
    # places the prior has chosen without a look at what must stay.
    def fitting(self, z_img, seeds, picture, mask):
        """Of z_img (B, n, D) the one whose picture, in four steps, is most like `picture` (1, 3, s, s) outside the mask (1, 1, s, s): (B, D)."""
        chosen = []
        with self.at_work(self.decoder):
            for z, seed in zip(z_img, seeds):
                x_T = self.start(seed).expand(len(z), -1, -1, -1)
                drawn = self.decoder.sample(z, None, guidance=1.0, steps=min(4, self.decoder.cfg.num_timesteps), x_T=x_T, eta=0.0)
                chosen.append(z[((drawn - picture) * (1 - mask)).square().flatten(1).sum(1).argmin()])
        return torch.stack(chosen)


def to_mask(mask):
    """Any PIL image -> upright black and white of mode "L": 255 where it is light and not transparent."""
    mask = ImageOps.exif_transpose(mask)
    if "A" in mask.getbands() or "transparency" in mask.info:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    return mask.convert("L").point(lambda value: 255 * (value > 127))


def shrunk_mask(light, side):
    """The central square of a black and white PIL image at side × side: (1, 1, side, side), 1 where any pixel in it is white, else 0."""
    square = min(light.size)
    left, top = (light.width - square) // 2, (light.height - square) // 2
    full = torch.from_numpy(np.array(light.crop((left, top, left + square, top + square))))[None, None].float() / 255
    return F.adaptive_max_pool2d(full, side) if square >= side else F.interpolate(full, (side, side), mode="nearest")


def batched(items, size):
    """Consecutive slices of at most `size` items."""
    return [items[i:i + size] for i in range(0, len(items), size)]
