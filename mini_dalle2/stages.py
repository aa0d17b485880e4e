"""The stages of training: which pictures, embeddings and captions each model learns from, and what is shown of it afterwards.

    tokenizer → CLIP → (frozen embeddings of all pictures) → prior, decoder → upsampler1, upsampler2                 (unCLIP §2, Fig. 2)

Each stage sees of the others only what the paper lets it see: the prior (z_img, z_txt, caption), the decoder (picture, its true z_img,
caption), the upsamplers crops of large pictures and nothing else. Each leaves a checkpoint, a loss curve and a picture in the run folder.
`TRAIN` has one function per stage; a `Job` holds what they hand to each other; train.py at the top level calls them.

mini: the paper trains CLIP on more, and noisier, data than the rest (App. C); here all stages learn from the same pictures.

Shapes: N training pictures, B of them in a batch, S side, L context length, D = clip_dim.
References: unCLIP (2204.06125) §2 and App. C. Read next: training.py for the loop, report.py for the pictures.
"""

import hashlib
import json
from dataclasses import asdict

import torch
from torch.utils.data import Subset

from . import configs, report
from .data import CaptionedFolder, CaptionedShapes, load_table, to_float
from .pipeline import STAGES as MODELS, load_model
from .tokenizer import BPETokenizer
from .training import atomic_open, fit, load_checkpoint, save_checkpoint
from .upsampler import random_crop


class Pictures:
    """The captioned pictures of a run: data sets of any size, and tables of them in memory; the last training table is kept."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.last = cfg, device, (None, None)
        if cfg.source != "shapes":
            print(self.folder(1).report)

    def folder(self, size):
        """All pictures of the folder, at size × size."""
        return CaptionedFolder(self.cfg.source, size)

    def dataset(self, split, size, limit):
        """At most `limit` examples of "train" or "val". A folder lends a tenth of its pictures to "val", chosen by the seed."""
        if self.cfg.source == "shapes":
            return CaptionedShapes(split, size, self.cfg.seed, limit)
        folder = self.folder(size)
        order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(self.cfg.seed)).tolist()
        lent = min(self.cfg.val_images, len(folder) // 10)
        if lent == 0:                                                      # too few to spare any: then "val" shows training pictures
            return Subset(folder, order[:limit])
        return Subset(folder, order[:lent][:limit] if split == "val" else order[lent:][:limit])

    def table(self, split, size, limit):
        """-> uint8 pictures (N, 3, size, size), on the GPU if they take less than a quarter of it, and their N captions."""
        if split == "val":
            return load_table(self.dataset(split, size, limit), progress=False)
        if self.last[0] != (size, limit):
            self.last = (None, None)                                       # the old one goes before the new one comes
            pictures, captions = load_table(self.dataset(split, size, limit))
            if self.device.type == "cuda" and pictures.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
                pictures = pictures.to(self.device)
            self.last = (size, limit), (pictures, captions)
        return self.last[1]

    def captions(self):
        """All captions of the training pictures, without drawing or reading those."""
        dataset = self.dataset("train", 1, self.cfg.images)
        if self.cfg.source == "shapes":
            return [dataset.scene(i).text for i in range(len(dataset))]
        return [text for i in dataset.indices for text in dataset.dataset.texts(i)]

    def key(self):
        """A text that changes when the training pictures do."""
        cfg, files = self.cfg, []
        if cfg.source != "shapes":
            files = [(str(file), file.stat().st_mtime_ns, file.stat().st_size, texts) for file, texts in self.folder(1).pictures]
        return hashlib.sha256(repr((cfg.source, cfg.images, cfg.val_images, cfg.seed, files)).encode()).hexdigest()


class Job:
    """One call of train.py: what is to be done, and what the stages hand to each other."""

    def __init__(self, config, run, device, resume):
        self.config, self.run, self.device, self.resume = config, run, device, resume
        self.pictures = Pictures(config.data, device)
        self.clip, self.noted = None, False

    # ------------------------------------------------------------------ what earlier stages made

    def tokenizer(self):
        """The run's tokenizer. Raises FileNotFoundError before it is trained."""
        path = self.run / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: run `python train.py --stage tokenizer --out {self.run}` first")
        try:
            return BPETokenizer.from_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def frozen_clip(self):
        """(the run's finished CLIP, frozen; a signature of its weights). Raises FileNotFoundError, ValueError."""
        if self.clip is None:
            path = self.run / "clip.pt"
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: run `python train.py --stage clip --out {self.run}` first")
            model, checkpoint = load_model(path)
            if checkpoint["step"] < checkpoint["steps"]:
                raise ValueError(f"{path} has {checkpoint['step']} of {checkpoint['steps']} steps: finish it with --stage clip --resume")
            self.clip = model.to(self.device), signature(checkpoint["ema"])
        return self.clip

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
        """The pictures (N, 3, size, size) and captions of a split, as many as CLIP, prior and decoder get."""
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
        saved = load_checkpoint(path) if path.is_file() else {"key": None}
        if saved["key"] != key:
            pictures, captions = self.table("train", self.config.clip.model.image_size)
            z_img, z_txt = self.embed(pictures, captions)
            saved = {"stage": "embeddings", "key": key, "captions": captions, "z_img": z_img.cpu(), "z_txt": z_txt.cpu()}
            save_checkpoint(saved, path)
        return saved["captions"], saved["z_img"].to(self.device), saved["z_txt"].to(self.device)

    # ------------------------------------------------------------------ training one of them

    def train(self, stage, draw, loss_fn):
        """Builds and trains the model of a stage (or goes on with it): returns it with its averaged weights."""
        cfg, path = getattr(self.config, stage), self.run / f"{stage}.pt"
        clip_signature = self.frozen_clip()[1] if stage in ("prior", "decoder") else None
        if clip_signature and path.is_file() and load_checkpoint(path).get("clip_signature") != clip_signature:
            raise ValueError(f"{path} was trained on the embeddings of another CLIP: delete it and {stage}.resume.pt, or use another --out")
        tokenizer = self.tokenizer().state_dict() if stage in ("clip", "prior", "decoder") else None

        def header(weights):
            return {"config": configs.to_dict(self.config), "model_config": asdict(cfg.model), "tokenizer": tokenizer,
                    "clip_signature": signature(weights) if stage == "clip" else clip_signature}

        torch.manual_seed(self.config.data.seed)
        model = MODELS[stage][0](cfg.model).to(self.device, memory_format=torch.channels_last)     # much faster convolutions on a CPU
        model, _ = fit(stage, model, draw, loss_fn, cfg.train, self.run, header, self.resume, self.config.data.seed)
        report.losses(self.run, stage)
        return model

    def batches(self, stage, n):
        """draw(generator) -> indices (B,) of distinct examples among n; fewer than batch_size if there are not as many."""
        size = min(getattr(self.config, stage).train.batch_size, n)
        return lambda generator: torch.randperm(n, generator=generator)[:size]


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


# ---------------------------------------------------------------------------------------------------------------- one function per stage

def train_tokenizer(job):
    """Learns merges from the captions; the models' vocabulary is what comes out."""
    captions = job.pictures.captions()
    tokenizer = BPETokenizer.train(captions, job.config.tokenizer.vocab_size)
    write_json(tokenizer.state_dict(), job.run / "tokenizer.json")
    print(f"tokenizer: {tokenizer.vocab_size} ids, {len(tokenizer.merges)} merges from {len(captions)} captions")
    print(f"tokenizer: {captions[0]!r} -> {[tokenizer.decode([i]) for i in tokenizer.encode(captions[0])]}")


def train_clip(job):
    """Which caption belongs to which picture? (CLIP Fig. 3)"""
    pictures, captions = job.table("train", job.config.clip.model.image_size)
    tokens, indices = job.tokens(captions), job.batches("clip", len(captions))

    def draw(generator):
        i = indices(generator)
        return to_float(pictures[i.to(pictures.device)].to(job.device)), tokens[i.to(job.device)]

    job.train("clip", draw, lambda model, batch, generator: model.loss(*batch))
    pictures, captions = job.table("val", job.config.clip.model.image_size)
    accuracy = report.similarity(job.run, *job.embed(pictures, captions), captions)
    print(f"clip: finds the right caption for {accuracy:.1%} of {len(captions)} unseen pictures")


def train_prior(job):
    """From a caption to the embedding of a picture (unCLIP §2.2)."""
    captions, z_img, z_txt = job.embeddings()
    tokens, indices = job.tokens(captions), job.batches("prior", len(captions))

    def draw(generator):
        i = indices(generator).to(job.device)
        return z_img[i], z_txt[i], tokens[i]

    prior = job.train("prior", draw, lambda model, batch, generator: model.loss(*batch, generator=generator))
    pictures, captions = (part[:64] for part in job.table("val", job.config.clip.model.image_size))
    z_img, z_txt = job.embed(pictures, captions)
    sampled = prior.sample(job.tokens(captions), z_txt, generator=torch.Generator().manual_seed(0))
    of_prior, of_text, found = report.closeness(job.run, sampled, z_img, z_txt, captions)
    print(f"prior: cosine with the true z_img {of_prior:.3f} (z_txt: {of_text:.3f}); {found:.1%} of samples nearest to their caption")


def train_decoder(job):
    """From the true embedding of a picture, and its caption, to the picture (unCLIP §2.1)."""
    _, z_img, _ = job.embeddings()
    pictures, captions = job.table("train", job.config.decoder.model.image_size)
    tokens, indices = job.tokens(captions), job.batches("decoder", len(captions))

    def draw(generator):
        i = indices(generator)
        images = to_float(pictures[i.to(pictures.device)].to(job.device)).contiguous(memory_format=torch.channels_last)
        return images, z_img[i.to(job.device)], tokens[i.to(job.device)]

    decoder = job.train("decoder", draw, lambda model, batch, generator: model.loss(*batch, generator=generator))
    seen, captions = (part[:16] for part in job.table("val", job.config.clip.model.image_size))
    true, _ = (part[:16] for part in job.table("val", job.config.decoder.model.image_size))
    drawn = decoder.sample(job.embed(seen, captions)[0], job.tokens(captions), generator=torch.Generator().manual_seed(0), progress=True)
    report.drawings(job.run, to_float(true), drawn, captions)


def train_upsampler(job, stage):
    """From a spoilt small crop to the sharp large one (unCLIP §2.1)."""
    cfg = getattr(job.config, stage).model
    pictures, _ = job.pictures.table("train", cfg.high_size, getattr(job.config.data, f"{stage}_images"))
    indices = job.batches(stage, len(pictures))

    def draw(generator):
        crops = random_crop(pictures[indices(generator).to(pictures.device)], cfg.crop_size, generator)
        return to_float(crops.to(job.device)).contiguous(memory_format=torch.channels_last)

    upsampler = job.train(stage, draw, lambda model, batch, generator: model.loss(batch, generator=generator))
    true, _ = job.pictures.table("val", cfg.high_size, 3)
    low = to_float(job.pictures.table("val", cfg.low_size, 3)[0]).to(job.device)
    high = upsampler.sample(low, generator=torch.Generator().manual_seed(0), progress=True)
    report.enlargements(job.run, stage, low, high, to_float(true))


TRAIN = {"tokenizer": train_tokenizer, "clip": train_clip, "prior": train_prior, "decoder": train_decoder,
         "upsampler1": lambda job: train_upsampler(job, "upsampler1"), "upsampler2": lambda job: train_upsampler(job, "upsampler2")}
