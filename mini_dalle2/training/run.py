"""A run folder: what is there, what is to be trained, and what the stages hand to each other.

Read next: stages.py.
"""

import contextlib
import functools
from dataclasses import asdict

import torch

from .. import configs
from ..data.pixels import to_float
from ..data.tables import Pictures
from ..pipeline import load_model
from ..runtime.files import load_checkpoint, read_json, save_checkpoint, signature
from ..runtime.noise import seeded
from ..runtime.processes import barrier, is_main, main_first, world
from ..tokenizer import BPETokenizer
from ..transformer import Transformer
from ..unet import UNet
from .state import fit
from . import overrides


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
        path, key = self.run / "embeddings.pt", f"{self.frozen_clip()[1]} {self.pictures.fingerprint()}"
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
            model = configs.build(cfg)
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if stage.startswith("upsampler"):
            images, side = getattr(data, f"{stage}_images"), cfg.high_size
        else:
            images, side = data.images, getattr(cfg, "image_size", self.config.clip.model.image_size)      # the prior's are embedded
        # Weights, gradients, AdamW's averages of these and of their squares, and the averaged weights: 4 bytes each.
        parts = world() if getattr(self.config, stage).train.shard else 1
        return 5 * 4 * numbers // parts, min(images, self.pictures.available) * 3 * side ** 2

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
            return {"config": overrides.to_dict(self.config), "model_config": asdict(cfg.model), "tokenizer": tokenizer,
                    "clip_signature": signature(weights) if stage == "clip" else clip_signature}

        torch.manual_seed(self.config.data.seed)
        sharded = cfg.train.shard and world() > 1
        # Channels last: much faster convolutions on a CPU; but what is to be sharded must lie in order.
        layout = torch.contiguous_format if sharded else torch.channels_last
        model = configs.build(cfg.model).to(self.device, memory_format=layout)
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
