"""The stages of training: which pictures, embeddings and captions each model learns from, and what is shown of it afterwards.

    tokenizer → CLIP → (frozen embeddings of all pictures) → prior, ar_prior, [sketch,] decoder → upsampler1, upsampler2   (unCLIP §2, Fig. 2)

Each stage sees of the others only what the paper lets it see: the priors (z_img, z_txt, caption), the decoder (picture, its true z_img,
caption; in some presets a sketch made of that z_img), the upsamplers crops of large pictures and nothing else. Each leaves a checkpoint, a
loss curve and a picture in the run folder.
`TRAIN` and `SHOW` have one function per stage; a `Job` holds what they hand to each other; train.py at the top level calls them.

Shapes: N training pictures, B of them in a batch, S side, L context length, D = clip_dim.
References: unCLIP (2204.06125) §2 and App. C. Read next: training.py for the loop, report.py for the pictures.
"""

import functools

import torch

from ..data.near_misses import with_near_misses
from ..data.pixels import to_float
from ..data.tables import pictures_at
from ..pipeline import load_model
from ..runtime.device import on_device
from ..runtime.files import write_json
from ..runtime.noise import randint, rows_of, seeded
from ..runtime.processes import barrier, gather_rows, is_main, world
from ..tokenizer import BPETokenizer
from ..transformer import eot_position
from ..upsampler import random_crop
from . import figures as report


def learn(job, stage):
    """Trains a stage, then draws what it has learned."""
    for end in (".png", "_loss.png") if is_main() else ():
        (job.run / f"{stage}{end}").unlink(missing_ok=True)                # those of fewer steps: what is there is up to date
    model = TRAIN[stage](job)
    barrier()                                                              # the others must not look for its files before they are there
    show(job, stage, model)


def show(job, stage, model=None):
    """Draws what is missing of a stage's loss curve and picture (Ctrl-C may have come before them); model None: that of the run folder."""
    if not is_main():
        return
    if stage in SHOW and not (job.run / f"{stage}_loss.png").is_file():
        report.losses(job.run, stage)
    if stage in SHOW and not (job.run / f"{stage}.png").is_file():
        SHOW[stage](job, model or load_model(job.run / f"{stage}.pt", stage)[0].to(job.device))


def train_tokenizer(job):
    """Learns merges from the captions; the models' vocabulary is what comes out."""
    if not is_main():
        return
    captions = job.pictures.captions()
    tokenizer = BPETokenizer.train(captions, job.config.tokenizer.vocab_size)
    write_json(tokenizer.state_dict(), job.run / "tokenizer.json")
    print(f"tokenizer: {tokenizer.vocab_size} ids, {len(tokenizer.merges)} merges from {len(captions)} captions")
    print(f"tokenizer: {captions[0]!r} -> {[tokenizer.decode([i]) for i in tokenizer.encode(captions[0])]}")


def train_clip(job):
    """Which caption belongs to which picture? (CLIP Fig. 3)"""
    # mini: the paper trains CLIP on more, and noisier, data than the rest (App. C); here all stages learn from the same pictures.
    # mini: without CLIP's augmentation, a random square of the picture: it would cut away what captions as short as ours name.
    pictures, captions = job.table("train", job.config.clip.model.image_size)
    indices = job.batches("clip", len(captions))
    # mini: CLIP's only wrong captions are the others of its batch. 32,768 of them hold a few near misses, a small one holds none.
    near = job.config.data.near_misses
    tokens = job.tokens(with_near_misses(captions) if near else captions)
    tokens = tokens[:, :eot_position(tokens, job.config.clip.model.eot_id).max() + 1]      # behind the longest caption is only padding
    tokens = tokens.unflatten(0, (len(captions), -1))                      # (N, 1 + K, L): each caption before its near misses

    def draw(generator, step):
        i = rows_of(indices(step), generator)
        images = pictures_at(i, pictures, job.device)
        texts = tokens[on_device(i, job.device)]                           # (B, 1 + K, L)
        own = texts[:, 0]
        if not near:
            return images, own
        wrong = texts[torch.arange(len(i)), randint(texts.shape[1], (len(i),), generator, low=1)]
        # One near miss of each caption that has any.
        return images, torch.cat([own, wrong[(wrong != own).any(dim=1)]])  # (B + K, L)

    return job.train("clip", indices, draw, lambda model, batch, generator: model.loss(*batch, gather=gather_rows if world() > 1 else None))


def show_clip(job, clip):
    """Captions and pictures it has never seen, each with each."""
    pictures, captions = job.table("val", job.config.clip.model.image_size)
    accuracy = report.similarity(job.run, *job.embed(pictures, captions), captions)
    print(f"clip: finds the right caption for {accuracy:.1%} of {len(captions)} unseen pictures")


def train_prior(job, stage):
    """From a caption to the embedding of a picture, by diffusion or code by code (unCLIP §2.2)."""
    captions, z_img, z_txt = job.embeddings()
    tokens, indices = job.tokens(captions), job.batches(stage, len(captions))

    def draw(generator, step):
        i = on_device(rows_of(indices(step), generator), job.device)
        return z_img[i], z_txt[i], tokens[i]

    prior = job.train(stage, indices, draw, lambda model, batch, generator: model.loss(*batch, generator=generator),
                      lambda model: model.measure(z_img, z_txt))
    if stage == "prior":
        some = slice(0, 1024)
        prior.measure_variance(z_img[some], z_txt[some], tokens[some], seeded(job.config.data.seed, "variance"))
        job.amend(stage, prior)
    return prior


def show_prior(job, prior, stage):
    """How close its samples come to the true embeddings."""
    pictures, captions = (part[:64] for part in job.table("val", job.config.clip.model.image_size))
    z_img, z_txt = job.embed(pictures, captions)
    sampled = prior.sample(job.tokens(captions), z_txt, generator=torch.Generator().manual_seed(0))
    of_prior, of_text, found = report.closeness(job.run, stage, sampled, z_img, z_txt, captions)
    print(f"{stage}: cosine with the true z_img {of_prior:.3f} (z_txt: {of_text:.3f}); {found:.1%} of samples nearest to their caption")


def train_sketch(job):
    """From the true embedding of a picture to the average of the pictures that have it."""
    _, z_img, _ = job.embeddings()
    pictures, captions = job.table("train", job.config.sketch.model.image_size)
    indices = job.batches("sketch", len(captions))

    def draw(generator, step):
        i = rows_of(indices(step), generator)
        return pictures_at(i, pictures, job.device), z_img[on_device(i, job.device)]

    return job.train("sketch", indices, draw, lambda model, batch, generator: model.loss(*batch), lambda model: model.measure(z_img))


@torch.no_grad()
def show_sketch(job, sketch):
    """True pictures, and what of them is in their embeddings; its error on pictures it learned from and on others, beside that of their mean."""
    error = {}
    for split in ("train", "val"):
        seen, captions = (part[:500] for part in job.table(split, job.config.clip.model.image_size))
        true = to_float(job.table(split, job.config.sketch.model.image_size)[0][:500].to(job.device))
        z_img = job.embed(seen, captions)[0]
        error[split] = sketch.loss(true, z_img).item()
    mean = (true - true.mean(0)).square().mean().item()
    print(f"sketch: squared error {error['train']:.4f} of pictures it has seen, {error['val']:.4f} of others (their mean has {mean:.4f})")
    report.drawings(job.run, "sketch", true[:16], sketch(z_img[:16]).clamp(-1, 1), captions[:16])


def train_decoder(job):
    """From the true embedding of a picture, and its caption, to the picture (unCLIP §2.1)."""
    _, z_img, z_txt = job.embeddings()
    pictures, captions = job.table("train", job.config.decoder.model.image_size)
    tokens, indices, sketch = job.tokens(captions), job.batches("decoder", len(captions)), job.frozen_sketch()
    cfg, steps = job.config.decoder.model, job.config.decoder.train.steps

    def draw(generator, step):
        i = rows_of(indices(step), generator)
        images = pictures_at(i, pictures, job.device).contiguous(memory_format=torch.channels_last)
        i = on_device(i, job.device)
        batch = dict(images=images, z_img=z_img[i], tokens=tokens[i])
        if hasattr(cfg, "z_noise"):
            batch["z_noise"] = cfg.z_noise_at(step, steps)
        return batch

    def loss(model, batch, generator):
        return model.loss(**batch, generator=generator)

    def prepare(model):
        model.measure(z_img, z_txt)
        if sketch is not None:
            model.sketch.load_state_dict(sketch.state_dict())

    return job.train("decoder", indices, draw, loss, prepare)


def show_decoder(job, decoder):
    """True pictures, and what it draws from their embeddings and captions."""
    seen, captions = (part[:16] for part in job.table("val", job.config.clip.model.image_size))
    true, _ = (part[:16] for part in job.table("val", job.config.decoder.model.image_size))
    drawn = decoder.sample(job.embed(seen, captions)[0], job.tokens(captions), generator=torch.Generator().manual_seed(0), progress=True)
    report.drawings(job.run, "decoder", to_float(true), drawn, captions)


def train_upsampler(job, stage):
    """From a spoilt small crop to the sharp large one (unCLIP §2.1)."""
    cfg = getattr(job.config, stage).model
    pictures, _ = job.pictures.table("train", cfg.high_size, getattr(job.config.data, f"{stage}_images"))
    indices = job.batches(stage, len(pictures))

    def draw(generator, step):
        crops = random_crop(pictures[rows_of(indices(step), generator).to(pictures.device)], cfg.crop_size, generator)
        return to_float(on_device(crops, job.device)).contiguous(memory_format=torch.channels_last)

    return job.train(stage, indices, draw, lambda model, batch, generator: model.loss(batch, generator=generator))


def show_upsampler(job, upsampler, stage):
    """Small pictures, what it makes of them, and the true large ones."""
    cfg = getattr(job.config, stage).model
    true, _ = job.pictures.table("val", cfg.high_size, 3)
    low = to_float(job.pictures.table("val", cfg.low_size, 3)[0]).to(job.device)
    high = upsampler.sample(low, generator=torch.Generator().manual_seed(0), progress=True)
    report.enlargements(job.run, stage, low, high, to_float(true))


TRAIN = {"tokenizer": train_tokenizer, "clip": train_clip, "sketch": train_sketch, "decoder": train_decoder,
         **{stage: functools.partial(train_prior, stage=stage) for stage in ("prior", "ar_prior")},
         **{stage: functools.partial(train_upsampler, stage=stage) for stage in ("upsampler1", "upsampler2")}}
SHOW = {"clip": show_clip, "sketch": show_sketch, "decoder": show_decoder,
        **{stage: functools.partial(show_prior, stage=stage) for stage in ("prior", "ar_prior")},
        **{stage: functools.partial(show_upsampler, stage=stage) for stage in ("upsampler1", "upsampler2")}}
