"""The paper's experiments in miniature, in the order of the report.

Each is one function that says what the paper found, what a run of ours shows, and how sure that
is. findings.py says what an experiment is.

References: unCLIP (2204.06125). Read next: command.py, which does them.
"""

from . import binding, latent_space, quality, real_pictures

ALL = (
    quality.fig8, quality.priors, quality.guidance,
    latent_space.components, latent_space.sam, latent_space.variations,
    latent_space.interpolation, latent_space.textdiff,
    binding.binding, quality.steps, real_pictures.pictures)
# {name: Experiment}
EXPERIMENTS = {one.name: one for one in ALL}


def suitable(lab, only):
    """List the experiments to do: `only` these, or all that these pictures allow if it is None.

    Raises ValueError when one was asked for that these pictures do not allow.
    """
    kind = "shapes" if lab.shapes else "folder"
    for name in only or ():
        if EXPERIMENTS[name].data not in ("any", kind):
            needed = "a folder of real pictures" if lab.shapes else "captioned shapes"
            raise ValueError(f"{name} needs {needed}, which {lab.run} did not learn from")
    if only:
        return [one for one in ALL if one.name in only]
    return [one for one in ALL if one.data in ("any", kind)]
