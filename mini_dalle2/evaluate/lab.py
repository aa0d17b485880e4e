"""The laboratory of an evaluation: a finished run, its variants, and the true pictures.

    Lab: run, judge, true pictures  →  Maker: pictures by recipes  →  Seen: what is found in them

train.py trains two models for it, among others (training/variants.py). RUN/judge.pt is a CLIP of
another seed and width: the prior was optimised against the run's own CLIP. RUN/glide.pt is the
decoder again, as large and trained for as many steps, but without z_img: the paper's baseline.
Nothing is trained here.

Shapes: N pictures, S side, D = clip_dim, W width of the judge; tables are uint8 (N, 3, S, S).
References: unCLIP (2204.06125) §5; GLIDE (2112.10741). Read next: recipes.py, making.py.
"""

import copy
import functools
import hashlib
import warnings
from pathlib import Path

import torch

from ..configs import VARIANTS
from ..data.folder import CaptionedFolder
from ..data.grid import caption_grid, save_sheet
from ..data.pixels import from_pil, to_float, to_pil
from ..data.shapes import CaptionedShapes, render
from ..data.tables import Pictures, load_table
from ..pipeline import DALLE2, load_model
from ..runtime.commands import how_to_delete, is_run, sentence, train_command
from ..runtime.files import load_checkpoint, read_json, signature
from ..runtime.processes import agreed, is_main
from ..training import overrides
from ..training.made import is_made, what_is_learned
from ..training.variants import variant
from .captions import EDITS, choose_scenes
from .seen import Seen, few_colours

# Raise it when what a recipe or an experiment makes changes: all that was made before is then
# made again.
CACHE_FORMAT = 2
# Captions: a quarter of them is more than the k neighbours of precision and recall.
LEAST = 16
MISSING, UNFINISHED = UNMADE = "is missing", "is not finished"


def digest(*things):
    """Return 16 hexadecimal digits that change when the printed form of anything given does."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


def files_of(source, run):
    """List the files of a folder of captioned pictures, outside the run: (name, size, time).

    An empty list for captioned shapes, which are rendered.
    """
    if source == "shapes":
        return []
    found = []
    for path in sorted(Path(source).resolve().rglob("*")):
        if path.is_file() and run.resolve() not in path.parents:
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return found


def load_finished(run, device):
    """Load a run whose models are all finished. Raises FileNotFoundError, ValueError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is not finished")
        try:
            return DALLE2.load(run, device)
        except UserWarning as unfinished:
            raise ValueError(f"{unfinished}, and evaluate it then") from None


def check_is_run(run):
    """Raise ValueError for weights without the run that made them, as the bundled ones."""
    if not (run / "clip.pt").is_file() or is_run(run):
        return
    # The box has a name of its own in runs; so has each further attempt.
    folders = (Path("runs", f"box{i}") for i in ("", *range(2, 1000)))
    out = next(folder for folder in folders if not folder.exists())
    begin = train_command(out, "--from", str(run), "--stage", "evaluation")
    raise ValueError(f"{run} holds weights alone, and an evaluation also needs models to compare "
                     f"with: {begin} trains these; evaluate {out} then")


def load_config(run, model):
    """Read a run's config.json. Raises ValueError if it is damaged or describes other models."""
    try:
        config = overrides.from_dict(read_json(run / "config.json"))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{run}/config.json cannot be used: {sentence(error)}") from None
    if config.decoder.model != model.decoder.cfg or config.clip.model != model.clip.cfg:
        raise ValueError(f"{run}/config.json describes other models than those beside it")
    return config


class Lab:
    """A finished run with its judge, its baseline and its true pictures.

    n: how many captions are asked for, fewer if there are fewer than 2n. Raises
    FileNotFoundError, ValueError for a run that cannot be evaluated.
    """

    def __init__(self, run, n, device=None):
        self.run = Path(run)
        self.folder = self.run / "evaluate"
        check_is_run(self.run)
        self.model = load_finished(self.run, device)
        self.config = load_config(self.run, self.model)
        self.shapes = self.config.data.source == "shapes"
        self.pictures = Pictures(self.config.data, self.model.device, self.run)
        self.size = self.config.decoder.model.image_size
        self.memory = {}
        there = 2 * n if self.shapes else len(self.pictures.dataset("val", 1, 2 * n))
        if there < LEAST:
            raise ValueError(
                f"{there} captions are too few to evaluate a run: train a run on more pictures, "
                f"with at least {LEAST} captions in their validation part")
        # The other half are the true pictures that generated ones are compared with.
        self.n = min(n, there // 2)
        self.cache = self.folder / f"cache-{self.cache_digits()}"

    def cache_digits(self):
        """Return digits that change with anything that all cached things depend on."""
        models = self.model.clip, self.model.prior, self.model.ar_prior, self.model.decoder
        weights = [(type(model).__name__, model.cfg, signature(model.state_dict()))
                   for model in models if model]
        files = files_of(self.config.data.source, self.run)
        tokenizer = self.model.tokenizer.state_dict()
        return digest(CACHE_FORMAT, self.config.data, files, tokenizer, weights)

    def remembered(self, name, make):
        """Return make() the first time; after that, what it returned then."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]

    # ---------------------------------------------------------------- variants: judge and baseline

    def why_unusable(self, name):
        """Say why RUN/NAME.pt is no variant of this run, such as "is missing"; None if it is."""
        wanted = what_is_learned(variant(self.config, name), name)
        try:
            checkpoint = load_checkpoint(self.run / f"{name}.pt", name)
            learned = what_is_learned(overrides.from_dict(checkpoint["config"]), name)
            tokenizer, clip = checkpoint["tokenizer"], checkpoint["clip_signature"]
            finished = checkpoint["step"] >= checkpoint["steps"]
        except FileNotFoundError:
            return MISSING
        except (ValueError, KeyError, TypeError):
            return "is damaged"
        if learned != wanted:
            return "was made with other settings"
        if tokenizer != self.model.tokenizer.state_dict():
            return "was made with another tokenizer"
        if VARIANTS[name] == "decoder" and clip != self.clip_signature():
            return "was made with another CLIP"
        return None if finished else UNFINISHED

    def clip_signature(self):
        """Return the signature that models trained on the run's CLIP carry."""
        return self.remembered("clip signature", lambda: load_checkpoint(
            self.run / "clip.pt", "clip").get("clip_signature"))

    def require(self, names):
        """Raise ValueError unless train.py has made these variants; it names the command."""
        reasons = {name: self.why_unusable(name) for name in VARIANTS}
        lacking = agreed({name: reasons[name] for name in names if reasons[name]})
        if not lacking:
            return
        found = ", ".join(f"{self.run}/{name}.pt {reason}" for name, reason in lacking.items())
        if (self.folder / "judge.pt").is_file():
            found += f" ({self.folder}/judge.pt, of an older version, cannot be used)"
        stage = list(lacking)[0] if len(lacking) == 1 else "evaluation"
        asked = VARIANTS if stage == "evaluation" else lacking
        # --resume keeps what is usable and goes on with what is begun, but keeps what is stale too.
        stale = [name for name in asked if reasons[name] not in (None, *UNMADE)]
        begun = [name for name in asked if name not in stale and is_made(self.run, name)]
        command = train_command(self.run, "--stage", stage, resume=bool(begun))
        first = f"{how_to_delete(self.run, stale)}, then " if stale else ""
        raise ValueError(f"{found}: {first}run {command} first")

    def signature_of(self, name):
        """Return the signature of a variant's weights; None if it is not usable."""
        def read():
            usable = self.why_unusable(name) is None
            return agreed(signature(self.checkpoint(name)["ema"]) if usable else None)

        return self.remembered(("signature", name), read)

    def checkpoint(self, name):
        """Return the checkpoint of a variant."""
        return self.loaded(name)[1]

    def loaded(self, name):
        """Return (model on the device, checkpoint) of a variant."""
        def load():
            model, checkpoint = load_model(self.run / f"{name}.pt", name)
            layout = torch.channels_last
            return model.to(self.model.device, memory_format=layout), checkpoint

        return self.remembered(("variant", name), load)

    @property
    def judge(self):
        """The judge, a CLIP."""
        return self.loaded("judge")[0]

    @functools.cached_property
    def glide(self):
        """A DALLE2 whose decoder is the baseline."""
        model = copy.copy(self.model)
        model.decoder = self.loaded("glide")[0]
        return model

    @torch.no_grad()
    def embed_pictures(self, pictures, clip=None):
        """Embed a table of pictures by the judge or another CLIP: (N, D)."""
        clip = clip or self.judge
        side = clip.cfg.image_size
        found = []
        for part in pictures.split(256):
            if part.shape[-1] == side:
                pixels = to_float(part)
            else:
                pixels = self.model.pixels([to_pil(picture) for picture in part], side)
            found.append(clip.encode_image(pixels.to(self.model.device)))
        return torch.cat(found).cpu()

    def features_of(self, pictures):
        """Return the judge's last layer for a table of pictures (N, W), before its projection."""
        found = []

        def keep(module, inputs):
            found.append(inputs[0].cpu())

        hook = self.judge.visual.projection.register_forward_pre_hook(keep)
        self.embed_pictures(pictures)
        hook.remove()
        return torch.cat(found)

    @torch.no_grad()
    def embed_captions(self, captions, clip=None):
        """Embed captions by the judge or another CLIP: (N, D)."""
        clip = clip or self.judge
        tokens = self.tokens(captions)
        return torch.cat([clip.encode_text(part) for part in tokens.split(500)]).cpu()

    def tokens(self, captions):
        """Return tokens (N, L) on the device; a caption that is too long loses its end."""
        length = self.config.clip.model.context_length
        tokens = self.model.tokenizer.tokenize(captions, length, truncate=True)
        return tokens.to(self.model.device)

    # ---------------------------------------------------------------- true pictures

    def scenes(self, of):
        """Of captioned shapes: (data set, which of its scenes, captions asked for); see `real`."""
        def make():
            split = "held_out" if of == "held_out" else "val"
            length = max(20_000, 4 * self.n)
            data = CaptionedShapes(split, 1, self.config.data.seed, length)
            texts = ((i, data.scene(i).text) for i in range(len(data)))
            per_edit = -(-self.part(4) // len(EDITS))
            count = {"edits": per_edit, "pairs": self.n}.get(of, 4 * self.n)
            chosen, captions = zip(*choose_scenes(texts, of, count))
            return data, chosen, list(captions)

        return self.remembered(("scenes", of), make)

    def real(self, of="val", size=None):
        """True pictures: (table (N, 3, S, S), captions), S = `size` or the decoder's size.

        of: "val"; "held_out", combinations that training has not seen (a folder's subfolder of
        this name). Of captioned shapes also "pairs", two objects of different shapes, and
        "edits", whose captions say what the pictures are to become (see captions.py).
        N is 4n, or as many as there are; n for "pairs".
        """
        size = size or self.size

        def make():
            if self.shapes:
                data, chosen, captions = self.scenes(of)
                pictures = [from_pil(render(data.scene(i), size)) for i in chosen]
                return torch.stack(pictures), captions
            if of == "val":
                data = self.pictures.dataset(of, size, 10 ** 9)
            else:
                cfg = self.config.data
                data = CaptionedFolder(Path(cfg.source, of), size, cfg.outside)
            return load_table(data, progress=False)

        return self.remembered(("real", of, size), make)

    def shown(self, of):
        """Return the captions of the true pictures; for "edits", those before the edit."""
        if of != "edits":
            return self.real(of)[1]
        data, chosen, _ = self.scenes(of)
        return [data.scene(i).text for i in chosen]

    @property
    def has_held_out(self):
        """Whether there are true pictures of combinations that training has not seen."""
        return self.shapes or Path(self.config.data.source, "held_out").is_dir()

    def part(self, k, of=None):
        """Return n / k, but at least 4; with `of`, no more than half of those true pictures."""
        count = max(4, self.n // k)
        return count if of is None else min(count, len(self.real(of)[1]) // 2)

    def true(self, n, of="val", first=0):
        """Return n true pictures as `Seen`, beginning with number `first`."""
        def make():
            table, captions = self.real(of)
            return Seen(self, table[first:first + n], captions[first:first + n])

        return self.remembered(("true", n, of, first), make)

    def others(self, of="val"):
        """Return the true pictures whose captions are not asked for, as `Seen`.

        Generated pictures are compared with these: pictures that a model has memorised then do
        not lower the distance.
        """
        n = self.part(1, of)
        return self.true(len(self.real(of)[1]) - n, of, first=n)

    def true_embeddings(self, n, of="val"):
        """Return the run's own z_img of the first n true pictures (n, D), on the CPU."""
        table, _ = self.real(of, self.model.clip.cfg.image_size)
        parts = [self.model.encode_image(to_float(part)) for part in table[:n].split(256)]
        return torch.cat(parts).cpu()

    # ---------------------------------------------------------------- what people look at

    def grid(self, name, rows, labels):
        """Write RUN/evaluate/NAME.png, rows of labelled PIL images; return the file's name."""
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet = few_colours(caption_grid(rows, labels))
            save_sheet(sheet, self.folder / f"{name}.png", optimize=True)
        return f"{name}.png"
