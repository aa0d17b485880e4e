"""Makes what recipes ask for, once, and keeps it in RUN/evaluate/cache-….

The name of that folder follows from the run's weights, its tokenizer and its true pictures (see
Lab.cache_digits), a file's name from its recipe. An interrupted evaluation goes on with the files
that are there.

Shapes: n pictures, S side, D = clip_dim, L context length; tables are uint8 (n, 3, S, S).
References: unCLIP (2204.06125) §3.1 (inversion), §3.2 (slerp), §3.3 (text diffs).
Read next: experiments.py.
"""

import contextlib
import copy
import shutil
import time
from dataclasses import replace

import torch
from torch.nn import functional as F

from ..data.pixels import to_pil, to_uint8
from ..pipeline import batched
from ..runtime.files import load_checkpoint, save_checkpoint
from ..runtime.processes import agreed, gather_rows, is_main, own_part, world
from ..sampling import (
    analytic_step, ddim_step, ddpm_step, sample_loop, slerp, strided_timesteps)
from .lab import digest
from .recipes import Embed, Inverted, Sampled, ingredients, settled
from .seen import Seen
from .timing import Timing


class Maker:
    """Makes what recipes ask for with the models of a Lab."""

    def __init__(self, lab):
        self.lab = lab
        self.model = lab.model
        self.timing = Timing(lab)
        # {settled recipe: seconds it took}
        self.took = {}

    # ---------------------------------------------------------------- once, and kept

    def settled(self, recipe):
        """Fill in what a recipe leaves to this run's configuration."""
        return settled(recipe, self.model)

    def ingredients(self, recipe):
        """Return the recipes that a recipe needs, then the recipe itself; all of them settled."""
        return ingredients(recipe, self.model)

    def digits(self, recipe):
        """Return digits that change with what a settled recipe makes, apart from the folder's."""
        n = self.lab.n if recipe.of == "edits" else None
        by_glide = isinstance(recipe, Sampled) and recipe.glide
        return digest(recipe, n, by_glide and self.lab.signature_of("glide"))

    def place(self, recipe):
        """Return the file that holds what a settled recipe makes."""
        kind = type(recipe).__name__.lower()
        return self.lab.cache / f"{kind}-{self.digits(recipe)}.pt"

    def missing(self, recipes):
        """List all that has to be made for recipes, ingredients first, each once."""
        parts = dict.fromkeys(part for recipe in recipes for part in self.ingredients(recipe))
        return agreed([part for part in parts
                       if part not in self.lab.memory and not self.place(part).is_file()])

    def make(self, recipe):
        """Return what a recipe makes: pictures, embeddings or noise.

        It comes from memory or from disk; otherwise it is made now and kept.
        """
        recipe = self.settled(recipe)
        return self.lab.remembered(recipe, lambda: self.load_or_make(recipe))

    def load_or_make(self, recipe):
        """Return what a settled recipe makes, from disk if it is there."""
        path = self.place(recipe)
        found = None
        # A damaged file is made again.
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            saved = load_checkpoint(path, "cache")
            if torch.is_tensor(saved["made"]):
                found, self.took[recipe] = saved["made"], saved["seconds"]
        if agreed(found is not None):
            return found
        began = time.perf_counter()
        found = self.make_now(recipe).cpu()
        self.took[recipe] = time.perf_counter() - began
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint({"stage": "cache", "made": found, "recipe": repr(recipe),
                             "seconds": self.took[recipe]}, path)
        return found

    def make_now(self, recipe):
        """Make what a settled recipe asks for."""
        if isinstance(recipe, Embed):
            return self.make_embeddings(recipe)
        if isinstance(recipe, Inverted):
            return self.make_noise(recipe)
        return self.make_pictures(recipe)

    def seen(self, recipe):
        """Return the pictures of a Sampled as `Seen`."""
        recipe = self.settled(recipe)
        captions = self.lab.real(recipe.of)[1][:recipe.n]
        return self.lab.remembered(
            ("seen", recipe), lambda: Seen(self.lab, self.make(recipe), captions))

    def sweep(self):
        """Delete what was made with other weights, pictures or code."""
        for folder in self.lab.folder.glob("cache-*") if is_main() else ():
            if folder != self.lab.cache:
                shutil.rmtree(folder, ignore_errors=True)

    # ---------------------------------------------------------------- embeddings and noise

    def seeds(self, recipe, rows):
        """Return a seed for each picture: no two of a set start from the same noise."""
        return [1_000_003 * recipe.seed + i for i in rows]

    @torch.no_grad()
    def make_embeddings(self, recipe):
        """Make the z_img (n, D) of an Embed."""
        if recipe.prior == "true":
            return self.lab.true_embeddings(recipe.n, recipe.of)
        captions = self.lab.real(recipe.of)[1]
        each = self.timing.seconds(recipe) / recipe.n
        found = []
        # The processes share out each of these batches.
        for rows in batched(range(recipe.n), world() * self.model.BATCH):
            tokens = self.lab.tokens([captions[i] for i in rows])
            seeds = self.seeds(recipe, rows)
            if recipe.rule is None:
                # One sketch, so no choice: the paper's comparison with GLIDE has none.
                found.append(self.model.embed(tokens, seeds, recipe.prior, sketches=1))
            else:
                generator = torch.Generator().manual_seed(seeds[0])
                found.append(self.sample_by_rule(tokens, recipe, generator))
            self.timing.spent(each * len(rows))
        return torch.cat(found)

    def sample_by_rule(self, tokens, recipe, generator):
        """Sample the diffusion prior's z_img (B, D) by a rule of its own, one for each caption."""
        prior = self.model.prior
        z_txt = self.model.clip.encode_text(tokens).float()
        steps = {"analytic": analytic_step(prior.cov), "β̃": ddpm_step, "DDIM": ddim_step(0.0)}
        x_T = torch.randn(len(tokens), prior.cfg.clip_dim, generator=generator).to(z_txt.device)
        denoise = prior.denoiser(tokens, z_txt, prior.cfg.guidance)
        timesteps = strided_timesteps(prior.cfg.num_timesteps, recipe.steps)
        step = steps[recipe.rule]
        return prior.unscale(
            sample_loop(prior.diffusion, denoise, x_T, step, timesteps, generator))

    def make_noise(self, recipe):
        """Make the x_T (n, 3, S, S) of an Inverted; each process inverts its part."""
        size = self.lab.size
        own = own_part(self.lab.real(recipe.of)[0][:recipe.n])
        found = [torch.empty(0, 3, size, size, device=self.model.device)]
        for part in own.split(self.model.BATCH):
            if len(part):
                found.append(self.model.invert([to_pil(picture) for picture in part])[1])
                self.timing.spent(self.timing.seconds(recipe) * len(part) / len(own))
        return gather_rows(torch.cat(found))

    # ---------------------------------------------------------------- pictures

    @torch.no_grad()
    def make_pictures(self, recipe):
        """Make the table of pictures of a Sampled."""
        model = self.sampler(recipe)
        captions = self.lab.real(recipe.of)[1][:recipe.n]
        tokens = self.lab.tokens(captions) if recipe.told or recipe.z is None else None
        z, x_T = self.apply_move(recipe, self.given(recipe), self.first_noise(recipe))
        eta = None if recipe.rule == "ancestral" else float(recipe.rule)
        each = self.timing.seconds(recipe) / recipe.n
        found = []
        for rows in batched(range(recipe.n), world() * self.model.BATCH):
            z_rows, token_rows, noise_rows = (
                None if x is None else x[rows.start:rows.stop] for x in (z, tokens, x_T))
            images = model.base(
                z_rows, token_rows, self.seeds(recipe, rows), x_T=noise_rows,
                guidance=recipe.guidance, steps=recipe.steps, eta=eta)
            found.append(to_uint8(images))
            self.timing.spent(each * len(rows))
        return torch.cat(found)

    def sampler(self, recipe):
        """Return the DALLE2 that samples: with the run's decoder or the baseline."""
        model = self.lab.glide if recipe.glide else self.model
        if recipe.rule == "ancestral" and model.decoder.cfg.sampler != "ddpm":
            model = copy.copy(model)
            model.decoder = copy.copy(model.decoder)
            model.decoder.cfg = replace(model.decoder.cfg, sampler="ddpm")
        return model

    def given(self, recipe):
        """Return the z_img that a Sampled starts from, before any move; None if it has none."""
        if recipe.z is None:
            return None
        z = self.make(Embed(recipe.starts, recipe.of, recipe.z, recipe.seed))
        return z.to(self.model.device)

    def first_noise(self, recipe):
        """Return the x_T that a Sampled starts from; None if each picture has its own."""
        if recipe.x_T == "own":
            return None
        if recipe.x_T == "one":
            return self.model.start(recipe.seed).expand(recipe.n, -1, -1, -1)
        return self.make(Inverted(recipe.starts, recipe.of)).to(self.model.device)

    def apply_move(self, recipe, z, x_T):
        """Do to (z_img, x_T) what a Sampled says: both of them, moved."""
        n = recipe.n
        move, amount = recipe.move or (None, None)
        if move == "components":
            z = self.model.ar_prior.codes.project(z, amount)
        elif move == "centre":
            # As far from the mean of pictures as z_txt was from the mean of captions.
            prior = self.model.prior
            z = F.normalize(z - prior.whitening_txt.mean + prior.whitening.mean, dim=-1)
        elif move == "between":
            # From the first n to n others: no picture is in two pairs.
            z = slerp(z[:n], z[n:], amount)
            x_T = slerp(x_T[:n], x_T[n:], amount)
        elif move in ("text", "slerp"):
            before = self.lab.shown(recipe.of)[:n]
            after = self.lab.real(recipe.of)[1][:n]
            if move == "text":
                theta = torch.full((n,), float(amount))
                z = self.model.follow(z, before, after, theta, recipe.seed)
            else:
                # The paper's own formula, whatever the decoder sees of z_img.
                change = self.model.encode_text(after) - self.model.encode_text(before)
                z = slerp(z, F.normalize(change, dim=-1), amount)
        return z, x_T
