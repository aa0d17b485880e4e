"""Recipes: what an experiment needs made, in plain values. making.py makes it.

An experiment names the recipes of all its pictures before the first one is made. So the command
can say how long it will take, and pictures that several experiments need are made only once.

    Embed: z_img    Inverted: x_T    Sampled: pictures, from z_img and x_T

References: unCLIP (2204.06125) §3, §5. Read next: making.py.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Embed:
    """z_img for the first n captions.

    of: whose captions, see Lab.real.
    prior: where z_img comes from: "diffusion" or "ar"; "z_txt"; "true" for the true pictures.
    rule: how the diffusion prior steps, "analytic", "β̃" or "DDIM"; None for its own way.
    steps: sampling steps of such a rule; None for the prior's own number.
    """
    n: int
    of: str = "val"
    prior: str = "diffusion"
    seed: int = 0
    rule: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Inverted:
    """The noise x_T of the first n true pictures, by DDIM inversion."""
    n: int
    of: str = "val"


@dataclass(frozen=True)
class Sampled:
    """The decoder's pictures for the first n captions. None: as the decoder's configuration says.

    of: whose captions and true pictures, see Lab.real.
    z: where z_img comes from, see Embed; None: the decoder is given the caption alone.
    move: what is done to z_img. ("components", K): keep K principal components.
        ("between", θ): go from picture i to picture n + i. ("text", θ): as DALLE2.textdiff.
        ("slerp", θ): the paper's own text diff. ("centre", 1): move z_txt to the mean of z_img.
    told: whether the decoder is told the caption.
    glide: whether the baseline samples, which takes no z_img.
    x_T: the first noise: "own" for each picture; "one" for all; "inverted" from true pictures.
    rule: "ancestral", with the learned variance, or DDIM's η.
    """
    n: int
    of: str = "val"
    z: str | None = "diffusion"
    move: tuple = ()
    told: bool = True
    glide: bool = False
    x_T: str = "own"
    guidance: float | None = None
    steps: int | None = None
    rule: str | float | None = None
    seed: int = 0

    @property
    def starts(self):
        """How many true pictures or captions the n pictures need: two each for a way between."""
        return 2 * self.n if self.move[:1] == ("between",) else self.n


def settled(recipe, model):
    """Fill in what a recipe leaves to a DALLE2's configuration, so that equal recipes are equal."""
    if isinstance(recipe, Sampled):
        return settled_sampling(recipe, model.decoder.cfg)
    if isinstance(recipe, Embed) and recipe.rule and recipe.steps is None:
        return replace(recipe, steps=model.prior.cfg.sampling_steps)
    return recipe


def settled_sampling(recipe, cfg):
    """Fill in what a Sampled leaves to the decoder's configuration."""
    filled = {}
    if recipe.guidance is None:
        filled["guidance"] = cfg.guidance
    if recipe.steps is None:
        filled["steps"] = cfg.sampling_steps
    if recipe.rule is None:
        filled["rule"] = "ancestral" if cfg.sampler == "ddpm" else cfg.eta
    if recipe.glide:
        filled["z"] = None
    return replace(recipe, **filled)


def ingredients(recipe, model):
    """Return the recipes that a recipe needs, then the recipe itself; all of them settled."""
    recipe = settled(recipe, model)
    found = []
    if isinstance(recipe, Sampled) and recipe.z in ("diffusion", "ar"):
        found.append(Embed(recipe.starts, recipe.of, recipe.z, recipe.seed))
    if isinstance(recipe, Sampled) and recipe.x_T == "inverted":
        found.append(Inverted(recipe.starts, recipe.of))
    return [*found, recipe]
