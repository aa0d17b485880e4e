"""What all notebooks share: the path to the package, and one style for all figures.

    from look import pictures, plt

Figures have an opaque white background, so that they are readable on a dark page and in print.
This file contains no model and no formula.
"""

import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

# Find the package without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# tqdm suggests widgets for its progress bars. The notebooks show no progress bars.
warnings.filterwarnings("ignore", message="IProgress not found")

plt.rcParams.update({
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "text.color": "black", "figure.dpi": 90, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "image.interpolation": "nearest",
})


def to_array(image):
    """Convert a PIL image or a tensor (3, S, S) in [-1, 1] to uint8 (S, S, 3) for matplotlib."""
    if torch.is_tensor(image):
        values = ((image.detach().float() + 1) * 127.5).round().clamp(0, 255)
        return values.byte().permute(1, 2, 0).numpy()
    return np.asarray(image.convert("RGB"))


def pictures(rows, above=None, left=None, beneath=None, title=None, side=1.15):
    """Show rows of pictures, each `side` inches wide.

    A picture is a PIL image, a tensor (3, S, S) in [-1, 1], or None for a gap. A thin frame shows
    the border of a picture whose background is white.

    above: one text per column. left: one text per row. beneath: rows of texts, one per picture.
    """
    rows = [list(row) for row in rows]
    columns = max(map(len, rows))
    texts = [str(text) for row in beneath or [] for text in row if text]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    labels = [line for text in left or [] for line in text.split("\n")]
    letters = max(map(len, labels), default=-4)

    width = columns * (side + 0.08) + 0.07 * letters + 0.28
    height = len(rows) * (side + 0.08 + 0.15 * lines)
    height += 0.22 if above else 0
    height += 0.25 if title else 0
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=(width, height))
    for i, row in enumerate(rows):
        for j, ax in enumerate(axes[i]):
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            if j < len(row) and row[j] is not None:
                ax.imshow(to_array(row[j]))
                ax.spines[:].set(visible=True, color="0.85", linewidth=0.6)
            else:
                ax.spines[:].set_visible(False)
                # A gap is as wide as a picture. Otherwise its row's label would not be aligned.
                ax.set_box_aspect(1)
            if beneath and j < len(beneath[i]) and beneath[i][j]:
                ax.set_xlabel(beneath[i][j], fontsize=8, labelpad=3)
            if above and i == 0 and j < len(above):
                ax.set_title(above[j], fontsize=9)
        if left and left[i]:
            axes[i, 0].set_ylabel(left[i], rotation=0, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    plt.show()
