"""What does z_img say of its caption? A small network learns to read a caption off z_img.

    python tests/benchmarks/read_z.py --run runs/tiny [--images 60000] [--n 500]

The captions of the shapes have five slots: the kind with its word ("count three", "relation above",
"size small"), and colour and shape of the first and of the second object. The reader sees the z_img
of training pictures, whitened as the decoder sees them, and names each slot. It then reads the
z_img that the priors sample.

Printed are the shares of unseen (`val`) captions with each slot right, with all five right, and the
last by kind of caption. What the reader finds in true z_img, a decoder could show. What the reader
does not find in a prior's z_img, no decoder can show. There are three readers: without a hidden
layer; with one of 256, as tiny's decoder has between z_img and a block's scales and shifts; and
with two of 512.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mini_dalle2 import DALLE2                                  # noqa: E402
from mini_dalle2.data.pixels import to_float                    # noqa: E402
from mini_dalle2.data.shapes import CaptionedShapes, parse_caption            # noqa: E402
from mini_dalle2.data.tables import load_table                  # noqa: E402
from mini_dalle2.metrics.grader import KINDS                    # noqa: E402

# In place of a second object.
NOTHING = ("", "")
TURNED = {"below": "above", "right of": "left of"}
READERS = {"no hidden layer": (), "one of 256": (256,), "two of 512": (512, 512)}
COLUMNS = ("kind", "colour", "shape", "colour 2", "shape 2", "all", *KINDS)


def slots(caption):
    """Read a caption's slots: (kind and word, colour, shape, colour, shape).

    "A below B" and "B above A" describe the same pictures and have the same slots.
    """
    kind, word, things = parse_caption(caption)
    if word in TURNED:
        word, things = TURNED[word], things[::-1]
    return (f"{kind} {word}", *things[0], *(things[1] if kind == "relation" else NOTHING))


def train_reader(z, labels, sizes, hidden, epochs=12, batch=512):
    """Train a network from z (N, D) to the classes of all slots, side by side.

    labels: (N, 5); sizes: how many classes each slot has; hidden: widths of hidden layers.
    """
    torch.manual_seed(0)
    widths = [z.shape[1], *hidden, sum(sizes)]
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), nn.SiLU()]
    reader = nn.Sequential(*layers[:-1])
    steps = epochs * (len(z) // batch)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for i in torch.randperm(len(z)).split(batch)[:len(z) // batch]:
            parts = reader(z[i]).split(sizes, 1)
            loss = sum(F.cross_entropy(part, slot) for part, slot in zip(parts, labels[i].T))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return reader


@torch.no_grad()
def read(reader, z, sizes):
    """The classes (N, 5) that the reader names."""
    return torch.stack([part.argmax(1) for part in reader(z).split(sizes, 1)], 1)


def report(name, found, labels, captions):
    """Print a line: each slot, all five, all five by kind."""
    right = found == labels    # (N, 5)
    every = right.all(1)
    kinds = [parse_caption(caption)[0] for caption in captions]
    shares = [*right.float().mean(0).tolist(), every.float().mean().item()]
    for kind in KINDS:
        shares.append(every[torch.tensor([own == kind for own in kinds])].float().mean().item())
    print(f"{name:<34}" + "".join(f"{share:>10.1%}" for share in shares), flush=True)


@torch.no_grad()
def embedded(model, split, n):
    """(z_img (n, D), captions) of the first n pictures of a split."""
    table, captions = load_table(CaptionedShapes(split, model.clip.cfg.image_size, 0, n))
    z_img = [model.encode_image(to_float(part)) for part in table.split(500)]
    return torch.cat(z_img), captions


def labels_of(captions, words):
    """Number the slots of captions: (N, 5), by their places in `words`, a list for each slot."""
    rows = (zip(words, slots(caption)) for caption in captions)
    return torch.tensor([[column.index(word) for column, word in row] for row in rows])


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--images", type=int, default=60000)
    parser.add_argument("--n", type=int, default=500)
    args = parser.parse_args()
    model = DALLE2.load(args.run, device="cpu")
    whiten = model.decoder.whitening
    z, captions = embedded(model, "train", args.images)
    unseen, unseen_captions = embedded(model, "val", args.n)
    z, unseen = whiten(z), whiten(unseen)
    words = [sorted(set(column)) for column in zip(*map(slots, captions))]
    sizes = [len(column) for column in words]
    labels, expected = labels_of(captions, words), labels_of(unseen_captions, words)
    print(f"{'':<34}" + "".join(f"{column:>10}" for column in COLUMNS))
    for name, hidden in READERS.items():
        reader = train_reader(z, labels, sizes, hidden)
        report(f"{name}: true z_img", read(reader, unseen, sizes), expected, unseen_captions)
    tokens, z_txt = model.tokens(unseen_captions), model.encode_text(unseen_captions)
    for name, prior in (("the prior", model.prior), ("the autoregressive prior", model.ar_prior)):
        if prior is not None:
            generator = torch.Generator().manual_seed(0)
            sampled = whiten(prior.sample(tokens, z_txt, generator=generator))
            found = read(reader, sampled, sizes)
            report(f"two of 512: {name}'s", found, expected, unseen_captions)


if __name__ == "__main__":
    main()
