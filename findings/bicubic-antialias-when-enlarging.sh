#!/usr/bin/env bash
# antialias=True changes what torch's bicubic makes of a picture that is enlarged.
#
# Expected: the flag matters for shrinking only, where pixels would be skipped. torch's page says
#   that it matches Pillow "for downsampling". Bilinear enlarging is indeed the same with it.
# Seen: bicubic enlarging by 4 is not. Without the flag torch uses Keys' cubic with a = -0.75, with
#   it a = -0.5. An edge from 0 to 1 overshoots by 0.110 without it and by 0.073 with it.
#   In a disc on 64 x 64 pixels, enlarged to 256, colours move by up to 14 of 255 levels.
#   With the flag the result is Pillow's BICUBIC, to float32's rounding.
# Versions: torch 2.13.0, Pillow 13.0.0, Python 3.11.
# For a user: unCLIP's upsamplers see their input enlarged so, beside x_t. Karlo's code and
#   diffusers' unCLIP pipeline (0.42.1) set the flag. Without it, upsamplers trained with the one
#   kernel are fed the sharper edges of the other. So set it for enlarging, too.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" numpy==2.4.6 pillow==13.0.0

cat > "$work/look.py" <<'PY'
import platform
import sys

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image

print(f"torch {torch.__version__}, Pillow {PIL.__version__}, Python {platform.python_version()}")


def enlarge(picture, mode, antialias):
    """A picture (n, n) in [0, 1], four times as large."""
    side = 4 * len(picture)
    return F.interpolate(picture[None, None], size=(side, side), mode=mode, align_corners=False,
                         antialias=antialias)[0, 0]


def cubic_a(antialias):
    """Keys' constant a, read off what one bright column adds to a pixel farther away.

    At a distance d from 1 to 2 small pixels the kernel is a (d^3 - 5 d^2 + 8 d - 4).
    """
    column = torch.zeros(16, 16)
    column[:, 8] = 1
    d = (38 + 0.5) / 4 - (8 + 0.5)                  # from large column 38 to small column 8
    return (enlarge(column, "bicubic", antialias)[32, 38] / (d**3 - 5 * d**2 + 8 * d - 4)).item()


edge = torch.zeros(16, 16)
edge[:, 8:] = 1
y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
disc = ((x - 31.5) ** 2 + (y - 31.5) ** 2 < 20**2).float()

over, a = {}, {}
for antialias in (False, True):
    over[antialias] = enlarge(edge, "bicubic", antialias).max().item() - 1
    a[antialias] = cubic_a(antialias)
    print(f"bicubic, antialias={antialias!s:5}  a = {a[antialias]:.4f}  "
          f"an edge overshoots by {over[antialias]:.4f}")
levels = {mode: 255 * (enlarge(disc, mode, True).clamp(0, 1)
                       - enlarge(disc, mode, False).clamp(0, 1)).abs().max().item()
          for mode in ("bilinear", "bicubic")}
pillow = Image.fromarray(disc.numpy()).resize((256, 256), Image.Resampling.BICUBIC)
apart = {antialias: np.abs(np.asarray(pillow) - enlarge(disc, "bicubic", antialias).numpy()).max()
         for antialias in (False, True)}
print(f"a disc, 64 to 256: the flag moves bilinear by {levels['bilinear']:.4f} of 255 levels, "
      f"bicubic by {levels['bicubic']:.1f}")
print(f"from Pillow's BICUBIC: {apart[False]:.1e} without the flag, {apart[True]:.1e} with it")

still = (abs(a[False] + 0.75) < 1e-3 and abs(a[True] + 0.5) < 1e-3 and levels["bilinear"] < 1e-3
         and levels["bicubic"] > 5 and apart[True] < 1e-5 < 0.01 < apart[False])
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" "$work/look.py"
