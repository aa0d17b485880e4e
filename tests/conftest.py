"""What several test files share: one small trained run, models, captions and pictures to try."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

# With `pytest --numprocesses=2` each process gets one thread, and so do the programs that it starts. This must
# be known before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini_dalle2 import configs  # noqa: E402

# The micro preset with three steps a stage: every part runs, nothing is learned.
SMALL = [
    "--preset=micro",
    "--device=cpu",
    "--data.images=40",
    "--data.val_images=8",
    "--data.upsampler1_images=6",
    "--data.upsampler2_images=4",
]
SMALL += [
    f"--{stage}.{key}"
    for stage in configs.MODELS
    for key in ("steps=3", "save_every=2", "log_every=1")
]
SMALL += [
    "--prior.sampling_steps=2",
    "--decoder.sampling_steps=2",
    "--upsampler1.sampling_steps=2",
    "--upsampler2.sampling_steps=2",
]


def pytest_addoption(parser):
    """--notebooks: what takes minutes is left out otherwise."""
    parser.addoption(
        "--notebooks", action="store_true", help="also execute the notebooks, from top to bottom"
    )


def commands(text):
    """The command lines of all ```bash blocks: list of lists of words, without comments.

    Commands that && joins are parted, and lines that \\ parts are joined.
    """
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            found += [words] if words else []
    return found


def lively(model, amount):
    """Move every parameter of a model by noise, so that no zero or small start hides a path."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * torch.randn_like(p))
    return model


def exact_tables(scheduler, betas):
    """Give a scheduler of diffusers tables in float64.

    So a test compares its formulas, and not its cumulative product in float32.
    """
    scheduler.betas = torch.tensor(betas, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def three_words(n, length, eot, generator):
    """Tokens (n, length) of n captions of three words.

    The captions share the first word. The second is random, and the third is an id above `eot`.
    Behind them stand the end and zeros.
    """
    tokens = torch.zeros(n, length, dtype=torch.long)
    words = (
        torch.full((n,), eot - 1),
        torch.randint(1, eot - 1, (n,), generator=generator),
        eot + 1 + torch.arange(n) % 9,
    )
    tokens[:, :4] = torch.stack([*words, torch.full((n,), eot)], dim=1)
    return tokens


class ToyStage:
    """A stage of training/stages.py without a run: a model, and functions for batch and loss."""

    seed = 0
    indices = None

    def __init__(self, name, model, cfg, batch, loss):
        self.name = self.base = self.title = name
        self.model = model
        self.cfg = cfg
        self.batch = batch
        self.loss = loss

    def load(self):
        """Nothing: `batch` has all it needs."""

    def new_model(self):
        """The model, as it was given."""
        return self.model

    def slow_note(self, seconds):
        """No step is too slow."""

    def lower_rate(self):
        """What to do when the loss is not finite."""
        return f"go on with --resume --{self.name}.lr={self.cfg.lr / 3:.1e}"

    def header(self, ema):
        """What the checkpoint carries."""
        return {"config": {"a": 1}}


class ToyRun:
    """A run folder that holds nothing but what a stage leaves."""

    def __init__(self, folder, resume=False):
        self.folder = folder
        self.resume = resume


def noisy(size=(200, 160)):
    """A picture of noise, of this width and height, always the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a finished run of all stages. Not to be written into."""
    import train  # the script at the top level

    folder = tmp_path_factory.mktemp("runs") / "shapes"
    assert train.main([*SMALL, f"--out={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def judged(run, tmp_path_factory):
    """The same run with the models that only an evaluation needs. Not to be written into."""
    folder = tmp_path_factory.mktemp("judged") / "shapes"
    shutil.copytree(run, folder)
    train_variants(folder)
    return folder


@pytest.fixture(scope="session")
def evaluated(judged, tmp_path_factory):
    """The same run with all its experiments done, by the command. Not to be written into."""
    from mini_dalle2 import evaluate
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(judged, folder)
    assert evaluate.main([f"--run={folder}", "--n=16", "--device=cpu"]) == 0
    return folder


@pytest.fixture
def copied(evaluated, tmp_path):
    """A copy of an evaluated run, to be written into."""
    return shutil.copytree(evaluated, tmp_path / "run")


@pytest.fixture(scope="module")
def synthetic(evaluated):
    """A lab for made-up sets of pictures: large enough for the grader, and without sheets."""
    from mini_dalle2.evaluate import Lab
    lab = Lab(evaluated, 48, "cpu")
    lab.size = 32
    lab.grid = lambda name, rows, labels: f"{name}.png"
    return lab


def train_variants(folder):
    """Train what only an evaluation needs, in the folder of a finished run."""
    import train
    assert train.main(["--stage=evaluation", f"--out={folder}", "--device=cpu"]) == 0
