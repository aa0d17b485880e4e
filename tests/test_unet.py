"""unet.py against diffusers' U-Nets with the same weights, the formulas written out, and the parameter counts of published models."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel

from mini_dalle2.transformer import attention_by_hand
from mini_dalle2.unet import AttentionBlock, ResBlock, UNet, UNetConfig, downsample, upsample

TINY = UNetConfig(image_size=16, out_channels=6, model_channels=8, channel_mult=(1, 2, 3), num_res_blocks=2, attn_resolutions=(8, 4),
                  head_dim=4, context_dim=10, norm_groups=4)
BARE = replace(TINY, attn_resolutions=(), middle_attention=False, context_dim=None)
PAPER_UP2 = UNetConfig(image_size=1024, in_channels=6, out_channels=6, model_channels=192, channel_mult=(1, 1, 2, 2, 4, 4),
                       num_res_blocks=2, attn_resolutions=(), middle_attention=False)
PAPER_UP1 = replace(PAPER_UP2, image_size=256, model_channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
ADM_64 = UNetConfig(image_size=64, out_channels=6, model_channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3,
                    attn_resolutions=(32, 16, 8))


def lively(module, seed=0):
    """The module with every parameter random, so that no zero at initialisation hides a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.dim() == 1 else p[0].numel() ** -0.5))
    return module


def inputs(cfg, batch=2, size=None):
    """x, t, emb and context for a U-Net of this shape."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    size = size or cfg.image_size
    context = draw(batch, 5, cfg.context_dim) if cfg.context_dim else None
    return draw(batch, cfg.in_channels, size, size), torch.tensor([3, 900])[:batch], draw(batch, 4 * cfg.model_channels), context


# ---------------------------------------------------------------------- the same numbers as diffusers' U-Nets

def names_in_diffusers(model):
    """Pairs (our submodule, its name in diffusers); attention is listed apart because diffusers keeps q, k and v apart."""
    plain, attention = [(model.in_conv, "conv_in"), (model.time_embed[0], "time_embedding.linear_1"), (model.out_norm, "conv_norm_out"),
                        (model.time_embed[2], "time_embedding.linear_2"), (model.out_conv, "conv_out")], []

    def add(stage, block, i, scaled=None):
        name = f"{block}.{scaled}.0" if scaled else f"{block}.resnets.{i}"
        res = stage.res
        plain.extend([(res.in_norm, f"{name}.norm1"), (res.in_conv, f"{name}.conv1"), (res.emb_proj, f"{name}.time_emb_proj"),
                      (res.out_norm, f"{name}.norm2"), (res.out_conv, f"{name}.conv2"), (res.skip, f"{name}.conv_shortcut")])
        if stage.attn is not None:
            attention.append((stage.attn, f"{block}.attentions.{i}"))

    levels, n = len(model.cfg.channel_mult), model.cfg.num_res_blocks
    down, up = iter(model.down), iter(model.up)
    for level in range(levels):
        for i in range(n):
            add(next(down), f"down_blocks.{level}", i)
        if level < levels - 1:
            add(next(down), f"down_blocks.{level}", 0, "downsamplers")
    for i, stage in enumerate(model.middle):
        add(stage, "mid_block", i)
    for level in range(levels):
        for i in range(n + 1):
            add(next(up), f"up_blocks.{level}", i)
        if level < levels - 1:
            add(next(up), f"up_blocks.{level}", 0, "upsamplers")
    assert next(down, None) is None and next(up, None) is None
    return plain, attention


def copy_weights(ours, theirs):
    """Every parameter of ours into theirs; fails when one of theirs is left over."""
    plain, attention = names_in_diffusers(ours)
    state = {}
    for module, name in plain:
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    for module, name in attention:
        state |= {f"{name}.group_norm.{key}": value for key, value in module.norm.state_dict().items()}
        state |= {f"{name}.to_out.0.{key}": value for key, value in module.proj.state_dict().items()}
        for key in ("weight", "bias"):
            parts = zip(("to_q", "to_k", "to_v"), module.qkv.state_dict()[key].chunk(3))
            extra = zip(("add_k_proj", "add_v_proj"), module.encoder_kv.state_dict()[key].chunk(2))
            state |= {f"{name}.{part}.{key}": value for part, value in [*parts, *extra]}
    theirs.load_state_dict(state, strict=True)


def test_decoders_unet_is_diffusers_conditional_unet():
    ours = lively(UNet(TINY))
    theirs = UNet2DConditionModel(
        in_channels=3, out_channels=6, block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=10, class_embed_type="identity", resnet_time_scale_shift="scale_shift",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"))
    copy_weights(ours, theirs)
    x, t, emb, context = inputs(TINY)
    expected = theirs(x, t, encoder_hidden_states=context, class_labels=emb).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, emb, context), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_adagn", [True, False])
def test_upsamplers_unet_is_diffusers_plain_unet(use_adagn):
    cfg = replace(BARE, in_channels=6, use_adagn=use_adagn)
    ours = lively(UNet(cfg))
    theirs = UNet2DModel(
        sample_size=16, in_channels=6, out_channels=6, block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=4, norm_eps=1e-5,
        add_attention=False, resnet_time_scale_shift="scale_shift" if use_adagn else "default",
        down_block_types=("ResnetDownsampleBlock2D",) * 3, up_block_types=("ResnetUpsampleBlock2D",) * 3, flip_sin_to_cos=True,
        freq_shift=0)
    copy_weights(ours, theirs)
    x, t, _, _ = inputs(cfg)
    torch.testing.assert_close(ours(x, t), theirs(x, t).sample, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- parameter counts, on the meta device

def count(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(cfg).parameters())


def test_parameter_counts_of_published_models():
    karlo = replace(ADM_64, model_channels=320, context_dim=1536)
    karlo_up = replace(PAPER_UP1, out_channels=3, use_adagn=False)
    assert count(karlo) == 885_439_686 and count(karlo_up) == 691_579_523  # the public weights' own tensors, summed
    # ADM's two models have a class embedding of 1000 · 768 numbers more, which we have no use for.
    assert count(ADM_64) + 768_000 == 295_904_454                          # "296M"
    adm_up = replace(PAPER_UP2, image_size=256, attn_resolutions=(32, 16, 8), middle_attention=True)
    assert count(adm_up) + 768_000 == 311_795_910                          # "312M"


def test_parameter_counts_of_the_papers_table():
    assert round(count(replace(ADM_64, model_channels=512, context_dim=2048)) / 1e6) == 2238
    assert round(count(PAPER_UP1) / 1e6) == 730 and round(count(PAPER_UP2) / 1e6) == 282              # "700M", "300M"
    assert round(count(replace(PAPER_UP1, middle_attention=True)) / 1e6) == 736
    assert round(count(replace(PAPER_UP2, use_adagn=False)) / 1e6) == 267


# ---------------------------------------------------------------------- the parts, written out

@pytest.mark.parametrize("resample", [None, downsample, upsample], ids=["same", "down", "up"])
@pytest.mark.parametrize("use_adagn", [True, False])
def test_residual_block_is_adms_formula(resample, use_adagn):
    block = lively(ResBlock(replace(TINY, use_adagn=use_adagn), 8, 12, resample))
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 32)
    move = {None: lambda y: y, downsample: lambda y: y.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)),
            upsample: lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3)}[resample]
    conv = lambda layer, y: F.conv2d(y, layer.weight, layer.bias, padding=layer.padding)
    norm = lambda layer, y: F.group_norm(y, 4, layer.weight, layer.bias)
    h = conv(block.in_conv, move(F.silu(norm(block.in_norm, x))))
    e = F.linear(F.silu(emb), block.emb_proj.weight, block.emb_proj.bias)[:, :, None, None]
    h = norm(block.out_norm, h) * (1 + e[:, :12]) + e[:, 12:] if use_adagn else norm(block.out_norm, h + e)
    expected = conv(block.skip, move(x)) + conv(block.out_conv, F.silu(h))
    torch.testing.assert_close(block(x, emb), expected, atol=1e-5, rtol=1e-5)


def test_attention_puts_context_before_the_image_in_one_softmax():
    block = lively(AttentionBlock(TINY, 8))                                # two heads of four
    x, context = torch.randn(2, 8, 3, 2), torch.randn(2, 5, 10)
    h = F.group_norm(x, 4, block.norm.weight, block.norm.bias)
    pixels = torch.stack([h[:, :, i, j] for i in range(3) for j in range(2)], dim=1)                      # (B, 6, C)
    q, k, v = block.qkv(pixels).split(8, dim=-1)
    k_context, v_context = block.encoder_kv(context).split(8, dim=-1)
    k, v = torch.cat([k_context, k], 1), torch.cat([v_context, v], 1)      # (B, 5 + 6, C)
    heads = [attention_by_hand(q[:, None, :, s], k[:, None, :, s], v[:, None, :, s])[:, 0] for s in (slice(0, 4), slice(4, 8))]
    out = block.proj(torch.cat(heads, dim=-1))
    expected = x + torch.stack([out[:, 2 * i:2 * i + 2] for i in range(3)], dim=1).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x, context), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch_size, image_size", [(1, 16), (2, 32)])
def test_attention_sits_at_the_named_resolutions(patch_size, image_size):
    cfg = replace(TINY, image_size=image_size, patch_size=patch_size, attn_resolutions=(8,))
    model, sides = UNet(cfg), []
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(lambda block, args, out: sides.append(args[0].shape[-1]))
    model(*inputs(cfg))
    assert sides == [8, 8, 4, 8, 8, 8]                                     # two on the way down, the middle (4), three on the way up


def test_attention_needs_whole_heads():
    with pytest.raises(ValueError, match="head_dim"):
        replace(TINY, head_dim=16)


# ---------------------------------------------------------------------- the whole

def test_output_is_zero_at_initialisation_and_blocks_are_identities():
    torch.manual_seed(0)
    model = UNet(TINY)
    assert torch.all(model(*inputs(TINY)) == 0)
    x, _, emb, context = inputs(TINY)
    assert torch.equal(model.down[0](x.repeat(1, 3, 1, 1)[:, :8], emb, context), x.repeat(1, 3, 1, 1)[:, :8])
    deep = torch.randn(2, 24, 4, 4)
    assert torch.equal(model.middle[0](deep, emb, context), deep)          # attention too


def test_every_parameter_and_every_input_counts():
    model = lively(UNet(TINY))
    x, t, emb, context = inputs(TINY)
    emb.requires_grad_(), context.requires_grad_(), x.requires_grad_()
    model(x, t, emb, context).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert (context.grad.abs().amax(-1) > 0).all() and (emb.grad.abs() > 0).all() and (x.grad.abs() > 0).all()
    with torch.no_grad():
        assert (model(x, t + 50, emb, context) - model(x, t, emb, context)).abs().amax((1, 2, 3)).min() > 1e-3


def test_emb_is_added_to_the_time_embedding():
    model = lively(UNet(TINY))
    x, t, emb, context = inputs(TINY)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, None, context), model(x, t, torch.zeros_like(emb), context))
        expected = model(x, t, emb, context)
        model.time_embed[2].bias += emb[0]
        torch.testing.assert_close(model(x, t, emb - emb[0], context), expected, atol=1e-4, rtol=1e-4)


def test_examples_do_not_touch_each_other_and_memory_layout_does_not_matter():
    model = lively(UNet(TINY))
    x, t, emb, context = inputs(TINY)
    with torch.no_grad():
        both = model(x, t, emb, context)
        torch.testing.assert_close(model(x[1:], t[1:], emb[1:], context[1:]), both[1:], atol=1e-4, rtol=1e-4)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, emb, context)
        torch.testing.assert_close(last, both, atol=1e-4, rtol=1e-4)


def test_without_attention_it_runs_at_any_size():
    model = lively(UNet(replace(BARE, norm_groups=1, channel_mult=(1, 2), num_res_blocks=1)))
    for side, other in ((16, 16), (32, 24), (8, 48)):
        x = torch.randn(1, 3, side, other)
        assert model(x, torch.tensor([5])).shape == (1, 6, side, other)


def test_patches_are_folded_into_channels():
    torch.manual_seed(0)
    folded = lively(UNet(replace(TINY, image_size=32, patch_size=2)))
    plain = UNet(replace(TINY, in_channels=12, out_channels=24))
    plain.load_state_dict(folded.state_dict())
    x, t, emb, context = inputs(TINY, size=32)
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t, emb, context), 2)
    torch.testing.assert_close(folded(x, t, emb, context), expected)


def test_position_embedding_is_added_after_the_first_convolution():
    model, plain = lively(UNet(replace(TINY, position_embedding=True))), UNet(TINY)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "position"})
    assert model.position.shape == (1, 8, 16, 16)
    plain.in_conv.register_forward_hook(lambda module, args, out: out + model.position)
    torch.testing.assert_close(model(*inputs(TINY)), plain(*inputs(TINY)))
