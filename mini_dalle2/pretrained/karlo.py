"""Karlo, a public unCLIP that draws pixels as the paper's does: its sizes, how it is loaded.

    load_karlo(folder) -> DALLE2        64 → 256, from the original files or the diffusers layout

karlo_models.py says where Karlo differs from the paper, tables.py how its weights become ours.
Other public unCLIPs (Stable unCLIP, Kandinsky) decode into the latent space of another network, and
are refused by their names.
References: kakaobrain/karlo v1.0.alpha and its model card. Read next: ship.py.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ..configs import no_sketch, paper, preset
from ..pipeline import DALLE2
from ..runtime.checks import brief
from ..runtime.device import pick_device
from ..runtime.files import is_sound
from .archive import read_weights, state_dict, without_buffers
from .beside import OPENAI_MEAN, OPENAI_STD, check_stated, described, end_of_text, pixels, read
from .karlo_models import (
    KarloCLIP, KarloCLIPConfig, KarloDecoder, KarloDecoderConfig, KarloPrior, KarloPriorConfig,
    KarloUpsampler, KarloUpsamplerConfig, lend_clip)
from .pieces import find, part
from .rows import fill
from .tables import (
    clip_hf, clip_openai, decoder_diffusers, decoder_karlo, prior_diffusers, prior_karlo,
    upsampler_diffusers, upsampler_karlo)
from .vocabulary import load_tokenizer

KARLO_FILES = {
    "clip": "ViT-L-14.pt", "stats": "ViT-L-14_stats.th",
    "prior": "prior-ckpt-step=01000000-of-01000000.ckpt",
    "decoder": "decoder-ckpt-step=01000000-of-01000000.ckpt",
    "upsampler1": "improved-sr-ckpt-step=1.2M.ckpt"}

# What the shapes of Karlo's U-Nets do not say, as diffusers' configurations have it.
UNET_SAYS = {"norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu", "flip_sin_to_cos": True,
             "freq_shift": 0, "center_input_sample": False, "mid_block_scale_factor": 1}


def sizes():
    """Return the Config of Karlo v1.0.alpha: its sizes, and its published training.

    What is not published is the paper's. Karlo has one upsampler; the second is the paper's.
    """
    own = paper()
    text = dict(clip_dim=768, vocab_size=49408, context_length=77, eot_id=49407)
    unet = dict(model_channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
    clip = KarloCLIPConfig(
        image_size=224, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
        text_width=768, text_layers=12, text_heads=12, image_mean=OPENAI_MEAN,
        image_std=OPENAI_STD, **text)
    prior = KarloPriorConfig(
        width=2048, layers=20, heads=32, text_drop=0.2, sampling_steps=25, guidance=4.0,
        frozen_text=768, **text)
    decoder = KarloDecoderConfig(
        image_size=64, attn_resolutions=(32, 16, 8), head_dim=64, dropout=0.1, text_width=1536,
        frozen_text=768, caption_drop=0.3, sampling_steps=50, guidance=8.0, **unet, **text)
    upsampler1 = KarloUpsamplerConfig(
        low_size=64, high_size=256, norm_groups=32, sampling_steps=7, **unet)
    return replace(
        own, preset="karlo",
        clip=replace(own.clip, model=clip),
        prior=replace(own.prior, model=prior),
        ar_prior=replace(own.ar_prior, model=replace(own.ar_prior.model, **text)),
        sketch=no_sketch(clip_dim=768, image_size=64),
        decoder=replace(own.decoder, model=decoder),
        upsampler1=replace(own.upsampler1, model=upsampler1))


class Original:
    """A folder with Karlo's original files."""

    def __init__(self, folder):
        self.folder = folder

    def weights(self, name):
        """Return one file's tensors {name: tensor}, and where they come from."""
        path = find(self.folder, KARLO_FILES[name])
        return without_buffers(state_dict(path)), str(path)

    def clip(self, cfg, dtype):
        """Return CLIP."""
        return fill(KarloCLIP(cfg), clip_openai(cfg), *self.weights("clip"), dtype)

    def prior(self, cfg, dtype):
        """Return the prior, the mean and spread of z_img, and where these come from."""
        theirs, what = self.weights("prior")
        stats = read_weights(find(self.folder, KARLO_FILES["stats"]))
        return fill(KarloPrior(cfg), prior_karlo(cfg), theirs, what, dtype), stats, what

    def decoder(self, cfg, dtype):
        """Return the decoder."""
        return fill(KarloDecoder(cfg), decoder_karlo(cfg), *self.weights("decoder"), dtype)

    def upsampler(self, cfg, dtype):
        """Return the upsampler."""
        return fill(KarloUpsampler(cfg), upsampler_karlo(cfg), *self.weights("upsampler1"), dtype)


class Diffusers:
    """A folder in the layout of diffusers, with one folder per model."""

    def __init__(self, folder):
        self.folder = folder

    def weights(self, *names):
        """Return the tensors of several folders, each with its prefix, and where they come from."""
        theirs = {f"{name}.{key}": value for name in names
                  for key, value in part(self.folder / name).items()}
        return theirs, f"{self.folder}/{' and '.join(names)}"

    def clip(self, cfg, dtype):
        """Return CLIP from `text_encoder` and `image_encoder`; without the latter, half of it."""
        theirs = part(self.folder / "text_encoder")
        what = f"{self.folder}/text_encoder"
        sees = (self.folder / "image_encoder").is_dir()
        if sees:
            theirs |= part(self.folder / "image_encoder")
            what += " and image_encoder"
        theirs = without_buffers(theirs)
        # Not in these files. In OpenAI's models it always ended at the bound.
        theirs["logit_scale"] = torch.tensor(KarloCLIP.MAX_LOG_SCALE)
        clip = KarloCLIP(self.told_clip(cfg, theirs, sees))
        rows = clip_hf(cfg)
        if not sees:
            clip.visual = None
            rows = [row for row in rows if not row.ours[0].startswith("visual.")]
        return fill(clip, rows, theirs, what, dtype)

    def told_clip(self, cfg, theirs, sees):
        """Compare CLIP's configuration with those of the files. Returns it, with their vocabulary.

        Tokens that somebody added make the vocabulary longer.
        """
        tokens = theirs.get("text_model.embeddings.token_embedding.weight")
        if tokens is not None and tokens.dim() == 2:
            cfg = replace(cfg, vocab_size=max(len(tokens), cfg.vocab_size))
        for name in ("text_encoder", "image_encoder")[:1 + sees]:
            told = described(self.folder / name, False, vars(cfg))
            if told is None:
                continue
            found = (told.activation, told.layer_norm_eps, told.vision_heads or cfg.vision_heads,
                     told.text_heads or cfg.text_heads, end_of_text(told.eot_id, cfg.vocab_size))
            wanted = ("quick_gelu", 1e-5, cfg.vision_heads, cfg.text_heads, cfg.eot_id)
            if found != wanted:
                raise ValueError(f"{self.folder / name} has another CLIP than Karlo's (activation, "
                                 f"epsilon, heads, end-of-text: {', '.join(map(brief, found))}, "
                                 f"not {', '.join(map(brief, wanted))}): use Karlo's own")
        if sees and (self.folder / "feature_extractor").is_dir():
            mean, std = pixels(self.folder / "feature_extractor", False)
            cfg = replace(cfg, image_mean=mean, image_std=std)
        return cfg

    def prior(self, cfg, dtype):
        """Return the prior, the mean and spread of z_img, and where these come from."""
        check_stated(self.folder / "prior/config.json", {
            "num_attention_heads": cfg.heads, "added_emb_type": "prd", "time_embed_act_fn": "silu"})
        theirs = part(self.folder / "prior")
        what = f"{self.folder}/prior"
        stats = theirs.pop("clip_mean", None), theirs.pop("clip_std", None)
        return fill(KarloPrior(cfg), prior_diffusers(cfg), theirs, what, dtype), stats, what

    def decoder(self, cfg, dtype):
        """Return the decoder."""
        check_stated(self.folder / "decoder/config.json", UNET_SAYS | {
            "attention_head_dim": cfg.head_dim, "resnet_time_scale_shift": "scale_shift"})
        theirs, what = self.weights("text_proj", "decoder")
        return fill(KarloDecoder(cfg), decoder_diffusers(cfg), theirs, what, dtype)

    def upsampler(self, cfg, dtype):
        """Return the upsampler."""
        for name in ("super_res_first", "super_res_last"):
            check_stated(self.folder / name / "config.json",
                         UNET_SAYS | {"resnet_time_scale_shift": "default"})
        theirs, what = self.weights("super_res_first", "super_res_last")
        return fill(KarloUpsampler(cfg), upsampler_diffusers(cfg), theirs, what, dtype)


def load_karlo(folder, device=None, config=None, dtype=None, offload=False):
    """Load Karlo v1.0.alpha, which samples at 64 → 256.

    folder: its original files, or the diffusers layout. It must also hold CLIP's merges file,
    `bpe_simple_vocab_16e6.txt.gz`; the diffusers layout has a folder `tokenizer`. config: other
    sizes than the preset's. dtype, offload: see DALLE2. Raises FileNotFoundError naming what is
    missing, ValueError for what cannot be used.
    """
    folder = Path(folder)
    config = config or preset("karlo")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    check_pipeline(folder)
    tokenizer = load_tokenizer(folder)
    files = Diffusers(folder) if (folder / "prior").is_dir() else Original(folder)
    # One after the other, each in its precision before the next is read: all at once would take
    # 25 GB.
    clip = files.clip(config.clip.model, dtype)
    prior, stats, what = files.prior(config.prior.model, dtype)
    standardise(prior, stats, what)
    decoder = files.decoder(config.decoder.model, dtype)
    upsampler = files.upsampler(config.upsampler1.model, dtype)
    lend_clip(clip, prior, decoder)
    models = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler1": upsampler}
    return DALLE2(tokenizer, models, pick_device(device or "auto"), dtype=dtype, offload=offload)


def check_pipeline(folder):
    """Raise ValueError for a folder of diffusers that holds another pipeline than Karlo's.

    model_index.json names the pipeline, and the library that has each class. That library's name
    for `text_proj` has changed; ours needs no name.
    """
    path = folder / "model_index.json"
    name = read(path).get("_class_name", "UnCLIPPipeline") if path.is_file() else None
    variations = name == "UnCLIPImageVariationPipeline" or (
        name is None and (folder / "image_encoder").is_dir())
    if variations and not (folder / "prior").is_dir():
        raise ValueError(f"{folder} is Karlo for image variations, which has no prior: copy the "
                         f"folder prior of Karlo for captions (karlo-v1-alpha) into it")
    if name not in (None, "UnCLIPPipeline", "UnCLIPImageVariationPipeline"):
        raise ValueError(f"{folder} holds the pipeline {brief(name)}, which is another system than "
                         f"Karlo: use a folder of UnCLIPPipeline")


def standardise(prior, stats, what):
    """Put the mean and spread of CLIP's embeddings into the prior. Raises ValueError."""
    D = prior.cfg.clip_dim
    pair = isinstance(stats, (tuple, list)) and len(stats) == 2
    if not pair or any(not torch.is_tensor(x) or x.numel() != D or not is_sound(x) for x in stats):
        raise ValueError(f"{what}: the mean and spread of CLIP's embeddings, twice {D} numbers, do "
                         f"not come with it: copy {KARLO_FILES['stats']} beside it")
    mean, std = (x.flatten().float() for x in stats)
    prior.whitening.set(mean, std)
