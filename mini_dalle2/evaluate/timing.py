"""How long an evaluation takes: measured speeds, estimates for recipes, and a progress bar.

Read next: command.py.
"""

import time

import torch

from ..runtime.processes import world
from .recipes import Inverted, Sampled
from .seen import Seen

# An inversion evaluates the network about so many times per sampling step.
INVERSION = 8


def seconds_per_unit(work):
    """Time work(1) and work(6): five units, without what every call needs.

    work(1) is called twice, because the first call of anything takes longer.
    """
    seconds = []
    for amount in (1, 1, 6):
        began = time.perf_counter()
        work(amount)
        seconds.append(time.perf_counter() - began)
    return max(0.0, seconds[2] - seconds[1]) / 5


class Timing:
    """Estimates for a Lab. Each speed is measured once, when it is first needed."""

    def __init__(self, lab):
        self.lab = lab
        self.model = lab.model
        # A tqdm bar in seconds, while an experiment is at work.
        self.bar = None

    def decoder(self):
        """Seconds for one step of the decoder for one picture."""
        tokens, z = self.example()

        def work(steps):
            self.model.base(z, tokens, [0] * len(z), guidance=1.0, steps=steps)

        return self.lab.remembered("decoder speed", lambda: seconds_per_unit(work) / len(z))

    def prior(self):
        """Seconds for one step of the diffusion prior for one caption."""
        tokens, z = self.example()

        def work(steps):
            generator = torch.Generator().manual_seed(0)
            self.model.prior.sample(tokens, z, steps=steps, generator=generator)

        return self.lab.remembered("prior speed", lambda: seconds_per_unit(work) / len(z))

    def grader(self):
        """Seconds for the grader to read one picture; 0 for pictures that it cannot read."""
        def work(count):
            table, captions = self.lab.real()
            return Seen(self.lab, table[:count], captions[:count]).grades

        if not self.lab.shapes:
            return 0.0
        return self.lab.remembered("grader speed", lambda: seconds_per_unit(work))

    def example(self):
        """Return (tokens, z_img of zeros) for one batch."""
        n = min(self.lab.n, self.model.BATCH)
        tokens = self.lab.tokens(self.lab.real()[1][:n])
        return tokens, torch.zeros(n, self.model.clip.cfg.clip_dim, device=self.model.device)

    def seconds(self, recipe):
        """Estimate the seconds for a settled recipe, without its ingredients."""
        if isinstance(recipe, Sampled):
            passes = 1 if recipe.guidance == 1 else 2
            return self.decoder() * recipe.n * recipe.steps * passes
        if isinstance(recipe, Inverted):
            steps = self.model.decoder.cfg.sampling_steps
            return self.decoder() * recipe.n * steps * INVERSION
        if recipe.prior in ("true", "z_txt"):
            return 0.0
        cfg = self.model.prior.cfg
        if recipe.prior == "ar":
            steps = recipe.steps or self.model.ar_prior.codes.count
        else:
            steps = recipe.steps or cfg.sampling_steps
        # By a rule, one sample is taken instead of the better of several candidates, and each
        # process takes all of them.
        return self.prior() * recipe.n * steps / (cfg.candidates if recipe.rule else world())

    def grading(self, recipes):
        """Estimate the seconds that the grader needs for what recipes make."""
        return self.grader() * sum(one.n for one in recipes if isinstance(one, Sampled))

    def spent(self, seconds):
        """Move the bar on by an estimate."""
        if self.bar is not None:
            self.bar.update(min(seconds, max(0.0, self.bar.total - self.bar.n)))
