"""The whole of DALL·E 2 in one object: from a caption to a picture.

    caption → prior → z_img → decoder → small picture → two upsamplers → picture

    P(x | y) = P(x | z_img, y) · P(z_img | y)                                          (unCLIP §2)

The right factor is the prior. The left factor is the decoder with its upsamplers. This file passes
tensors from one model to the next. What starts from a picture (unCLIP §3 and §4) is in latents.py.

Shapes: B pictures, K captions, L context length, D = clip_dim, s side of the decoder's pictures,
S side of the largest pictures.
References: unCLIP (2204.06125) §2, and Table 3 for the steps of each model.
Read next: latents.py.
"""

import contextlib
import itertools
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from .configs import (
    VARIANTS, VERSION, build, check_weights, load_weights, model_config, parameters, weights_for)
from .data.pixels import to_pil
from .latents import Latents
from .runtime.checks import brief
from .runtime.commands import how_to_begin, how_to_finish, how_to_train_again, train_command
from .runtime.device import pick_device, shorten
from .runtime.files import load_checkpoint
from .runtime.noise import seeded
from .runtime.processes import collect, gather_rows, is_main, own_part
from .tokenizer import BPETokenizer, clean


# `parameters` and `seeded` live elsewhere, but may be imported from here too.
__all__ = [
    "DALLE2", "LOADED", "OPTIONAL", "WEIGHTS", "batched", "default_run", "load_model", "parameters",
    "results_folder", "seeded"]

# The bundled weights.
WEIGHTS = Path(__file__).parent / "weights"
# The stages that DALLE2 loads. The sketch is stored in the decoder's file.
LOADED = ("clip", "prior", "ar_prior", "decoder", "upsampler1", "upsampler2")
# A run can sample pictures without these.
OPTIONAL = ("ar_prior", "upsampler1", "upsampler2")


def default_run():
    """Return the folder that is loaded when no run is named.

    This is the folder of the bundled weights; in a copy without these weights it is runs/tiny.
    """
    return WEIGHTS if WEIGHTS.is_dir() else Path("runs/tiny")


def results_folder(run):
    """Return the folder for the pictures that a run samples: the run's own folder.

    For the bundled weights it is the current folder, because nobody looks into the package.
    """
    return Path(".") if Path(run).resolve() == WEIGHTS.resolve() else Path(run)


def load_model(path, stage=None):
    """Load a stage's file: (model with its EMA weights in eval mode, checkpoint).

    stage: the stage that the file must belong to; None accepts any stage, and the variants of
    training/variants.py. Raises FileNotFoundError for a missing file, ValueError for a damaged
    file, a file of another stage, and weights of another version.
    """
    checkpoint = load_checkpoint(path, stage)
    check_fits(path, checkpoint)
    model = build(model_config(kind_of(checkpoint), checkpoint["model_config"]))
    load_weights(model, checkpoint["ema"])
    return model.eval().requires_grad_(False), checkpoint


def kind_of(checkpoint):
    """The stage that a checkpoint is built as: its own, or the one that it is a variant of."""
    return VARIANTS.get(checkpoint["stage"], checkpoint["stage"])


def check_fits(path, checkpoint):
    """Raise ValueError unless a checkpoint fits this version's models. No memory is taken for one.

    A checkpoint without a record of its version is older, and may fit all the same.
    """
    again = how_to_train_again(Path(path).parent, checkpoint["stage"])
    version = checkpoint.get("version", VERSION)
    if version != VERSION:
        raise ValueError(f"{path} is of version {brief(version)} of mini_dalle2's checkpoints, and "
                         f"this is version {VERSION}: use the mini_dalle2 that made it, or begin a "
                         f"new run")
    try:
        # "meta" has shapes without memory.
        with torch.device("meta"):
            model = build(model_config(kind_of(checkpoint), checkpoint["model_config"]))
        check_weights(model.state_dict(), weights_for(model, checkpoint["ema"]))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this version's models ({reason}): {again}") from None
    if not {"step", "steps"} <= checkpoint.keys():
        raise ValueError(f"{path} has no step count: {again}")


def check_clip(run, signatures):
    """Raise ValueError unless priors and decoder were trained on the embeddings of the run's CLIP.

    signatures: {stage: signature of the CLIP that the stage belongs to}.
    """
    for stage in ("prior", "ar_prior", "decoder"):
        if stage in signatures and signatures[stage] != signatures["clip"]:
            raise ValueError(
                f"{run}/{stage}.pt was trained on the embeddings of another CLIP than "
                f"{run}/clip.pt: {how_to_train_again(run, stage)}")


def check_tokenizers(run, tokenizers):
    """Raise ValueError unless all models were trained with the tokenizer of the run's CLIP.

    tokenizers: {stage: state of the tokenizer in its checkpoint, or None}.
    """
    for stage, state in tokenizers.items():
        if state is not None and state != tokenizers["clip"]:
            raise ValueError(f"{run}/{stage}.pt was trained with another tokenizer than "
                             f"{run}/clip.pt: {how_to_train_again(run, stage)}")


def check_words(run, models, tokenizer):
    """Raise ValueError unless all models read the ids of this tokenizer, in rows of one length.

    A z_img, too, must be as wide everywhere.
    """
    known = tokenizer.vocab_size, tokenizer.eot_id
    clip = models["clip"].cfg
    if (clip.vocab_size, clip.eot_id) != known:
        raise ValueError(f"{run}/clip.pt has {clip.vocab_size} ids and a tokenizer of {known[0]}: "
                         f"{how_to_train_again(run, 'clip')}")
    for stage in ("prior", "ar_prior", "decoder"):
        for key in ("clip_dim", "vocab_size", "context_length", "eot_id"):
            if stage in models and getattr(models[stage].cfg, key) != getattr(clip, key):
                raise ValueError(f"{run}/{stage}.pt has another {key} than {run}/clip.pt: "
                                 f"{how_to_train_again(run, stage)}")


def check_sides(run, models):
    """Raise ValueError unless each upsampler takes pictures of the size that comes before it."""
    side = models["decoder"].cfg.image_size
    for stage in ("upsampler1", "upsampler2"):
        if stage not in models:
            continue
        cfg = models[stage].cfg
        if cfg.low_size != side:
            raise ValueError(
                f"{run}/{stage}.pt expects {cfg.low_size} px input, but the previous stage outputs "
                f"{side} px: {how_to_train_again(run, stage)}")
        side = cfg.high_size


def load_run(run):
    """Load the models of a run folder: (tokenizer, {stage: model}). Errors: see `DALLE2.load`."""
    models = {}
    signatures = {}
    tokenizers = {}
    for stage in LOADED:
        file = run / f"{stage}.pt"
        if not file.is_file():
            if stage in OPTIONAL:
                continue
            raise FileNotFoundError(f"{run} has no {stage}.pt: {how_to_finish(run)}")
        models[stage], checkpoint = load_model(file, stage)
        signatures[stage] = checkpoint.get("clip_signature")
        tokenizers[stage] = checkpoint.get("tokenizer")
        step, steps = checkpoint["step"], checkpoint["steps"]
        if step < steps:
            warnings.warn(f"{file} is not finished: {step} of {steps} steps; go on with "
                          f"{train_command(run, resume=True)}", stacklevel=3)
        if stage == "clip":
            try:
                tokenizer = BPETokenizer.from_state_dict(checkpoint.get("tokenizer"))
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}") from None
    if "upsampler1" not in models:
        # The second upsampler needs the pictures of the first.
        models.pop("upsampler2", None)
    check_clip(run, signatures)
    check_tokenizers(run, tokenizers)
    check_words(run, models, tokenizer)
    check_sides(run, models)
    return tokenizer, models


def check_captions(captions):
    """Raise ValueError for captions (list of str) that say nothing, or that are not text."""
    if not captions:
        raise ValueError("no caption was given: give at least one")
    for caption in captions:
        text = clean(caption)
        if not text:
            raise ValueError("a caption is empty: say what the picture should show")
        # Bytes that are not text become this character.
        if "\N{REPLACEMENT CHARACTER}" in text:
            raise ValueError(f"a caption is not readable as text: {text[:40]!r}")


class DALLE2(Latents):
    """Tokenizer, CLIP, priors, decoder and up to two upsamplers, ready to sample pictures.

    With several processes (runtime/processes.py), each process samples a share of the pictures.
    `Latents` adds what starts from a picture: variations, interpolations, text diffs, inpainting.
    """

    # Pictures that the decoder samples at once. The prior samples up to SKETCHES z_img for each.
    BATCH = 64
    # With a sketch, the best of so many z_img is chosen for each picture; see `choose`.
    SKETCHES = 8
    PRIORS = ("diffusion", "ar", "z_txt", "caption")

    def __init__(self, tokenizer, models, device="cpu", dtype=None, offload=False):
        """Put built models together.

        models: {"clip", "prior", "decoder"} and, if there are any, "ar_prior", "upsampler1" and
        "upsampler2"; each a module in eval mode.
        dtype: torch.float16 or torch.bfloat16 for the matrices. Norms and diffusion itself stay in
        float32. None: float32 throughout.
        offload: keep the models on the CPU, and bring each to the device only while it works.
        """
        self.device = torch.device(device)
        self.dtype = dtype
        self.offload = offload
        # The models that `at_work` has brought to the device.
        self.here = []
        self.tokenizer = tokenizer
        self.clip = models["clip"]
        self.prior = models["prior"]
        self.ar_prior = models.get("ar_prior")
        self.decoder = models["decoder"]
        self.upsamplers = [
            models[stage] for stage in ("upsampler1", "upsampler2") if stage in models]
        self.context_length = self.decoder.cfg.context_length
        for model in (self.decoder, *self.upsamplers):
            # Convolutions are faster in this layout, on CPU and GPU.
            model.to(memory_format=torch.channels_last)
        for model in models.values():
            shorten(model, dtype)
            if not offload:
                model.to(self.device)

    @classmethod
    def load(cls, path=None, device=None, dtype=None, offload=False):
        """Load a run folder of train.py. path None: the bundled weights, see `default_run`.

        device: "cpu", "cuda", "mps", or None for the best there is. dtype, offload: see `__init__`.
        A run without trained upsamplers samples base pictures. A run may also lack the AR prior.
        Raises FileNotFoundError when the folder, or the CLIP, prior or decoder in it, is missing.
        Raises ValueError for a damaged file, and for stages that do not belong together.
        """
        run = Path(path or default_run())
        if not run.is_dir():
            raise FileNotFoundError(f"there is no run folder {run}: {how_to_begin(run)}")
        tokenizer, models = load_run(run)
        return cls(tokenizer, models, pick_device(device or "auto"), dtype, offload)

    @contextlib.contextmanager
    def at_work(self, *models):
        """Keep models on the device, at their precision, for as long as this context lasts."""
        absent = [model for model in models if self.offload and model not in self.here]
        try:
            for model in absent:
                self.here.append(model.to(self.device))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                yield
        finally:
            for model in absent:
                self.here.remove(model.cpu())

    @property
    def size(self):
        """The side of the largest pictures, in pixels."""
        return list(self.sizes.values())[-1]

    @property
    def sizes(self):
        """The side after each stage that there is: {"base": s, "up1": …, "up2": …}, in pixels."""
        sides = {"base": self.decoder.cfg.image_size}
        for i, upsampler in enumerate(self.upsamplers, start=1):
            sides[f"up{i}"] = upsampler.cfg.high_size
        return sides

    @property
    def has_sketch(self):
        """Whether a sketch of a z_img can be shown to CLIP."""
        return getattr(self.decoder, "sketch", None) is not None and self.clip.visual is not None

    # ------------------------------------------------------------------ captions

    def tokens(self, captions):
        """Turn captions (one str or a list of str) into tokens (B, L) on the device.

        Raises ValueError for an empty, unreadable or overlong caption.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        check_captions(captions)
        return self.tokenizer.tokenize(captions, self.context_length).to(self.device)

    @torch.no_grad()
    def encode_text(self, captions):
        """Embed captions (one str or a list of str): z_txt (B, D).

        z_txt has unit norm unless CLIP's `unit_norm` is off, as in Karlo.
        """
        with self.at_work(self.clip):
            return self.clip.encode_text(self.tokens(captions)).float()

    # ------------------------------------------------------------------ from captions to pictures

    def text_to_image(self, captions, n=1, seed=0, prior="diffusion", guidance=None, steps=None,
                      stage="full", progress=True, rerank=None, sketches=SKETCHES):
        """Sample n pictures for each caption: list (captions) of lists (n) of PIL images.

        seed: picture j of a caption depends only on the caption and on seed + j. Each stage has its
        own noise, so a change in one stage leaves the noise of the others as it was.
        prior: the source of z_img. "diffusion" and "ar" are the two priors. The other rows of the
        paper's Fig. 8 do without a prior: "z_txt" gives the decoder CLIP's text embedding, and
        "caption" gives it the caption alone, as in GLIDE.
        guidance, steps: of the decoder. None takes the decoder's configuration.
        stage: "base" returns the decoder's pictures, "up1" and "up2" those of an upsampler, "full"
        the largest ones. "each" returns a dict {"base", "up1", "up2"} of PIL images.
        rerank: sample this many pictures, and return the n that CLIP finds closest to the caption,
        the best first.
        sketches: sample this many z_img for each picture, and keep the one whose sketch CLIP finds
        closest to the caption; see `choose`. 1 means no choice, as does a run without a sketch.
        Raises ValueError for captions and numbers out of range.
        """
        self.check(n=n, stage=stage, guidance=guidance, steps=steps, prior=prior, sketches=sketches)
        if rerank is not None and rerank < n:
            raise ValueError(f"rerank {rerank}: to choose {n} pictures, sample at least as many")
        if rerank:
            self.require_image_encoder()
        tokens = self.tokens(captions)                                     # (K, L)
        K = len(tokens)
        each = rerank or n
        tokens = tokens.repeat_interleave(each, dim=0)                     # (K · each, L)
        seeds = [seed + j for j in range(each)] * K
        z_img = self.embed(tokens, seeds, prior, progress, sketches)       # (K · each, D)
        base = self.base(z_img, tokens, seeds, progress, guidance=guidance, steps=steps)
        if rerank:
            # The choice comes before the upsamplers, which then have less to do.
            z_txt = self.encode_text(captions).repeat_interleave(each, 0)
            cosine = self.caption_cosine(base, z_txt).view(K, each)
            first = each * torch.arange(K, device=cosine.device)[:, None]  # (K, 1)
            best = (first + cosine.topk(n).indices).flatten()              # (K · n,)
            base = base[best]
            seeds = [seeds[i] for i in best.tolist()]
        pictures = self.enlarge(base, seeds, stage, progress)
        return [pictures[i:i + n] for i in range(0, len(pictures), n)]

    def check(self, *, n=1, stage="full", guidance=None, steps=None, eta=0.0, prior="diffusion",
              sketches=1):
        """Raise ValueError for settings that this model cannot sample with."""
        stages = ("full", "each", *self.sizes)
        T = self.decoder.cfg.num_timesteps
        if n < 1:
            raise ValueError(f"{n} pictures: ask for at least one")
        if stage not in stages:
            raise ValueError(f"unknown stage '{stage}': it is one of {', '.join(stages)}")
        if prior not in self.PRIORS:
            raise ValueError(f"unknown prior '{prior}': it is one of {', '.join(self.PRIORS)}")
        if prior == "ar" and self.ar_prior is None:
            raise ValueError("these weights have no autoregressive prior: choose another prior, or "
                             "give a run of train.py one with --stage ar_prior")
        if sketches < 1:
            raise ValueError(f"{sketches} sketches to choose from: ask for at least one")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: it is a number from 0 to 1")
        if steps is not None and not 1 <= steps <= T:
            raise ValueError(f"{steps} sampling steps: the decoder takes 1 to {T}")
        if guidance is not None and not 0 <= guidance < 1e4:
            raise ValueError(f"guidance {guidance}: it is a number from 0 up, 1 for none")

    @torch.no_grad()
    def embed(self, tokens, seeds, prior="diffusion", progress=False, sketches=SKETCHES):
        """Sample z_img (B, D) for tokens (B, L) and B seeds; None for the prior "caption".

        prior, sketches: see `text_to_image`.
        """
        if prior == "caption":
            return None
        k = sketches if self.has_sketch and prior != "z_txt" else 1
        # A choice among many z_img takes fewer captions at once, for the same memory.
        at_once = max(1, self.BATCH * self.SKETCHES // max(k, self.SKETCHES))
        model = self.ar_prior if prior == "ar" else self.prior
        candidates = []
        with self.at_work(self.clip, model):
            own_tokens = own_part(tokens).split(at_once)
            own_seeds = batched(own_part(seeds), at_once)
            for part, part_seeds in zip(own_tokens, own_seeds):
                z_txt = self.clip.encode_text(part).float()                # (b, D)
                z_img = z_txt
                if prior != "z_txt":
                    z_img = model.sample(
                        part.repeat_interleave(k, 0), z_txt.repeat_interleave(k, 0),
                        generator=[seeded(seed, "prior") for seed in part_seeds],
                        progress=progress and is_main())                   # (b · k, D)
                candidates.append((z_img.unflatten(0, (-1, k)), z_txt))    # (b, k, D), (b, D)
        chosen = [torch.empty(0, self.clip.cfg.clip_dim, device=self.device)]
        for z_img, z_txt in candidates:
            chosen.append(z_img[:, 0] if k == 1 else self.choose(z_img, z_txt))
        return gather_rows(torch.cat(chosen))

    # mini: the paper keeps the better of two z_img by z_img · z_txt (§2.2; prior.py). This product
    # hardly detects wrong counts, the main error of a small prior. CLIP detects them in the
    # sketch, before the decoder runs. But best-of-8 no longer samples P(z_img | y): its variance
    # is smaller.
    def choose(self, z_img, z_txt):
        """Choose the z_img whose sketch CLIP finds closest to the caption.

        z_img (B, k, D), z_txt (B, D) -> (B, D). Of two equally close ones rounding may decide.
        """
        B, k, _ = z_img.shape
        with self.at_work(self.decoder.sketch):
            sketches = self.decoder.sketch(z_img.flatten(0, 1)).float()    # (B · k, 3, s, s)
        cosine = self.caption_cosine(sketches, z_txt.repeat_interleave(k, 0))
        best = cosine.view(B, k).argmax(dim=1)                             # (B,)
        return z_img[torch.arange(B, device=best.device), best]

    def caption_cosine(self, pictures, z_txt):
        """Return the cosine (B,) of CLIP's embeddings of pictures and captions.

        pictures (B, 3, S, S) in [-1, 1], z_txt (B, D). CLIP sees the pictures with 8 bits.
        """
        z_img = []
        for part in pictures.split(self.BATCH):
            z_img.append(self.encode_image([to_pil(picture) for picture in part]))
        return F.cosine_similarity(torch.cat(z_img), z_txt, dim=-1)

    def base(self, z_img, tokens, seeds, progress=False, x_T=None, **options):
        """Sample the decoder's pictures (B, 3, s, s) in [-1, 1].

        z_img (B, D) or None, tokens (B, L) or None, B seeds, x_T (B, 3, s, s) or None.
        options: guidance, steps, eta, known; see `Decoder.sample`.
        """
        def parts(x):
            return itertools.repeat(None) if x is None else own_part(x).split(self.BATCH)

        size = self.decoder.cfg.image_size
        sampled = [torch.empty(0, 3, size, size, device=self.device)]
        own_seeds = batched(own_part(seeds), self.BATCH)
        with self.at_work(self.clip, self.decoder):
            for part_seeds, z, y, x in zip(own_seeds, parts(z_img), parts(tokens), parts(x_T)):
                generators = [seeded(seed, "decoder") for seed in part_seeds]
                sampled.append(self.decoder.sample(
                    z, y, generator=generators, x_T=x, progress=progress and is_main(), **options))
        return gather_rows(torch.cat(sampled))

    def enlarge(self, base, seeds, stage="full", progress=False, known=None):
        """Enlarge base pictures (B, 3, s, s): list of B PIL images, or of dicts for stage "each".

        stage: see `text_to_image`. known: what must stay at each size; see `Latents.inpaint`.
        """
        pictures = []
        own_seeds = batched(own_part(seeds), self.BATCH)
        for part, part_seeds in zip(own_part(base).split(self.BATCH), own_seeds):
            images = self.upsample(part, part_seeds, stage, progress and is_main(), known)
            if stage == "each":
                for j in range(len(part)):
                    pictures.append({name: to_pil(batch[j]) for name, batch in images.items()})
            else:
                largest = list(images.values())[-1]
                pictures += [to_pil(image) for image in largest]
        return list(itertools.chain.from_iterable(collect(pictures)))

    def upsample(self, base, seeds, stage, progress, known):
        """Run the upsamplers on one batch, up to `stage`: {"base": (B, 3, s, s), "up1": …, …}.

        known(side) -> (picture, mask) or None; see `Latents.inpaint`.
        """
        images = {"base": base}
        latest = base
        for i, upsampler in enumerate(self.upsamplers, start=1):
            if stage in images:
                break
            generators = [seeded(seed, f"upsampler{i}") for seed in seeds]
            given = known(upsampler.cfg.high_size) if known else None
            with self.at_work(upsampler):
                latest = upsampler.sample(
                    latest, generator=generators, progress=progress, known=given)
            images[f"up{i}"] = latest
        if known:
            # The models end close to the known pixels, but not exactly on them: put these back.
            for name, batch in images.items():
                picture, mask = known(batch.shape[-1])
                images[name] = torch.where(mask > 0.5, batch, picture)
        return images

    def decode(self, z_img, tokens, seeds, guidance=None, steps=None, stage="full", progress=True):
        """Turn z_img (B, D), tokens (B, L) and B seeds into a list of B pictures.

        The list holds PIL images, or dicts of them; see `text_to_image` for the options.
        """
        base = self.base(z_img, tokens, seeds, progress, guidance=guidance, steps=steps)
        return self.enlarge(base, seeds, stage, progress)


def batched(items, size):
    """Cut a list into consecutive slices of at most `size` items."""
    return [items[i:i + size] for i in range(0, len(items), size)]
