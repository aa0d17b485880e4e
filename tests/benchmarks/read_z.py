"""What do z_img say of their captions? A small network learns to read them off, and then reads those that the priors draw.

    python tests/benchmarks/read_z.py --run runs/tiny [--images 60000] [--n 500]

The captions of the shapes have five slots: the kind with its word ("count three", "relation above", "size small"), and colour and shape of the
first and of the second thing. The reader sees the z_img of training pictures, whitened as the decoder sees it, and names each slot. Printed are
the shares of unseen (`val`) captions with each slot right, with all five right, and that by kind of caption. What it can read off true z_img,
a decoder could draw; what it cannot read off a prior's, no decoder can. Readers: without a hidden layer, with one of 256, which is what tiny's
decoder has between z_img and the scales and shifts of a block, and with two of 512.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mini_dalle2 import DALLE2          # noqa: E402
from mini_dalle2.data.pixels import to_float          # noqa: E402
from mini_dalle2.data.shapes import CaptionedShapes          # noqa: E402
from mini_dalle2.data.tables import load_table          # noqa: E402
from mini_dalle2.data.shapes import parse_caption          # noqa: E402
from mini_dalle2.metrics.grader import KINDS          # noqa: E402

NOTHING = ("", "")                                                         # where a second thing would be
TURNED = {"below": "above", "right of": "left of"}


def slots(caption):
    """Caption -> (kind and word, colour, shape, colour, shape). "A below B" and "B above A" are of the same pictures: one form for both."""
    kind, word, things = parse_caption(caption)
    if word in TURNED:
        word, things = TURNED[word], things[::-1]
    return (f"{kind} {word}", *things[0], *(things[1] if kind == "relation" else NOTHING))


def train_reader(z, labels, sizes, hidden, epochs=12, batch=512):
    """A network from z (N, D) to all slots' classes side by side, trained on labels (N, 5); sizes: how many classes each slot has."""
    torch.manual_seed(0)
    widths = [z.shape[1], *hidden, sum(sizes)]
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.SiLU())][:-1]
    reader, steps = nn.Sequential(*layers), epochs * (len(z) // batch)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for i in torch.randperm(len(z)).split(batch)[:len(z) // batch]:
            loss = sum(F.cross_entropy(part, of_slot) for part, of_slot in zip(reader(z[i]).split(sizes, 1), labels[i].T))
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
    """Prints a line: each slot, all five, all five by kind."""
    right = found == labels                                                # (N, 5)
    kinds = [parse_caption(caption)[0] for caption in captions]
    by_kind = [right.all(1)[torch.tensor([k == kind for k in kinds])].float().mean().item() for kind in KINDS]
    shares = [*right.float().mean(0).tolist(), right.all(1).float().mean().item(), *by_kind]
    print(f"{name:<34}" + "".join(f"{share:>10.1%}" for share in shares), flush=True)


@torch.no_grad()
def pictures(model, split, n):
    """(z_img (n, D), captions) of the first n pictures of a split."""
    table, captions = load_table(CaptionedShapes(split, model.clip.cfg.image_size, 0, n))
    return torch.cat([model.encode_image(to_float(part)) for part in table.split(500)]), captions


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--images", type=int, default=60000)
    parser.add_argument("--n", type=int, default=500)
    args = parser.parse_args()
    model = DALLE2.load(args.run, device="cpu")
    whiten = model.decoder.whitening
    z, captions = pictures(model, "train", args.images)
    unseen, unseen_captions = pictures(model, "val", args.n)
    z, unseen = whiten(z), whiten(unseen)
    words = [sorted(set(column)) for column in zip(*map(slots, captions))]
    sizes = [len(column) for column in words]
    labels, expected = (torch.tensor([[column.index(word) for column, word in zip(words, slots(caption))] for caption in some])
                        for some in (captions, unseen_captions))
    print(f"{'':<34}" + "".join(f"{key:>10}" for key in ("kind", "colour", "shape", "colour 2", "shape 2", "all", *KINDS)))
    for name, hidden in (("no hidden layer", ()), ("one of 256", (256,)), ("two of 512", (512, 512))):
        reader = train_reader(z, labels, sizes, hidden)
        report(f"{name}: true z_img", read(reader, unseen, sizes), expected, unseen_captions)
    tokens, z_txt = model.tokens(unseen_captions), model.encode_text(unseen_captions)
    for name, prior in (("the prior", model.prior), ("the autoregressive prior", model.ar_prior)):
        if prior is not None:
            drawn = prior.sample(tokens, z_txt, generator=torch.Generator().manual_seed(0))
            report(f"two of 512: {name}'s", read(reader, whiten(drawn), sizes), expected, unseen_captions)


if __name__ == "__main__":
    main()
