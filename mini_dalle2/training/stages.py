"""The stages of training: which pictures, embeddings and captions each model learns from.

    tokenizer → CLIP → frozen embeddings → prior, ar_prior, [sketch,] decoder → upsamplers
                                                                          (unCLIP §2, Fig. 2)

A stage sees of the others only what the paper lets it see. The priors get (z_img, z_txt, caption).
The decoder gets a picture, its true z_img and its caption; some presets add a sketch made from
z_img. The upsamplers get crops of large pictures, and nothing else. Each stage leaves a
checkpoint, a loss curve and a picture in the run folder. The loop in train.py asks a stage for
`load`, `new_model`, `batch` and `loss`; afterwards for `finish` and `show`.

Shapes: N training pictures, B of them in a batch, S side, L context length, D = clip_dim.
References: unCLIP (2204.06125) §2 and App. C.
Read next: run.py for what the stages share, figures.py for the pictures.
"""

import abc
import functools
import sys
from dataclasses import asdict

import torch
from tqdm import tqdm

from .. import configs
from ..data.near_misses import with_near_misses
from ..data.pixels import to_float
from ..data.tables import pictures_at
from ..pipeline import load_model
from ..runtime.device import on_device, stream_kept
from ..runtime.files import load_checkpoint, save_checkpoint, signature, write_json
from ..runtime.noise import randint, rows_of, seeded
from ..runtime.processes import barrier, gather_rows, is_main, world
from ..tokenizer import BPETokenizer
from ..transformer import eot_position
from ..upsampler import random_crop
from . import figures, hints, overrides


def learn_tokenizer(run):
    """Learn the tokenizer's merges from the captions, and write tokenizer.json."""
    if not is_main():
        return
    captions = run.pictures.captions()
    tokenizer = BPETokenizer.train(captions, run.config.tokenizer.vocab_size)
    write_json(tokenizer.state_dict(), run.folder / "tokenizer.json")
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(captions[0])]
    print(f"tokenizer: {tokenizer.vocab_size} ids, {len(tokenizer.merges)} merges "
          f"from {len(captions)} captions")
    print(f"tokenizer: {captions[0]!r} -> {pieces}")


class BatchOrder:
    """Which of n examples each step learns from.

    Each epoch goes through all n examples once, in an order of its own. The order follows from
    the seed and the step alone, so that a resumed run goes on where it was. The last batch of an
    epoch is filled up from the next epoch.
    """

    def __init__(self, name, n, cfg, seed):
        """name: the stage; cfg: its TrainConfig. Raises ValueError for too few examples."""
        self.n = n
        self.seed = seed
        # The batch is divided among processes, and then among parts.
        shares = world() * cfg.accumulate
        self.size = cfg.batch_size if n >= cfg.batch_size else n - n % shares
        if self.size == 0:
            raise ValueError(f"{name}: {n} examples are too few for {world()} processes "
                             f"with {cfg.accumulate} parts each: add pictures, or take fewer "
                             f"processes or parts")

    def __call__(self, step):
        """The examples of a 0-based step: (B,), with B = n if n is below batch_size."""
        epoch, start = divmod(step * self.size, self.n)
        rest = self.epoch_order(epoch)[start:start + self.size]
        missing = self.size - len(rest)
        return torch.cat([rest, self.epoch_order(epoch + 1)[:missing]]) if missing else rest

    @functools.lru_cache(maxsize=1)
    def epoch_order(self, epoch):
        """All n examples in the order of an epoch: (n,)."""
        return torch.randperm(self.n, generator=seeded(self.seed, "epoch", epoch))


# ---------------------------------------------------------------------------- what all stages do

class TrainingStage(abc.ABC):
    """One model of a run, and what it learns from. Subclasses say what is special about theirs."""

    def __init__(self, run, name):
        """run: see run.py. name: the stage or the variant, and the name of its files."""
        self.run = run
        self.name = name
        self.base = configs.VARIANTS.get(name, name)
        self.config = run.config_of(name)
        self.seed = self.config.data.seed
        self.model_config = getattr(self.config, self.base).model
        self.cfg = getattr(self.config, self.base).train
        self.indices = None
        # The name of the picture's file, without its end.
        self.drawn_as = name

    @property
    def title(self):
        """The name, and the place among the stages of this call."""
        names = self.run.names
        place = f" (stage {names.index(self.name) + 1} of {len(names)})" if len(names) > 1 else ""
        return self.name + place

    @abc.abstractmethod
    def load(self):
        """Load the pictures, embeddings and tokens that `batch` needs, and set `indices`."""

    @abc.abstractmethod
    def batch(self, data, step):
        """The batch of a 0-based step, or this process's share of one.

        data: a random stream on the CPU, or a Share of one, for crops and the like.
        """

    def loss(self, model, batch, noise):
        """The loss of a batch; noise: a random stream on the model's device, or a Share of one."""
        return model.loss(*batch, generator=noise)

    def prepare(self, model):
        """Put in what is fixed before the training, such as measures of the embeddings."""

    @abc.abstractmethod
    def picture(self, model):
        """Write a picture of what the model has learned, as `drawn_as`. Print a line about it."""

    def order(self, n):
        """The order in which the steps go through n examples."""
        return BatchOrder(self.name, n, self.cfg, self.seed)

    def is_sharded(self):
        """Whether each process keeps only a part of the weights."""
        return self.cfg.shard and world() > 1

    def new_model(self):
        """Build the stage's model on the run's device, with weights that follow from the seed."""
        torch.manual_seed(self.seed)
        # channels_last makes convolutions on a CPU much faster. Sharding needs plain order.
        layout = torch.contiguous_format if self.is_sharded() else torch.channels_last
        model = configs.build(self.model_config)
        model = model.to(self.run.device, memory_format=layout)
        path = self.run.folder / f"{self.name}.pt"
        latest = self.run.folder / f"{self.name}.resume.pt"
        if self.run.resume and path.is_file() and not latest.is_file():
            # Weights copied by `--from`. `prepare` measures the buffers again.
            copied = load_model(path, self.name)[0]
            for ours, theirs in zip(model.parameters(), copied.parameters()):
                ours.data.copy_(theirs)
        self.prepare(model)
        return model

    def header(self, ema):
        """{name: plain value} that NAME.pt holds beside the EMA weights."""
        return {"version": configs.VERSION, "config": overrides.to_dict(self.config),
                "model_config": asdict(self.model_config), "tokenizer": self.tokenizer_state(),
                "clip_signature": self.clip_signature(ema)}

    def tokenizer_state(self):
        """The run's tokenizer, for the models that read captions; None for the upsamplers."""
        if self.base in ("clip", *configs.ON_CLIP):
            return self.run.tokenizer().state_dict()
        return None

    def clip_signature(self, ema):
        """The signature of the CLIP whose embeddings the model knows; of CLIP, its own."""
        if self.base == "clip":
            return signature(ema)
        return self.run.frozen_clip()[1] if self.base in configs.ON_CLIP else None

    def finish(self, model):
        """Complete a trained model. Return it in one piece, so that one process can use it."""
        if self.is_sharded():
            barrier()
            return self.load_trained()
        return model

    def load_trained(self):
        """The trained model from the run folder, on the run's device."""
        return load_model(self.run.folder / f"{self.name}.pt", self.name)[0].to(self.run.device)

    def forget_pictures(self):
        """Remove the loss curve and the picture of fewer steps."""
        for end in (".png", "_loss.png", ".preview.png") if is_main() else ():
            (self.run.folder / f"{self.name}{end}").unlink(missing_ok=True)

    def preview(self):
        """Draw NAME.preview.png: what the model has learned at the last checkpoint.

        The training does not notice: torch's own stream of random numbers stands as before.
        Returns the path.
        """
        self.drawn_as = f"{self.name}.preview"
        try:
            with stream_kept(self.run.device):
                self.picture(self.load_trained())
        finally:
            self.drawn_as = self.name
        return self.run.folder / f"{self.name}.preview.png"

    def slow_note(self, seconds):
        """A sentence if a step of so many seconds takes far longer than it should, else None."""
        usual = self.run.pace.get(self.name)
        return hints.slow_note(self.run, self.name, seconds, usual) if usual else None

    def lower_rate(self):
        """What to do when the loss is not finite."""
        return hints.lower_rate(self.run, self.name)

    def show(self, model=None):
        """Write the loss curve and the picture, where they are missing.

        Ctrl-C may have prevented them before. model None: take the one in the run folder.
        """
        if not is_main():
            return
        if not (self.run.folder / f"{self.name}_loss.png").is_file():
            figures.loss_curve(self.run.folder, self.name)
        if not (self.run.folder / f"{self.name}.png").is_file():
            self.picture(model or self.load_trained())
        (self.run.folder / f"{self.name}.preview.png").unlink(missing_ok=True)


# ---------------------------------------------------------------------------- the models

class ClipStage(TrainingStage):
    """CLIP learns which caption belongs to which picture (CLIP Fig. 3)."""

    def load(self):
        # mini: the paper trains CLIP on more, and noisier, data than the rest (App. C). Here all
        # stages learn from the same pictures.
        # mini: CLIP's augmentation, a random square of the picture, is left out: it would cut
        # away what captions as short as ours name.
        self.pictures, captions = self.run.table("train", self.model_config.image_size)
        self.indices = self.order(len(captions))
        # mini: CLIP's only wrong captions are the others of its batch. Among 32,768 of them are
        # some near misses. A small batch has none, so we add them.
        self.near_misses = self.config.data.near_misses
        tokens = self.run.tokens(with_near_misses(captions) if self.near_misses else captions)
        # There is only padding behind the end of the longest caption.
        tokens = tokens[:, :eot_position(tokens, self.model_config.eot_id).max() + 1]
        # Each caption comes before its K near misses.
        self.tokens = tokens.unflatten(0, (len(captions), -1))          # (N, 1 + K, L)

    def batch(self, data, step):
        i = rows_of(self.indices(step), data)
        images = pictures_at(i, self.pictures, self.run.device)         # (B, 3, S, S)
        texts = self.tokens[on_device(i, self.run.device)]              # (B, 1 + K, L)
        own = texts[:, 0]                                               # (B, L)
        if not self.near_misses:
            return images, own
        wrong = texts[torch.arange(len(i)), randint(texts.shape[1], (len(i),), data, low=1)]
        # A caption without near misses has copies of itself in their place.
        wrong = wrong[(wrong != own).any(dim=1)]                        # (≤ B, L)
        return images, torch.cat([own, wrong])

    def loss(self, model, batch, noise):
        return model.loss(*batch, gather=gather_rows if world() > 1 else None)

    def picture(self, model):
        pictures, captions = self.run.table("val", self.model_config.image_size)
        z_img, z_txt = self.run.clip_embeddings(pictures, captions, model)
        kind = self.run.pictures.val_kind
        accuracy = figures.similarity(
            self.run.folder, self.drawn_as, z_img, z_txt, captions, kind)
        tqdm.write(f"{self.name}: finds the right caption for {accuracy:.1%} "
                   f"of {len(captions)} {kind} pictures")


class PriorStage(TrainingStage):
    """A prior learns the way from a caption to the embedding of a picture (unCLIP §2.2)."""

    def load(self):
        captions, self.z_img, self.z_txt = self.run.training_embeddings()
        self.tokens = self.run.tokens(captions)
        self.indices = self.order(len(captions))

    def batch(self, data, step):
        i = on_device(rows_of(self.indices(step), data), self.run.device)
        return self.z_img[i], self.z_txt[i], self.tokens[i]

    def prepare(self, model):
        model.measure(self.z_img, self.z_txt)

    def picture(self, model):
        """Show how close samples come to the true embeddings."""
        pictures, captions = self.run.table("val", self.run.config.clip.model.image_size)
        captions = captions[:64]
        z_img, z_txt = self.run.clip_embeddings(pictures[:64], captions)
        generator = torch.Generator().manual_seed(0)
        sampled = model.sample(self.run.tokens(captions), z_txt, generator=generator)
        of_prior, of_text, found = figures.closeness(
            self.run.folder, self.drawn_as, (sampled, z_img, z_txt), captions,
            self.run.pictures.val_kind)
        tqdm.write(f"{self.name}: the cosine of its samples with the true z_img is {of_prior:.3f} "
                   f"(that of z_txt is {of_text:.3f}; 1 is out of reach where one caption fits "
                   f"many pictures); {found:.1%} of samples are nearest to their own caption")


class DiffusionPriorStage(PriorStage):
    """The diffusion prior. Its analytic variance is measured after the training."""

    SAMPLES = 1024

    def finish(self, model):
        model = super().finish(model)
        some = slice(0, self.SAMPLES)
        model.measure_variance(self.z_img[some], self.z_txt[some], self.tokens[some],
                               seeded(self.seed, "variance"))
        for end in (".pt", ".resume.pt") if is_main() else ():
            path = self.run.folder / f"{self.name}{end}"
            save_checkpoint(load_checkpoint(path) | {"ema": model.state_dict()}, path)
        return model


class SketchStage(TrainingStage):
    """The sketch learns the average of all pictures that have the same embedding."""

    def load(self):
        self.z_img = self.run.training_embeddings()[1]
        self.pictures, captions = self.run.table("train", self.model_config.image_size)
        self.indices = self.order(len(captions))

    def batch(self, data, step):
        i = rows_of(self.indices(step), data)
        images = pictures_at(i, self.pictures, self.run.device)
        return images, self.z_img[on_device(i, self.run.device)]

    def loss(self, model, batch, noise):
        return model.loss(*batch)

    def prepare(self, model):
        model.measure(self.z_img)

    @torch.no_grad()
    def picture(self, model):
        """Show true pictures beside their sketches; print the error on both splits."""
        error = {}
        for split in ("train", "val"):
            true, captions = self.run.table(split, self.model_config.image_size)
            true = to_float(true[:500].to(self.run.device))
            z_img = self.true_embeddings(split, 500)[0]
            error[split] = model.loss(true, z_img).item()
        mean = (true - true.mean(0)).square().mean().item()
        unseen = f"{error['val']:.4f} of unseen pictures " if self.run.pictures.has_val else ""
        tqdm.write(f"{self.name}: squared error {error['train']:.4f} of training pictures, {unseen}"
                   f"(their mean has {mean:.4f})")
        sketches = model(z_img[:16]).clamp(-1, 1)
        figures.side_by_side(self.run.folder, self.drawn_as, true[:16], sketches, captions[:16])

    def true_embeddings(self, split, n):
        """(z_img, z_txt) of the first n pictures of a split, by the run's CLIP."""
        pictures, captions = self.run.table(split, self.run.config.clip.model.image_size)
        return self.run.clip_embeddings(pictures[:n], captions[:n])


class DecoderStage(TrainingStage):
    """The decoder learns the way from a true embedding and a caption to the picture (§2.1)."""

    def load(self):
        _, self.z_img, self.z_txt = self.run.training_embeddings()
        self.pictures, captions = self.run.table("train", self.model_config.image_size)
        self.tokens = self.run.tokens(captions)
        self.indices = self.order(len(captions))

    def batch(self, data, step):
        i = rows_of(self.indices(step), data)
        images = pictures_at(i, self.pictures, self.run.device)
        images = images.contiguous(memory_format=torch.channels_last)   # (B, 3, S, S)
        i = on_device(i, self.run.device)
        return images, self.z_img[i], self.tokens[i]

    def prepare(self, model):
        model.measure(self.z_img, self.z_txt)

    def picture(self, model):
        """Show true pictures, and those sampled from their embeddings and captions."""
        seen, captions = self.run.table("val", self.run.config.clip.model.image_size)
        true, _ = self.run.table("val", self.model_config.image_size)
        captions = captions[:16]
        z_img = self.run.clip_embeddings(seen[:16], captions)[0]
        if self.model_config.z_drop == 1.0:
            # A model that never saw a z_img, as GLIDE: it samples from the caption alone.
            z_img = None
        generator = torch.Generator().manual_seed(0)
        sampled = model.sample(z_img, self.run.tokens(captions), generator=generator,
                               progress=sys.stderr.isatty())
        figures.side_by_side(self.run.folder, self.drawn_as, to_float(true[:16]), sampled, captions)


class SketchedDecoderStage(DecoderStage):
    """A decoder with tricks: it may see a sketch, and z_img is noised late in the training."""

    def load(self):
        super().load()
        self.sketch = None
        if "sketch" in configs.stages(self.config):
            self.sketch = self.run.frozen_sketch()

    def batch(self, data, step):
        # At first there is enough to learn without noise on z_img.
        late = step >= self.model_config.z_noise_from * self.cfg.steps
        return *super().batch(data, step), self.model_config.z_noise if late else 0.0

    def loss(self, model, batch, noise):
        images, z_img, tokens, z_noise = batch
        return model.loss(images, z_img, tokens, generator=noise, z_noise=z_noise)

    def prepare(self, model):
        super().prepare(model)
        if self.sketch is not None:
            model.sketch.load_state_dict(self.sketch.state_dict())


class UpsamplerStage(TrainingStage):
    """An upsampler learns the way from a degraded small crop to the sharp large one (§2.1)."""

    def load(self):
        images = getattr(self.config.data, f"{self.base}_images")
        self.pictures, _ = self.run.pictures.table("train", self.model_config.high_size, images)
        self.indices = self.order(len(self.pictures))

    def batch(self, data, step):
        i = rows_of(self.indices(step), data).to(self.pictures.device)
        crops = random_crop(self.pictures[i], self.model_config.crop_size, data)
        crops = to_float(on_device(crops, self.run.device))
        return (crops.contiguous(memory_format=torch.channels_last),)

    def picture(self, model):
        """Show small pictures, what the upsampler makes of them, and the true large ones."""
        true, _ = self.run.pictures.table("val", self.model_config.high_size, 3)
        low, _ = self.run.pictures.table("val", self.model_config.low_size, 3)
        low = to_float(low).to(self.run.device)
        generator = torch.Generator().manual_seed(0)
        high = model.sample(low, generator=generator, progress=sys.stderr.isatty())
        figures.enlargements(self.run.folder, self.drawn_as, low, high, to_float(true))


STAGE_CLASSES = {
    "clip": ClipStage,
    "prior": DiffusionPriorStage,
    "ar_prior": PriorStage,
    "sketch": SketchStage,
    "decoder": DecoderStage,
    "upsampler1": UpsamplerStage,
    "upsampler2": UpsamplerStage}


def open_stage(run, name):
    """The stage of a model or of a variant, such as "decoder" or "glide".

    The configuration of a decoder says whether it has tricks.
    """
    stage_class = STAGE_CLASSES[configs.VARIANTS.get(name, name)]
    if stage_class is DecoderStage and hasattr(run.config.decoder.model, "z_noise"):
        stage_class = SketchedDecoderStage
    return stage_class(run, name)
