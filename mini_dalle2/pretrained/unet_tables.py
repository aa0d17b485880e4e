"""Tables between Karlo's U-Nets and ours, in Karlo's own names and in those of diffusers.

References: the public code of Karlo v1.0.alpha (kakaobrain/karlo) and diffusers, for the names.
Read next: archive.py.
"""

from typing import NamedTuple

import torch

from ..unet import UNet
from .rows import by_head, joined, layer, pointwise, unsqueezed


class Place(NamedTuple):
    """Where one of our U-Net's blocks lies: our name, Karlo's two names, diffusers' two names.

    A block has a name for its residual block and one for its attention.
    """

    ours: str
    karlo_res: str
    karlo_attn: str | None
    diffusers_res: str
    diffusers_attn: str | None


def places_down(cfg):
    """Return the places of the blocks on the way down, in order."""
    found = []
    # input_blocks.0 is the first convolution.
    n = 1
    for level in range(len(cfg.channel_mult)):
        for i in range(cfg.num_res_blocks):
            found.append(Place(
                f"down.{n - 1}", f"input_blocks.{n}.0", f"input_blocks.{n}.1",
                f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}"))
            n += 1
        if level < len(cfg.channel_mult) - 1:
            found.append(Place(f"down.{n - 1}", f"input_blocks.{n}.0", None,
                               f"down_blocks.{level}.downsamplers.0", None))
            n += 1
    return found


def places_middle(cfg):
    """Return the places of the two blocks in the middle."""
    # Without attention the second residual block moves up.
    second = 2 if cfg.middle_attention else 1
    return [
        Place("middle.0", "middle_block.0", "middle_block.1", "mid_block.resnets.0",
              "mid_block.attentions.0"),
        Place("middle.1", f"middle_block.{second}", None, "mid_block.resnets.1", None)]


def places_up(cfg):
    """Return the places of the blocks on the way up, in order."""
    found = []
    ours = 0
    theirs = 0
    for step, level in enumerate(reversed(range(len(cfg.channel_mult)))):
        attended = cfg.sides[level] in cfg.attn_resolutions
        for i in range(cfg.num_res_blocks + 1):
            found.append(Place(
                f"up.{ours}", f"output_blocks.{theirs}.0", f"output_blocks.{theirs}.1",
                f"up_blocks.{step}.resnets.{i}", f"up_blocks.{step}.attentions.{i}"))
            ours += 1
            theirs += 1
        if level > 0:
            # Enlarging is part of the block before it there.
            inner = 2 if attended else 1
            found.append(Place(f"up.{ours}", f"output_blocks.{theirs - 1}.{inner}", None,
                               f"up_blocks.{step}.upsamplers.0", None))
            ours += 1
    return found


def unet_places(cfg):
    """Return where each of our U-Net's blocks lies, as a list of Place, in order."""
    return places_down(cfg) + places_middle(cfg) + places_up(cfg)


def attended_blocks(cfg):
    """Return the names of our blocks that have attention, as a set."""
    with torch.device("meta"):
        names = [name for name, _ in UNet(cfg).named_modules()]
    return {name.removesuffix(".attn.norm") for name in names if name.endswith(".attn.norm")}


def shortcuts(cfg):
    """Return the names of our blocks whose skip connection is a convolution, as a set."""
    with torch.device("meta"):
        names = [name for name, _ in UNet(cfg).named_parameters()]
    end = ".res.skip.weight"
    return {name.removesuffix(end) for name in names if name.endswith(end)}


def unet_karlo(cfg):
    """Return the table of ADM's names, which Karlo keeps."""
    rows = [
        *layer("time_embed.0", "time_embed.0"), *layer("time_embed.2", "time_embed.2"),
        *layer("in_conv", "input_blocks.0.0"), *layer("out_norm", "out.0"),
        *layer("out_conv", "out.2")]
    attended = attended_blocks(cfg)
    skips = shortcuts(cfg)
    for place in unet_places(cfg):
        name = place.ours
        res = place.karlo_res
        attn = place.karlo_attn
        rows += layer(f"{name}.res.in_norm", f"{res}.in_layers.0")
        rows += layer(f"{name}.res.in_conv", f"{res}.in_layers.2")
        rows += layer(f"{name}.res.emb_proj", f"{res}.emb_layers.1")
        rows += layer(f"{name}.res.out_norm", f"{res}.out_layers.0")
        rows += layer(f"{name}.res.out_conv", f"{res}.out_layers.3")
        if name in skips:
            rows += layer(f"{name}.res.skip", f"{res}.skip_connection")
        if name in attended:
            rows += layer(f"{name}.attn.norm", f"{attn}.norm")
            rows += pointwise(f"{name}.attn.proj", f"{attn}.proj_out")
            for kind, parts in (("qkv", 3), ("encoder_kv", 2)):
                weight, bias = by_head(
                    f"{name}.attn.{kind}", f"{attn}.{kind}", parts, cfg.head_dim)
                rows += [unsqueezed(weight, -1), bias]
    return rows


def unet_diffusers(cfg):
    """Return the table of diffusers' UNet2DModel and UNet2DConditionModel."""
    rows = [
        *layer("time_embed.0", "time_embedding.linear_1"),
        *layer("time_embed.2", "time_embedding.linear_2"), *layer("in_conv", "conv_in"),
        *layer("out_norm", "conv_norm_out"), *layer("out_conv", "conv_out")]
    attended = attended_blocks(cfg)
    skips = shortcuts(cfg)
    for place in unet_places(cfg):
        name = place.ours
        res = place.diffusers_res
        attn = place.diffusers_attn
        rows += layer(f"{name}.res.in_norm", f"{res}.norm1")
        rows += layer(f"{name}.res.in_conv", f"{res}.conv1")
        rows += layer(f"{name}.res.emb_proj", f"{res}.time_emb_proj")
        rows += layer(f"{name}.res.out_norm", f"{res}.norm2")
        rows += layer(f"{name}.res.out_conv", f"{res}.conv2")
        if name in skips:
            rows += layer(f"{name}.res.skip", f"{res}.conv_shortcut")
        if name in attended:
            rows += layer(f"{name}.attn.norm", f"{attn}.group_norm")
            rows += layer(f"{name}.attn.proj", f"{attn}.to_out.0")
            rows += joined(f"{name}.attn.qkv", [f"{attn}.to_{x}" for x in "qkv"])
            rows += joined(f"{name}.attn.encoder_kv", [f"{attn}.add_{x}_proj" for x in "kv"])
    return rows
