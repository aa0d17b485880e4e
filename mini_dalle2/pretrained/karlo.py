"""Karlo, the one unCLIP whose weights everybody may have, in our modules.

Read next: tables.py.
"""

from pathlib import Path

import torch

from ..clip import CLIP
from ..configs import preset
from ..decoder import Decoder
from ..pipeline import DALLE2
from ..prior import DiffusionPrior
from ..runtime.device import pick_device
from ..tokenizer import BPETokenizer
from ..upsampler import Upsampler
from .archive import NOT_WEIGHTS, find, part, read_weights, state_dict
from .tables import (
    clip_hf, clip_openai, decoder_diffusers, decoder_karlo, fill, prior_diffusers, prior_karlo,
    upsampler_diffusers, upsampler_karlo)


MERGES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "tokenizer/merges.txt", "merges.txt")
KARLO_FILES = {"clip": "ViT-L-14.pt", "stats": "ViT-L-14_stats.th", "prior": "prior-ckpt-step=01000000-of-01000000.ckpt",
               "decoder": "decoder-ckpt-step=01000000-of-01000000.ckpt", "upsampler1": "improved-sr-ckpt-step=1.2M.ckpt"}


def text_half(folder, cfg, dtype):
    """CLIP from `text_encoder` and, if it is there, `image_encoder` of the diffusers layout. Without the latter it has no eyes."""
    theirs, what = part(folder / "text_encoder"), f"{folder}/text_encoder"
    sees = (folder / "image_encoder").is_dir()
    if sees:
        theirs, what = theirs | part(folder / "image_encoder"), f"{what} and image_encoder"
    theirs = {name: value for name, value in theirs.items() if name not in NOT_WEIGHTS}
    theirs["logit_scale"] = torch.tensor(CLIP.MAX_LOG_SCALE)               # not in these files; OpenAI's all ended at the bound
    clip = CLIP(cfg)
    rows = [row for row in clip_hf(cfg) if sees or not row.ours[0].startswith("visual.")]
    if not sees:
        clip.visual = None
    return fill(clip, rows, theirs, what, dtype)


def load_karlo(folder, device=None, config=None, dtype=None, offload=False):
    """Karlo v1.0.alpha, ready to draw at 64 → 256, from a folder with its original files or in the diffusers layout.

    It must also hold CLIP's merges file (`bpe_simple_vocab_16e6.txt.gz`; the diffusers layout has `tokenizer/merges.txt`). config: other
    sizes than the preset's; dtype, offload: see DALLE2. Raises FileNotFoundError naming what is missing, ValueError for what cannot be used.
    """
    folder, config = Path(folder), config or preset("karlo")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    tokenizer = BPETokenizer.from_clip_merges(find(folder, *MERGES))
    diffusers = (folder / "prior").is_dir()

    def original(name):                                                    # -> their weights, and where they come from
        path = find(folder, KARLO_FILES[name])
        return {key: value for key, value in state_dict(path).items() if key not in NOT_WEIGHTS}, str(path)

    def parts(*names):
        return ({f"{name}.{key}": value for name in names for key, value in part(folder / name).items()}, f"{folder}/{' and '.join(names)}")

    # One after the other, each in its precision before the next is read: all of them at once would take 25 GB.
    sizes = config.clip.model
    clip = text_half(folder, sizes, dtype) if diffusers else fill(CLIP(sizes), clip_openai(sizes), *original("clip"), dtype)
    sizes = config.prior.model
    if diffusers:
        theirs, what = part(folder / "prior"), f"{folder}/prior"
        stats = theirs.pop("clip_mean", None), theirs.pop("clip_std", None)
    else:
        theirs, what = original("prior")
        stats = read_weights(find(folder, KARLO_FILES["stats"]))
    prior = fill(DiffusionPrior(sizes), (prior_diffusers if diffusers else prior_karlo)(sizes), theirs, what, dtype)
    if not isinstance(stats, (tuple, list)) or [torch.is_tensor(x) and x.numel() for x in stats] != [sizes.clip_dim] * 2:
        raise ValueError(f"{what}: the mean and spread of CLIP's embeddings, twice {sizes.clip_dim} numbers, do not come with it")
    prior.whitening.set(*(x.flatten().float() for x in stats))
    sizes = config.decoder.model
    decoder = fill(Decoder(sizes), (decoder_diffusers if diffusers else decoder_karlo)(sizes),
                   *(parts("text_proj", "decoder") if diffusers else original("decoder")), dtype)
    sizes = config.upsampler1.model
    upsampler = fill(Upsampler(sizes), (upsampler_diffusers if diffusers else upsampler_karlo)(sizes),
                     *(parts("super_res_first", "super_res_last") if diffusers else original("upsampler1")), dtype)
    for model in (prior, decoder):
        # A function: CLIP does not become a part of them.
        model.caption.encoder = clip.read
    models = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler1": upsampler}
    return DALLE2(tokenizer, models, pick_device(device or "auto"), dtype=dtype, offload=offload)
