"""evaluate: the paper's experiments on a finished run, and a report of the results.

It trains nothing: `python train.py --stage evaluation` trains judge and baseline.

    captions, recipes   what is asked for        lab, making, seen, timing   what is made of it
    quality, latent_space, binding, real_pictures   the experiments, with findings and measures
    experiments, report, command                 all of them, as a page, by one command

Read next: command.py.
"""

from .command import known, main
from .experiments import EXPERIMENTS
from .lab import Lab
from .making import Maker
from .report import IN_README, IN_RESULTS, RESULTS, split_page, split_readme, verdict

__all__ = [
    "EXPERIMENTS", "IN_README", "IN_RESULTS", "Lab", "Maker", "RESULTS", "known", "main",
    "split_page", "split_readme", "verdict"]
