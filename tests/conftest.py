"""What several test files share: the scripts at the top level, and one small trained run."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini_dalle2 import configs                                            # noqa: E402

# The micro preset with three steps a stage: every part runs, nothing is learned.
SMALL = ["--preset=micro", "--device=cpu", "--data.images=40", "--data.val_images=8", "--data.upsampler1_images=6",
         "--data.upsampler2_images=4", *(f"--{stage}.{key}" for stage in configs.MODELS for key in ("steps=3", "save_every=2", "log_every=1"))]
SMALL += ["--prior.sampling_steps=2", "--decoder.sampling_steps=2", "--upsampler1.sampling_steps=2", "--upsampler2.sampling_steps=2"]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a finished run of all stages. Not to be written into."""
    import train                                                           # the script at the top level
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    assert train.main([*SMALL, f"--out={folder}"]) == 0
    return folder
