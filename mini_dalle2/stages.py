"""The stages of training: which pictures, embeddings and captions each model learns from, and what is shown of it afterwards.

    tokenizer → CLIP → (frozen embeddings of all pictures) → prior, ar_prior, [sketch,] decoder → upsampler1, upsampler2   (unCLIP §2, Fig. 2)

Each stage sees of the others only what the paper lets it see: the priors (z_img, z_txt, caption), the decoder (picture, its true z_img,
caption; in some presets a sketch made of that z_img), the upsamplers crops of large pictures and nothing else. Each leaves a checkpoint, a
loss curve and a picture in the run folder.
`TRAIN` and `SHOW` have one function per stage; a `Job` holds what they hand to each other; train.py at the top level calls them.

Shapes: N training pictures, B of them in a batch, S side, L context length, D = clip_dim.
References: unCLIP (2204.06125) §2 and App. C. Read next: training.py for the loop, report.py for the pictures.
"""

import contextlib
import functools
import hashlib
import json
from dataclasses import asdict

import torch

from . import configs, report
from .data import to_float
from .distributed import barrier, gather_rows, is_main, main_first, world
from .near_misses import with_near_misses
from .noise import draw_rows, rows_of
from .pictures import Pictures, on_device, pictures_at
from .pipeline import MODELS, load_model, seeded
from .tokenizer import BPETokenizer
from .training import atomic_open, fit, load_checkpoint, save_checkpoint
from .transformer import Transformer, eot_position
from .unet import UNet
from .upsampler import random_crop


class Job:
    """One call of train.py: what is to be done, and what the stages hand to each other."""

    def __init__(self, config, run, device, resume):
        self.config, self.run, self.device, self.resume = config, run, device, resume
        self.pictures = Pictures(config.data, device, run)
        self.clip, self.noted = None, False

    # ------------------------------------------------------------------ what earlier stages made

    def tokenizer(self):
        """The run's tokenizer. Raises FileNotFoundError before it is trained."""
        path = self.run / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run `python train.py --stage tokenizer --out {self.run}` first")
        try:
            return BPETokenizer.from_state_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def finished(self, stage):
        """(model, checkpoint) of an earlier stage that is to be built upon. Raises FileNotFoundError, ValueError."""
        path = self.run / f"{stage}.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run `python train.py --stage {stage} --out {self.run}` first")
        model, checkpoint = load_model(path, stage)
        if checkpoint["step"] < checkpoint["steps"]:
            raise ValueError(f"{path} has {checkpoint['step']} of {checkpoint['steps']} steps: finish it with --stage {stage} --resume")
        return model, checkpoint

    def frozen_clip(self):
        """(the run's finished CLIP, frozen; a signature of its weights). Raises FileNotFoundError, ValueError."""
        if self.clip is None:
            model, checkpoint = self.finished("clip")
            self.clip = model.to(self.device), signature(checkpoint["ema"])
        return self.clip

    def frozen_sketch(self):
        """The run's finished sketch, which the decoder is to be shown, or None when it is shown none. Raises FileNotFoundError, ValueError."""
        return self.finished("sketch")[0] if self.config.decoder.model.sketch else None

    def tokens(self, captions):
        """Captions -> tokens (N, L) on the device; says so when some had to be cut off."""
        tokenizer, length = self.tokenizer(), self.config.clip.model.context_length
        tokens = tokenizer.tokenize(captions, length, truncate=True)
        cut = sum(len(tokenizer.encode(caption)) + 2 > length for caption in set(captions))
        if cut and not self.noted:
            self.noted = True
            print(f"note: {cut} captions have more than {length} tokens and lose their end; --clip.context_length={2 * length} keeps more")
        return tokens.to(self.device)

    def table(self, split, size):
        """The pictures (N, 3, size, size) and captions of a split, as many as CLIP, priors, sketch and decoder get."""
        return self.pictures.table(split, size, self.config.data.images if split == "train" else self.config.data.val_images)

    @torch.no_grad()
    def embed(self, pictures, captions):
        """z_img, z_txt (N, D) of unit norm, by the frozen CLIP."""
        clip, tokens = self.frozen_clip()[0], self.tokens(captions)
        z_img = [clip.encode_image(to_float(part.to(self.device))) for part in pictures.split(500)]
        return torch.cat(z_img), torch.cat([clip.encode_text(part) for part in tokens.split(500)])

    def embeddings(self):
        """(captions, z_img, z_txt) of the training pictures, from embeddings.pt while CLIP and the pictures are still the same."""
        path, key = self.run / "embeddings.pt", f"{self.frozen_clip()[1]} {self.pictures.key()}"
        with main_first():
            saved = {}
            with contextlib.suppress(FileNotFoundError, ValueError):       # a damaged one is made again
                saved = load_checkpoint(path, "embeddings")
            if saved.get("key") != key:
                pictures, captions = self.table("train", self.config.clip.model.image_size)
                z_img, z_txt = self.embed(pictures, captions)
                saved = {"stage": "embeddings", "key": key, "captions": captions, "z_img": z_img.cpu(), "z_txt": z_txt.cpu()}
                save_checkpoint(saved, path)
        return saved["captions"], saved["z_img"].to(self.device), saved["z_txt"].to(self.device)

    # ------------------------------------------------------------------ training one of them

    def needs(self, stage):
        """Bytes that training a stage takes at the least: (what it trains of its weights five times over, its table of pictures)."""
        cfg, data = getattr(self.config, stage).model, self.config.data
        with torch.device("meta"):                                         # shapes without memory
            model = MODELS[stage][0](cfg)
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if stage.startswith("upsampler"):
            images, side = getattr(data, f"{stage}_images"), cfg.high_size
        else:
            images, side = data.images, getattr(cfg, "image_size", self.config.clip.model.image_size)      # the prior's are embedded
        # Weights, gradients, AdamW's averages of these and of their squares, and the averaged weights: 4 bytes each.
        parts = world() if getattr(self.config, stage).train.shard else 1
        return 5 * 4 * numbers // parts, min(images, self.pictures.there) * 3 * side ** 2

    def train(self, stage, indices, draw, loss_fn, prepare=None):
        """Builds and trains the model of a stage (or goes on with it): returns it with its averaged weights.

        indices: what `batches` returned; draw, loss_fn: see training.fit
        prepare(model): puts in what is fixed before the training, as what is measured of the embeddings.
        """
        cfg = getattr(self.config, stage)
        if world() * cfg.train.accumulate > 1 and getattr(cfg.model, "timestep_sampling", "uniform") != "uniform":
            raise ValueError(f"{stage}: loss_aware timesteps are chosen by the losses of whole batches, which one process must see at once")
        clip_signature = self.frozen_clip()[1] if stage in configs.ON_CLIP else None
        tokenizer = self.tokenizer().state_dict() if stage in ("clip", *configs.ON_CLIP) else None

        def header(weights):
            return {"config": configs.to_dict(self.config), "model_config": asdict(cfg.model), "tokenizer": tokenizer,
                    "clip_signature": signature(weights) if stage == "clip" else clip_signature}

        torch.manual_seed(self.config.data.seed)
        sharded = cfg.train.shard and world() > 1
        # Channels last: much faster convolutions on a CPU; but what is to be sharded must lie in order.
        layout = torch.contiguous_format if sharded else torch.channels_last
        model = MODELS[stage][0](cfg.model).to(self.device, memory_format=layout)
        if self.resume and (self.run / f"{stage}.pt").is_file() and not (self.run / f"{stage}.resume.pt").is_file():
            start = load_model(self.run / f"{stage}.pt", stage)[0]         # what train.py --from has copied; but what is measured is measured anew
            for ours, theirs in zip(model.parameters(), start.parameters()):
                ours.data.copy_(theirs)
        if prepare is not None:
            prepare(model)
        with networks(model, cfg.train):
            model = fit(stage, model, draw, loss_fn, cfg.train, self.run, header, self.resume, self.config.data.seed, indices)[0]
        if sharded:                                                        # in one piece again, for those who work alone with it
            barrier()
            model = load_model(self.run / f"{stage}.pt", stage)[0].to(self.device)
        return model

    def amend(self, stage, model):
        """Puts what a model measured after its training, in buffers, into its checkpoints."""
        for path in (self.run / f"{stage}.pt", self.run / f"{stage}.resume.pt") if is_main() else ():
            save_checkpoint(load_checkpoint(path) | {"ema": model.state_dict()}, path)

    def batches(self, stage, n):
        """indices(step) -> (B,), which of n examples a step learns from; B is n if there are fewer than batch_size.

        Each epoch goes once through all n, in an order of its own. Both follow from the seed and the step alone, so that a resumed run
        goes on where it was. The batch at the end of an epoch is filled up from the next one.
        """
        cfg, seed = getattr(self.config, stage).train, self.config.data.seed
        parts = world() * cfg.accumulate
        size = cfg.batch_size if n >= cfg.batch_size else n - n % parts    # which is divided among processes, and among parts
        if size == 0:
            raise ValueError(f"{stage}: {n} examples are too few for {world()} processes with {cfg.accumulate} parts each")

        @functools.lru_cache(maxsize=1)
        def order(epoch):
            return torch.randperm(n, generator=seeded(seed, "epoch", epoch))               # (n,)

        def indices(step):
            epoch, start = divmod(step * size, n)
            rest = order(epoch)[start:start + size]
            return rest if len(rest) == size else torch.cat([rest, order(epoch + 1)[:size - len(rest)]])

        return indices


@contextlib.contextmanager
def networks(model, cfg):
    """While it is entered, the model's transformers and U-Nets run as a TrainConfig says: compiled, or keeping few activations."""
    parts = [module for module in model.modules() if isinstance(module, (Transformer, UNet))]
    for part in parts:
        part.recompute = cfg.recompute
        if cfg.compile:
            part.forward = torch.compile(part.forward)                     # of the instance: it hides that of the class
    yield
    for part in parts:
        part.recompute = False
        if cfg.compile:
            del part.forward


def read_json(path):
    """Plain values from a JSON file. Raises ValueError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("too many brackets within each other") from None


def write_json(value, path):
    """Writes plain values as JSON, whole or not at all."""
    with atomic_open(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def signature(weights):
    """Sixteen hexadecimal digits that change when any weight does."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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


# ---------------------------------------------------------------------------------------------------------------- two functions per stage

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
        wrong = texts[torch.arange(len(i)), draw_rows(functools.partial(torch.randint, 1, texts.shape[1]), (len(i),), generator)]
        return images, own, wrong[(wrong != own).any(dim=1)]               # (K, L): of those that have near misses, one each

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
        return images, z_img[i], tokens[i], cfg.z_noise if step >= cfg.z_noise_from * steps else 0.0

    def loss(model, batch, generator):
        *batch, z_noise = batch
        return model.loss(*batch, generator=generator, z_noise=z_noise)

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
