"""The networks that peers.py compares: ours, and those of three public packages, built to the same sizes.

    contender("decoder", "diffusers", size, data, **changes) -> Contender(model, loss, sample, networks)

Each is trained and sampled from as its own users do: dalle2-pytorch through its Decoder and DiffusionPrior with their losses, diffusers by
add_noise and a mean squared error around its networks, transformers by CLIPModel's own loss. Ours is configured as the paper's: pixels,
not patches; ε predicted, with a learned variance in the decoder; captions read by a transformer of its own.

diffusers' and transformers' networks are the same as ours, layer by layer. Those of dalle2-pytorch and x-clip are built differently, so that at
equal widths and depths they have other FLOPs. `changes` lists sizes near ours, the nearest first; peers.py takes the first of these whose
training takes as many FLOPs as ours, to within 3 %.

Shapes: B batch, S side, L context length, D = clip_dim.
"""

import functools
import importlib.util
import itertools
import os
import sys
import types
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mini_dalle2.clip import CLIP, CLIPConfig
from mini_dalle2.decoder import Decoder, DecoderConfig
from mini_dalle2.prior import DiffusionPrior, PriorConfig
from mini_dalle2.transformer import Transformer
from mini_dalle2.unet import UNet
from mini_dalle2.upsampler import Upsampler, UpsamplerConfig

os.environ.setdefault("TQDM_DISABLE", "1")                                 # dalle2-pytorch's bars, which nothing else turns off
INSTALL = {"dalle2-pytorch": "pip install --no-deps dalle2-pytorch==1.15.6 x-clip==0.14.4 coca-pytorch==0.1.0 rotary-embedding-torch==0.9.1 "
                             "einops==0.8.2 kornia==0.9.0 resize-right==0.0.2", "diffusers": "pip install -r tests/requirements.txt",
           "transformers": "pip install -r tests/requirements.txt"}
GUIDANCE = 3.0


@dataclass(frozen=True)
class Size:
    """What is compared: our configurations, the examples of a training step, the pictures or captions that are sampled, the steps of that."""
    decoder: DecoderConfig
    prior: PriorConfig
    upsampler: UpsamplerConfig
    clip: CLIPConfig
    batch: dict
    drawn: dict
    steps: dict
    tolerance: float                    # between FLOPs that count as equal


TEXT = dict(vocab_size=1024, context_length=32, eot_id=1023)
SIZES = {
    "full": Size(
        DecoderConfig(image_size=64, clip_dim=512, model_channels=64, channel_mult=(1, 2, 3, 4), num_res_blocks=2, attn_resolutions=(16, 8),
                      head_dim=64, text_width=256, text_layers=2, text_heads=4, **TEXT),
        PriorConfig(clip_dim=512, width=512, layers=8, heads=8, **TEXT),
        UpsamplerConfig(low_size=64, high_size=256, model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=2, norm_groups=32),
        CLIPConfig(clip_dim=512, image_size=64, patch_size=8, vision_width=384, vision_layers=6, vision_heads=6, text_width=384, text_layers=6,
                   text_heads=6, **TEXT),
        batch={"decoder": 16, "prior": 32, "upsampler": 8, "clip": 32}, drawn={"decoder": 16, "prior": 16, "upsampler": 1, "clip": 32},
        steps={"decoder": 50, "prior": 64, "upsampler": 27, "clip": 1}, tolerance=0.03),
    "micro": Size(                                                         # to see that all runs
        DecoderConfig(image_size=16, clip_dim=64, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), head_dim=32,
                      text_width=32, text_layers=1, text_heads=1, **TEXT),
        PriorConfig(clip_dim=64, width=64, layers=2, heads=1, **TEXT),
        UpsamplerConfig(low_size=16, high_size=64, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8),
        CLIPConfig(clip_dim=64, image_size=16, patch_size=4, vision_width=64, vision_layers=2, vision_heads=1, text_width=64, text_layers=2,
                   text_heads=1, **TEXT),
        batch=dict.fromkeys(("decoder", "prior", "upsampler", "clip"), 4), drawn=dict.fromkeys(("decoder", "prior", "upsampler", "clip"), 2),
        steps={"decoder": 3, "prior": 3, "upsampler": 3, "clip": 1}, tolerance=0.05),
}


class Data:
    """Random inputs, the same for all: how long a network takes does not depend on what it sees."""

    def __init__(self, size, n, device="cpu"):
        generator = None if device == "meta" else torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device=device if device == "meta" else "cpu").to(device)

        cfg, L = size.decoder, size.decoder.context_length
        self.device = torch.device(device)
        self.images = normal(n, 3, cfg.image_size, cfg.image_size).clamp(-1, 1)            # (B, 3, S, S)
        self.crops = normal(n, 3, size.upsampler.crop_size, size.upsampler.crop_size).clamp(-1, 1)
        self.low = normal(n, 3, size.upsampler.low_size, size.upsampler.low_size).clamp(-1, 1)
        self.z_img, self.z_txt = (F.normalize(normal(n, cfg.clip_dim), dim=-1) for _ in range(2))      # (B, D)
        self.states = normal(n, L, cfg.clip_dim)                           # what a text encoder says of captions: of all but ours
        self.tokens = torch.arange(n * L, device=device).view(n, L) % (cfg.eot_id - 2) + 1             # (B, L), no two captions alike
        self.tokens[:, -1] = cfg.eot_id


@dataclass
class Contender:
    """One implementation of one model."""
    model: nn.Module
    loss: Callable                      # () -> scalar, on one batch
    sample: Callable                    # (steps) -> what it draws
    networks: tuple                     # its parts that torch.compile may compile


def last(x):
    """x (B, C, H, W) in the layout that our training has its pictures in."""
    return x.contiguous(memory_format=torch.channels_last)


def ours(model, loss, sample):
    """A Contender of ours, as stages.Job.train treats a model."""
    model.to(memory_format=torch.channels_last)
    return Contender(model, loss, sample, tuple(module for module in model.modules() if isinstance(module, (Transformer, UNet))))


def noised(scheduler, clean):
    """(noised, t, noise) of clean examples (B, ...), as diffusers' users write it."""
    noise = torch.randn_like(clean)
    t = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
    return scheduler.add_noise(clean, noise, t), t, noise


def backwards(scheduler, steps, x, predict, device):
    """diffusers' sampling loop from noise x: predict(x, t) -> what its network says of it."""
    scheduler.set_timesteps(steps, device=device)
    for i, t in enumerate(scheduler.timesteps):
        before = {"prev_timestep": scheduler.timesteps[i + 1] if i + 1 < steps else None} if type(scheduler).__name__ == "UnCLIPScheduler" else {}
        x = scheduler.step(predict(x, t), t, x, **before).prev_sample
    return x


# ---------------------------------------------------------------------------------------------------------------- decoder

def our_decoder(size, data):
    """Decoder.loss and Decoder.sample."""
    model, images = Decoder(size.decoder), last(data.images)
    return ours(model, lambda: model.loss(images, data.z_img, data.tokens),
                lambda steps: model.sample(data.z_img, data.tokens, guidance=GUIDANCE, steps=steps))


def diffusers_decoder(size, data):
    """UNet2DConditionModel as in its UnCLIP pipeline, with the module that makes its conditions."""
    from diffusers import UnCLIPScheduler, UNet2DConditionModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    cfg, sizes = size.decoder, size.decoder.unet()
    kinds = ["SimpleCrossAttn{}Block2D" if side in cfg.attn_resolutions else "Resnet{}sampleBlock2D" for side in sizes.sides]
    unet = UNet2DConditionModel(
        sample_size=cfg.image_size, in_channels=3, out_channels=6, block_out_channels=tuple(sizes.widths), layers_per_block=cfg.num_res_blocks,
        down_block_types=tuple(kind.format("Down") for kind in kinds), up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=cfg.text_width, attention_head_dim=cfg.head_dim,
        class_embed_type="identity", resnet_time_scale_shift="scale_shift", norm_num_groups=cfg.norm_groups)
    project = UnCLIPTextProjModel(clip_embeddings_dim=cfg.clip_dim, time_embed_dim=sizes.emb_dim, cross_attention_dim=cfg.text_width)
    scheduler = UnCLIPScheduler(variance_type="learned_range")

    def predict(x, t, context, emb):
        return unet(x, t, encoder_hidden_states=context, class_labels=emb).sample

    def loss():
        x_t, t, noise = noised(scheduler, data.images)
        context, emb = project(image_embeddings=data.z_img, prompt_embeds=data.z_txt, text_encoder_hidden_states=data.states,
                               do_classifier_free_guidance=False)
        return F.mse_loss(predict(x_t, t, context, emb)[:, :3].float(), noise)

    def sample(steps):
        context, emb = project(image_embeddings=data.z_img, prompt_embeds=data.z_txt.repeat(2, 1), do_classifier_free_guidance=True,
                               text_encoder_hidden_states=data.states.repeat(2, 1, 1))

        def guided(x, t):
            null, given = predict(torch.cat([x, x]), t, context, emb).chunk(2)
            (null, _), (given, variance) = null.split(3, dim=1), given.split(3, dim=1)
            return torch.cat([null + GUIDANCE * (given - null), variance], dim=1)

        return backwards(scheduler, steps, torch.randn_like(data.images), guided, data.device).clamp(-1, 1)

    return Contender(nn.ModuleList([unet, project]), loss, sample, (unet,))


def dalle2_decoder(size, data, dim=None, blocks=None):
    """Its Unet in its Decoder, which samples by DDIM in `sample_timesteps` steps."""
    theirs, cfg = dalle2_pytorch(), size.decoder
    dim = dim or cfg.model_channels
    unet = theirs.Unet(
        dim=dim, image_embed_dim=cfg.clip_dim, text_embed_dim=cfg.clip_dim, cond_dim=cfg.text_width, channels=3, dim_mults=cfg.channel_mult,
        num_resnet_blocks=blocks or cfg.num_res_blocks, self_attn=tuple(side in cfg.attn_resolutions for side in cfg.unet().sides),
        attn_dim_head=cfg.head_dim, attn_heads=dim * cfg.channel_mult[-1] // cfg.head_dim or 1, cond_on_text_encodings=True,
        cond_on_image_embeds=True, max_text_len=cfg.context_length)
    model, images = theirs.Decoder(unet=(unet,), image_size=cfg.image_size, timesteps=cfg.num_timesteps), (data.images + 1) / 2

    def sample(steps):
        model.sample_timesteps = (steps,)
        return model.sample(image_embed=data.z_img, text_encodings=data.states, cond_scale=GUIDANCE, one_unet_in_gpu_at_time=False)

    return Contender(model, lambda: model(images, image_embed=data.z_img, text_encodings=data.states), sample, tuple(model.unets))


# ---------------------------------------------------------------------------------------------------------------- prior

def our_prior(size, data):
    """DiffusionPrior.loss and DiffusionPrior.sample: the better of two."""
    model = DiffusionPrior(size.prior)
    return ours(model, lambda: model.loss(data.z_img, data.z_txt, data.tokens), lambda steps: model.sample(data.tokens, data.z_txt, steps=steps))


def better(z_img, z_txt):
    """Of two embeddings for each caption, (2 B, D), those closer to z_txt (B, D)."""
    z_img = z_img.unflatten(0, (-1, 2))                                    # (B, 2, D)
    return z_img[torch.arange(len(z_txt)), (z_img * z_txt[:, None]).sum(-1).argmax(1)]


def diffusers_prior(size, data):
    """PriorTransformer as in its UnCLIP pipeline."""
    from diffusers import PriorTransformer, UnCLIPScheduler
    cfg = size.prior
    model = PriorTransformer(num_attention_heads=cfg.heads, attention_head_dim=cfg.width // cfg.heads, num_layers=cfg.layers,
                             embedding_dim=cfg.clip_dim, num_embeddings=cfg.context_length, additional_embeddings=4)
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    seen = torch.ones(data.states.shape[:2], dtype=torch.bool, device=data.device)         # without a mask it would not be causal
    scale = cfg.clip_dim ** 0.5 * cfg.std_per_dim

    def loss():
        x_t, t, _ = noised(scheduler, data.z_img * scale)
        predicted = model(x_t, t, proj_embedding=data.z_txt, encoder_hidden_states=data.states, attention_mask=seen).predicted_image_embedding
        return F.mse_loss(predicted.float(), data.z_img * scale)

    def sample(steps):
        z_txt, states, all_seen = (x.repeat_interleave(2, dim=0) for x in (data.z_txt, data.states, seen))

        def predict(x, t):
            return model(x, t, proj_embedding=z_txt, encoder_hidden_states=states, attention_mask=all_seen).predicted_image_embedding

        return better(backwards(scheduler, steps, torch.randn_like(z_txt), predict, data.device), data.z_txt)

    return Contender(model, loss, sample, (model,))


def dalle2_prior(size, data, ff_mult=4.0):
    """Its DiffusionPriorNetwork in its DiffusionPrior, given embeddings and states."""
    theirs, cfg = dalle2_pytorch(), size.prior
    network = theirs.DiffusionPriorNetwork(dim=cfg.clip_dim, depth=cfg.layers, heads=cfg.heads, dim_head=cfg.width // cfg.heads, ff_mult=ff_mult,
                                           num_timesteps=cfg.num_timesteps, max_text_len=cfg.context_length)
    model = theirs.DiffusionPrior(network, image_embed_dim=cfg.clip_dim, cond_drop_prob=cfg.text_drop)

    def sample(steps):
        given = {"text_embed": data.z_txt.repeat_interleave(2, dim=0), "text_encodings": data.states.repeat_interleave(2, dim=0)}
        shape = given["text_embed"].shape
        return better(model.p_sample_loop(shape, text_cond=given, timesteps=steps + 1), data.z_txt)     # which looks one time less

    # A copy, because it scales what it is given in place.
    return Contender(model, lambda: model(text_embed=data.z_txt, image_embed=data.z_img.clone(), text_encodings=data.states), sample, (network,))


# ---------------------------------------------------------------------------------------------------------------- upsampler

def our_upsampler(size, data):
    """Upsampler.loss on crops, Upsampler.sample on whole pictures."""
    model, crops = Upsampler(size.upsampler), last(data.crops)
    return ours(model, lambda: model.loss(crops), lambda steps: model.sample(data.low, steps=steps))


def diffusers_upsampler(size, data):
    """UNet2DModel as in its UnCLIP pipeline, sampled by DDIM."""
    from diffusers import DDIMScheduler, UNet2DModel
    cfg, sizes = size.upsampler, size.upsampler.unet()
    levels = len(cfg.channel_mult)
    model = UNet2DModel(
        sample_size=cfg.high_size, in_channels=6, out_channels=3, block_out_channels=tuple(sizes.widths), layers_per_block=cfg.num_res_blocks,
        norm_num_groups=cfg.norm_groups, add_attention=False, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D",) * levels, up_block_types=("ResnetUpsampleBlock2D",) * levels)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")

    def resized(x, factor):
        return F.interpolate(x, scale_factor=factor, mode="bicubic", align_corners=False, antialias=True)

    def loss():
        x_t, t, noise = noised(scheduler, data.crops)
        enlarged = resized(resized(data.crops, 1 / cfg.factor), cfg.factor)
        return F.mse_loss(model(torch.cat([x_t, enlarged], dim=1), t).sample.float(), noise)

    def sample(steps):
        enlarged = resized(data.low, cfg.factor)
        return backwards(scheduler, steps, torch.randn_like(enlarged), lambda x, t: model(torch.cat([x, enlarged], dim=1), t).sample, data.device)

    return Contender(model, loss, sample, (model,))


def dalle2_upsampler(size, data, dim=None, blocks=None):
    """Its Unet as the second of a cascade in its Decoder, with nothing but the small picture to go by."""
    theirs, cfg = dalle2_pytorch(), size.upsampler
    base = theirs.Unet(dim=8, dim_mults=(1,), resnet_groups=1)             # a cascade must have a first; nobody runs it
    unet = theirs.Unet(dim=dim or cfg.model_channels, dim_mults=cfg.channel_mult, num_resnet_blocks=blocks or cfg.num_res_blocks, channels=3,
                       attend_at_middle=False)

    def cascade(unets, small, large):
        return theirs.Decoder(unet=tuple(unets), image_sizes=(small, large), unconditional=True, beta_schedule=("cosine", "cosine"),
                              timesteps=cfg.num_timesteps)

    model, crops, low = cascade((base, unet), cfg.crop_size // cfg.factor, cfg.crop_size), (data.crops + 1) / 2, (data.low + 1) / 2
    whole = cascade(model.unets, cfg.low_size, cfg.high_size)              # the same networks, on whole pictures

    def sample(steps):
        whole.sample_timesteps = (None, steps)
        return whole.sample(image=low, batch_size=len(low), start_at_unet_number=2, one_unet_in_gpu_at_time=False)

    return Contender(model.unets[1], lambda: model(crops, unet_number=2), sample, (model.unets[1],))


# ---------------------------------------------------------------------------------------------------------------- CLIP

def our_clip(size, data):
    """CLIP.loss; what stands for sampling is to embed pictures and captions."""
    model = CLIP(size.clip)
    images = last(data.images)
    return ours(model, lambda: model.loss(images, data.tokens),
                lambda steps: (model.encode_image(images), model.encode_text(data.tokens)))


def transformers_clip(size, data):
    """CLIPModel with its own loss."""
    from transformers import CLIPConfig as Config
    from transformers import CLIPModel
    cfg = size.clip
    text = dict(vocab_size=cfg.vocab_size, hidden_size=cfg.text_width, intermediate_size=4 * cfg.text_width, num_hidden_layers=cfg.text_layers,
                num_attention_heads=cfg.text_heads, max_position_embeddings=cfg.context_length, bos_token_id=cfg.eot_id - 1,
                eos_token_id=cfg.eot_id, pad_token_id=0)
    vision = dict(hidden_size=cfg.vision_width, intermediate_size=4 * cfg.vision_width, num_hidden_layers=cfg.vision_layers,
                  num_attention_heads=cfg.vision_heads, image_size=cfg.image_size, patch_size=cfg.patch_size)
    model = CLIPModel(Config(text_config=text, vision_config=vision, projection_dim=cfg.clip_dim))
    return Contender(model, lambda: model(input_ids=data.tokens, pixel_values=data.images, return_loss=True).loss,
                     lambda steps: (model.get_image_features(data.images), model.get_text_features(data.tokens)), (model,))


def dalle2_clip(size, data, dim=None, depths=None):
    """The CLIP that dalle2-pytorch brings along, x-clip's."""
    theirs, cfg = dalle2_pytorch(), size.clip
    dim, depths = dim or cfg.vision_width, depths or (cfg.text_layers, cfg.vision_layers)
    model = theirs.CLIP(
        dim_text=dim, dim_image=dim, dim_latent=cfg.clip_dim, num_text_tokens=cfg.vocab_size, text_enc_depth=depths[0],
        text_seq_len=cfg.context_length, text_heads=cfg.text_heads, visual_enc_depth=depths[1], visual_heads=cfg.vision_heads,
        visual_image_size=cfg.image_size, visual_patch_size=cfg.patch_size, visual_patch_dropout=0.0)
    return Contender(model, lambda: model(data.tokens, data.images, return_loss=True),
                     lambda steps: model(data.tokens, data.images, return_latents=True), (model,))


# ---------------------------------------------------------------------------------------------------------------- who there is

BUILDERS = {
    "decoder": {"ours": our_decoder, "dalle2-pytorch": dalle2_decoder, "diffusers": diffusers_decoder},
    "prior": {"ours": our_prior, "dalle2-pytorch": dalle2_prior, "diffusers": diffusers_prior},
    "upsampler": {"ours": our_upsampler, "dalle2-pytorch": dalle2_upsampler, "diffusers": diffusers_upsampler},
    "clip": {"ours": our_clip, "dalle2-pytorch": dalle2_clip, "transformers": transformers_clip}}
SUBJECTS, PEERS = tuple(BUILDERS), tuple(INSTALL)


def near(width, counts):
    """(dim, tuple of counts): widths and numbers of layers near these, all combinations, the closest first.

    Widths are multiples of 16, which kernels like; of 8 in small networks. A change is as large as what it changes of the whole.
    """
    step = 16 if width >= 64 else 8
    dims = range(step, 2 * width + 1, step)
    choices = itertools.product(dims, *(range(max(1, count - 2), count + 2) for count in counts))
    return sorted(((dim, tuple(found)) for dim, *found in choices),
                  key=lambda item: abs(item[0] / width - 1) + sum(abs(a - b) for a, b in zip(item[1], counts)) / sum(counts))


def changes(subject, who, size):
    """How a peer's sizes may be changed to give it our FLOPs: a list of arguments for its builder, the closest to our sizes first."""
    if who != "dalle2-pytorch":
        return [{}]
    if subject == "prior":
        return [{"ff_mult": 4 - i / 8} for i in range(24)]
    if subject == "clip":
        return [{"dim": dim, "depths": depths} for dim, depths in near(size.clip.vision_width, (size.clip.text_layers, size.clip.vision_layers))]
    cfg = getattr(size, subject)
    return [{"dim": dim, "blocks": blocks} for dim, blocks in near(cfg.model_channels, (cfg.num_res_blocks,) * len(cfg.channel_mult))]


def installed(who):
    """Whether a peer's package is there."""
    return importlib.util.find_spec(who.replace("-", "_")) is not None


class Absent(types.ModuleType):
    """Stands in for a module that is imported but never used: it has every name one asks for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


# What dalle2-pytorch imports, and nothing here uses: reading picture files, the VQ-GAN, and its trainer with all that this would want. They stand in
# only while it is imported, so that nobody else takes them for the real ones.
ABSENT = ("kornia_rs", "torchvision", "torchvision.transforms", "vector_quantize_pytorch", "dalle2_pytorch.trainer")


@functools.cache
def dalle2_pytorch():
    """dalle2-pytorch, with x-clip's CLIP among its names. Raises ValueError when one of its own needs is missing."""
    stand_ins = {name: Absent(name) for name in ABSENT if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        import dalle2_pytorch as package
        return package
    except ImportError as error:
        raise ValueError(f"dalle2-pytorch cannot be imported ({error}): {INSTALL['dalle2-pytorch']}") from None
    finally:
        for name in stand_ins:
            del sys.modules[name]
