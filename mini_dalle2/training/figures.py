"""What a stage has learned, as pictures: train.py draws one after each stage, beside the loss curve.

CLIP         similarity of captions and pictures it has never seen; the diagonal should shine              (CLIP §2.3, Fig. 3)
prior        how close its z_img comes to the true one, against simply taking z_txt                          (unCLIP §2.2, Fig. 8)
sketch       true pictures, and their averages over all that have the same z_img
decoder      true pictures, and what it draws from their z_img                                              (unCLIP §2.1)
upsamplers   small, enlarged, true                                                                         (unCLIP §2.1)

Shapes: N pictures or captions of the validation split, D = clip_dim, S side of a picture. Files are PNG, written to a run folder.
Read next: metrics.py, for numbers instead of pictures.
"""

from pathlib import Path

from matplotlib.figure import Figure

from ..data.grid import caption_grid
from ..data.pixels import to_pil
from ..metrics.sets import retrieval_accuracy
from ..runtime.files import atomic_open, read_metrics


def save_figure(figure, path):
    """Writes a matplotlib figure as PNG, whole or not at all."""
    with atomic_open(path) as file:
        figure.savefig(file, format="png", dpi=120)


def losses(run, stage):
    """run/STAGE_loss.png: the losses in metrics.jsonl over steps, each window's mean and a smoothed line."""
    lines = [line for line in read_metrics(run) if line["stage"] == stage]
    if not lines:
        return
    steps, values, smooth, weighted, weight = [line["step"] for line in lines], [line["loss"] for line in lines], [], 0.0, 0.0
    for value in values:                                                   # a moving average without the bias of its start
        weighted, weight = 0.9 * weighted + 0.1 * value, 0.9 * weight + 0.1
        smooth.append(weighted / weight)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="0.75", linewidth=1, label=f"mean of {steps[-1] - steps[-2] if len(steps) > 1 else steps[-1]} steps")
    axes.plot(steps, smooth, color="tab:blue", label="smoothed")
    if min(values) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=f"{stage}: {smooth[-1]:.4f} after {steps[-1]} steps")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_figure(figure, Path(run) / f"{stage}_loss.png")


def similarity(run, z_img, z_txt, captions, shown=12):
    """run/clip.png: cosines of the first different captions and their pictures; z_img, z_txt (N, D). Returns the accuracy on all N."""
    accuracy = retrieval_accuracy(z_img, z_txt, captions)
    rows = sorted({caption: i for i, caption in enumerate(captions)}.values())[:shown]
    cosine = (z_txt[rows] @ z_img[rows].T).float().cpu().numpy()           # (shown, shown)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    shade = axes.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    for i in range(len(rows)):
        for j in range(len(rows)):
            ink = "white" if abs(cosine[i, j]) > 0.6 else "black"
            axes.text(j, i, f"{cosine[i, j]:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_yticks(range(len(rows)), [captions[i] if len(captions[i]) < 48 else captions[i][:45] + "…" for i in rows])
    axes.set_xticks(range(len(rows)), [f"picture {j + 1}" for j in range(len(rows))], rotation=45)
    axes.set_title(f"CLIP: cosine of caption and picture; right caption found for {accuracy:.1%} of {len(captions)} unseen pictures")
    figure.colorbar(shade, shrink=0.7)
    save_figure(figure, Path(run) / "clip.png")
    return accuracy


def closeness(run, stage, sampled, z_img, z_txt, captions):
    """run/STAGE.png of a prior: histograms of cos(sampled z_img, true z_img) and cos(z_txt, true z_img), all (N, D) of unit norm.

    Returns (mean cosine of the samples, mean cosine of z_txt, share of samples whose nearest caption is their own).
    """
    of_prior, of_text = ((z * z_img).sum(-1).float().cpu() for z in (sampled, z_txt))      # (N,)
    found = retrieval_accuracy(sampled, z_txt, captions)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for cosine, name, colour in ((of_text, "z_txt itself", "0.6"), (of_prior, "the prior's sample", "tab:blue")):
        axes.hist(cosine.numpy(), bins=80, range=(-1, 1), alpha=0.7, color=colour, label=f"{name}: mean {cosine.mean():.3f}")
    axes.set(xlabel="cosine with the true z_img", ylabel="captions",
             title=f"{stage}: of {len(captions)} unseen captions, {found:.1%} of samples are nearest to their own caption")
    axes.legend()
    save_figure(figure, Path(run) / f"{stage}.png")
    return of_prior.mean().item(), of_text.mean().item(), found


def drawings(run, stage, true, drawn, captions, columns=8):
    """run/STAGE.png of sketch or decoder: rows of true pictures, and beneath each what was drawn from its z_img, with captions; true, drawn (N, 3, S, S)."""
    rows, texts = [], []
    for i in range(0, len(captions), columns):
        part = slice(i, i + columns)
        rows += [[to_pil(image) for image in true[part]], [to_pil(image) for image in drawn[part]]]
        texts += [["true"] * len(rows[-1]), captions[part]]
    with atomic_open(Path(run) / f"{stage}.png") as file:
        caption_grid(rows, texts).save(file, format="PNG")


def enlargements(run, stage, low, high, true):
    """run/STAGE.png: one row per picture: small (N, 3, s, s), enlarged and true (N, 3, S, S)."""
    rows = [[to_pil(image) for image in images] for images in zip(low, high, true)]
    names = [f"{images[0].shape[-1]} px" for images in (low, high)]
    with atomic_open(Path(run) / f"{stage}.png") as file:
        caption_grid(rows, [[f"given: {names[0]}", f"enlarged: {names[1]}", f"true: {names[1]}"]] * len(rows)).save(file, format="PNG")
