"""Public models with small random weights, as the libraries that own them build them."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import CLIPConfig as TheirCLIPConfig
from transformers import CLIPModel

from mini_dalle2 import configs

MERGES = Path(importlib.util.find_spec("clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
VOCAB, EOT, L, D = 49408, 49407, 77, 24


def small_karlo():
    """The preset `karlo`, an eighth as wide or less: same structure, all its peculiarities."""
    config, shared = configs.preset("karlo"), dict(clip_dim=D)
    unet = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=2)
    return replace(
        config,
        clip=replace(config.clip, model=replace(config.clip.model, image_size=32, patch_size=8, vision_width=128, vision_layers=2, vision_heads=2,
                                                text_width=64, text_layers=2, text_heads=1, **shared)),
        prior=replace(config.prior, model=replace(config.prior.model, width=128, layers=2, heads=2, frozen_text=64, sampling_steps=5, **shared)),
        ar_prior=replace(config.ar_prior, model=replace(config.ar_prior.model, **shared)),
        sketch=replace(config.sketch, model=replace(config.sketch.model, image_size=16, clip_dim=D)),
        decoder=replace(config.decoder, model=replace(config.decoder.model, image_size=16, attn_resolutions=(8,), head_dim=16, text_width=48,
                                                      frozen_text=64, sampling_steps=4, dropout=0.0, **unet, **shared)),
        upsampler1=replace(config.upsampler1, model=replace(config.upsampler1.model, low_size=16, high_size=64, sampling_steps=3, **unet)),
        upsampler2=replace(config.upsampler2, model=replace(config.upsampler2.model, low_size=64, high_size=256)))


def random_weights(model, seed=0):
    """Fills a module with numbers large enough for each to matter (no zero layers, no gains of one), small enough to keep rounding small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.1 if p.dim() < 2 else p[0].numel() ** -0.5
            p.copy_(spread * torch.randn(p.shape, generator=generator) + (0.8 if p.dim() == 1 and name.endswith("weight") else 0.0))
    return model.eval()


def their_clip():
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256, vocab_size=VOCAB, projection_dim=D,
                max_position_embeddings=L, eos_token_id=EOT, bos_token_id=EOT - 1, pad_token_id=0, hidden_act="quick_gelu")
    vision = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, image_size=32, patch_size=8,
                  projection_dim=D, hidden_act="quick_gelu")
    return random_weights(CLIPModel(TheirCLIPConfig(text_config=text, vision_config=vision, projection_dim=D)))


def their_prior(seed=1):
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=64, num_layers=2, embedding_dim=D, num_embeddings=L, additional_embeddings=4)
    # Karlo's states are as wide as its embeddings (768); where they differ, as in these small ones, this layer takes other states.
    prior.encoder_hidden_states_proj = torch.nn.Linear(64, 128)
    random_weights(prior, seed)
    with torch.no_grad():
        prior.clip_std.copy_(prior.clip_std.abs() + 0.1)
    return prior


def their_text_proj(seed=2):
    projection = UnCLIPTextProjModel(clip_embeddings_dim=D, time_embed_dim=128, cross_attention_dim=48)
    projection.encoder_hidden_states_proj = torch.nn.Linear(64, 48)
    return random_weights(projection, seed)


def their_decoder(seed=3):
    return random_weights(UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=48, attention_head_dim=16, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity", norm_num_groups=32), seed)


def their_upsampler(seed=4):
    return random_weights(UNet2DModel(
        sample_size=64, in_channels=6, out_channels=3, down_block_types=("ResnetDownsampleBlock2D",) * 2, add_attention=False,
        up_block_types=("ResnetUpsampleBlock2D",) * 2, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=32), seed)


def tokens_for(n, seed=0):
    """Random captions of different lengths, (n, L), as CLIP's tokenizer lays them out."""
    rows = torch.zeros(n, L, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for i, row in enumerate(rows):
        length = 3 + 7 * i
        row[1:1 + length] = torch.randint(1, EOT - 1, (length,), generator=generator)
        row[0], row[1 + length] = EOT - 1, EOT
    return rows


def close(ours, theirs, tolerance=1e-5):
    """The largest difference, relative to the scale of theirs, is within the tolerance; and theirs is no constant."""
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, error
    return True
