"""What a stage has learned, as pictures in the run folder: NAME_loss.png and NAME.png.

CLIP         cosines of captions and pictures it has never seen; the diagonal should shine
                                                                            (CLIP §2.3, Fig. 3)
priors       how close a sampled z_img comes to the true one; z_txt for comparison
                                                                            (unCLIP §2.2, Fig. 8)
sketch       true pictures, and the averages of all pictures with the same z_img
decoder      true pictures, and those sampled from their z_img              (unCLIP §2.1)
upsamplers   small, enlarged, true                                          (unCLIP §2.1)

Shapes: N pictures or captions of the validation split, D = clip_dim, S side of a picture.
Read next: ../metrics/sets.py, for numbers instead of pictures.
"""

from pathlib import Path

from matplotlib.figure import Figure

from ..data.grid import caption_grid
from ..data.pixels import to_pil
from ..metrics.sets import retrieval_accuracy
from ..runtime.files import atomic_open, read_metrics
from .log import recent_loss


def save_figure(figure, path):
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_open(path) as file:
        figure.savefig(file, format="png", dpi=120)


def loss_curve(folder, name):
    """Plot a stage's losses in metrics.jsonl over steps, and the mean of the last tenth of them."""
    lines = [line for line in read_metrics(folder) if line["stage"] == name]
    if not lines:
        return
    steps = [line["step"] for line in lines]
    values = [line["loss"] for line in lines]
    losses = list(zip(steps, values))
    recent = [recent_loss(losses[:i + 1]) for i in range(len(losses))]
    window = steps[-1] - steps[-2] if len(steps) > 1 else steps[-1]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="0.75", linewidth=1, label=f"mean of {window} steps")
    axes.plot(steps, recent, color="tab:blue", label="mean of the last tenth of the steps")
    if min(values) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss",
             title=f"{name}: {recent[-1]:.4f} after {steps[-1]} steps")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_figure(figure, Path(folder) / f"{name}_loss.png")


def similarity(folder, name, z_img, z_txt, captions, kind, shown=12):
    """Plot the cosines of the first different captions and their pictures; z_img, z_txt (N, D).

    kind: what the pictures are, "unseen" or "training". Returns the accuracy of finding the right
    caption, over all N.
    """
    accuracy = retrieval_accuracy(z_img, z_txt, captions)
    rows = sorted({caption: i for i, caption in enumerate(captions)}.values())[:shown]
    cosine = (z_txt[rows] @ z_img[rows].T).float().cpu().numpy()        # (shown, shown)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    shade = axes.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    for i in range(len(rows)):
        for j in range(len(rows)):
            ink = "white" if abs(cosine[i, j]) > 0.6 else "black"
            axes.text(j, i, f"{cosine[i, j]:.2f}", ha="center", va="center", fontsize=7, color=ink)
    names = [captions[i] if len(captions[i]) < 48 else captions[i][:45] + "…" for i in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xticks(range(len(rows)), [f"picture {j + 1}" for j in range(len(rows))], rotation=45)
    axes.set_title(f"{name}: cosine of caption and picture; right caption found for "
                   f"{accuracy:.1%} of {len(captions)} {kind} pictures")
    figure.colorbar(shade, shrink=0.7)
    save_figure(figure, Path(folder) / f"{name}.png")
    return accuracy


def closeness(folder, name, embeddings, captions, kind):
    """Plot a prior's histograms: cos(sampled z_img, true z_img) and cos(z_txt, true z_img).

    embeddings: (sampled, z_img, z_txt), each (N, D) of unit norm. kind: as in `similarity`.
    Returns (mean cosine of the samples, mean cosine of z_txt, share of the samples whose nearest
    caption is their own).
    """
    sampled, z_img, z_txt = embeddings
    of_prior = (sampled * z_img).sum(-1).float().cpu()                  # (N,)
    of_text = (z_txt * z_img).sum(-1).float().cpu()                     # (N,)
    found = retrieval_accuracy(sampled, z_txt, captions)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for cosine, label, colour in ((of_text, "z_txt itself", "0.6"),
                                  (of_prior, "the prior's sample", "tab:blue")):
        axes.hist(cosine.numpy(), bins=80, range=(-1, 1), alpha=0.7, color=colour,
                  label=f"{label}: mean {cosine.mean():.3f}")
    axes.set(xlabel="cosine with the true z_img", ylabel="captions",
             title=f"{name}: of {len(captions)} {kind} captions, {found:.1%} of samples "
                   f"are nearest to their own caption")
    axes.legend()
    save_figure(figure, Path(folder) / f"{name}.png")
    return of_prior.mean().item(), of_text.mean().item(), found


def side_by_side(folder, name, true, made, captions, columns=8):
    """Show rows of true pictures, and below each one what was made from its z_img.

    true, made: (N, 3, S, S) in [-1, 1].
    """
    rows = []
    texts = []
    for i in range(0, len(captions), columns):
        part = slice(i, i + columns)
        rows.append([to_pil(image) for image in true[part]])
        rows.append([to_pil(image) for image in made[part]])
        texts.append(["true"] * len(rows[-1]))
        texts.append(captions[part])
    caption_grid(rows, texts, Path(folder) / f"{name}.png")


def enlargements(folder, name, low, high, true):
    """Show one row for each picture: small (N, 3, s, s), enlarged and true (N, 3, S, S)."""
    rows = [[to_pil(image) for image in images] for images in zip(low, high, true)]
    texts = [f"given: {low.shape[-1]} px", f"enlarged: {high.shape[-1]} px",
             f"true: {high.shape[-1]} px"]
    caption_grid(rows, [texts] * len(rows), Path(folder) / f"{name}.png")
