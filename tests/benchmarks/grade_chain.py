"""How much of what a caption says is in the picture? Grade a trained run on captioned shapes.

    python tests/benchmarks/grade_chain.py --run runs/tiny [--n 256] [--seed 0] [--stage base|full]
                                           [--guidance 1 2 3] [--rerank 4]

Captions are of `val` (seen combinations) and `held_out` (combinations that training never saw). For
each caption one picture is sampled in several ways, and metrics.grade reads it back:

    whole chain        prior, decoder and upsamplers, as sample.py does it
    z_img not chosen   without choosing z_img by its sketch (DALLE2.choose)
    AR prior           with the autoregressive prior; also without choosing
    true z_img         from the true z_img of a picture of that caption

Every figure is a share of pictures. A grid of the first pictures, with what is wrong written below,
goes into the run folder; for the bundled weights, `--run mini_dalle2/weights`, into the current
folder. --guidance tries several scales at the base size instead. --rerank also samples so many
pictures of each caption and grades the one that CLIP likes best.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mini_dalle2 import DALLE2                                  # noqa: E402
from mini_dalle2.data.grid import caption_grid                  # noqa: E402
from mini_dalle2.data.pixels import to_float                    # noqa: E402
from mini_dalle2.data.shapes import CaptionedShapes, parse_caption            # noqa: E402
from mini_dalle2.data.tables import load_table                  # noqa: E402
from mini_dalle2.evaluate.seen import note                      # noqa: E402
from mini_dalle2.metrics.grader import ASPECTS, KINDS, grade    # noqa: E402
from mini_dalle2.metrics.sets import retrieval_accuracy         # noqa: E402
from mini_dalle2.pipeline import results_folder                 # noqa: E402


def shares(pictures, captions):
    """(grades, {aspect: share of pictures where it is right; kind of caption: share of "all"})."""
    grades = [grade(picture, caption) for picture, caption in zip(pictures, captions)]
    result = {aspect: sum(g[aspect] for g in grades) / len(grades) for aspect in ASPECTS}
    for kind in KINDS:
        of_kind = [g["all"] for g, caption in zip(grades, captions)
                   if parse_caption(caption)[0] == kind]
        result[kind] = sum(of_kind) / max(1, len(of_kind))
    return grades, result


def report(name, result, results):
    """Print a line of the table and keep it."""
    results[name] = result
    line = "".join(f"{result[column]:>10.1%}" for column in (*ASPECTS, *KINDS))
    print(f"{name:<34}{line}", flush=True)


def picture_of(folder, name, pictures, grades, captions):
    """Write a grid of the first 32 pictures, each with its caption and what is wrong with it."""
    notes = [note(caption, g) for caption, g in zip(captions, grades)]
    n = min(32, len(pictures))
    rows = [range(i, min(i + 8, n)) for i in range(0, n, 8)]
    images = [[pictures[i] for i in row] for row in rows]
    labels = [[notes[i] for i in row] for row in rows]
    caption_grid(images, labels, folder / f"grade_{name}.png")


def from_true(model, z_img, captions, seed, guidance):
    """Base pictures from true z_img (N, D): a list of N PIL images."""
    found = []
    for i in range(0, len(captions), model.BATCH):
        part = slice(i, i + model.BATCH)
        tokens = model.tokens(captions[part])
        found += model.decode(z_img[part], tokens, [seed] * len(tokens), guidance, stage="base",
                              progress=False)
    return found


def grade_chain(model, args, split, captions, guidance, results):
    """Grade the whole chain, at each size that it makes."""
    began = time.perf_counter()
    full = args.stage == "full" and split == "val" and args.guidance == [None]
    stage = "each" if full else "base"
    rows = model.text_to_image(captions, seed=args.seed, guidance=guidance, stage=stage)
    drawn = [row[0] if full else {"base": row[0]} for row in rows]
    for size in drawn[0]:
        pictures = [one[size] for one in drawn]
        grades, result = shares(pictures, captions)
        title = f"whole chain, {size} ({pictures[0].width} px)"
        report(f"{label(split, guidance)}: {title}", result, results)
        picture_of(results_folder(args.run), f"{split}_{size}", pictures, grades, captions)
    print(f"{'':<34}{(time.perf_counter() - began) / len(captions):.2f} s a picture")


def other_ways(model, args, guidance):
    """Other ways to sample: {name: options of text_to_image}."""
    ways = {}
    if model.has_sketch and guidance is None:
        ways["z_img not chosen"] = dict(sketches=1)
    if model.ar_prior is not None and guidance is None:
        ways["AR prior"] = dict(prior="ar")
        if model.has_sketch:
            ways["AR prior not chosen"] = dict(prior="ar", sketches=1)
    if args.rerank:
        ways[f"best of {args.rerank}"] = dict(rerank=args.rerank)
    return ways


def label(split, guidance):
    """The first words of a line of the table."""
    return split if guidance is None else f"{split}, guidance {guidance:g}"


def grade_split(model, args, split, results):
    """Grade the captions of a split in all ways."""
    data = CaptionedShapes(split, model.clip.cfg.image_size, 0, 1000)
    table, captions = load_table(data, progress=False)
    z_img, z_txt = model.encode_image(to_float(table)), model.encode_text(captions)
    found = retrieval_accuracy(z_img, z_txt, captions)
    print(f"{split}: CLIP finds the right caption among {len(captions)} for {found:.1%} of the "
          "pictures")
    results[f"{split} retrieval"] = found
    captions, z_img = captions[:args.n], z_img[:args.n]
    for guidance in args.guidance:
        name = label(split, guidance)
        true = from_true(model, z_img, captions, args.seed, guidance)
        report(f"{name}: true z_img, base", shares(true, captions)[1], results)
        grade_chain(model, args, split, captions, guidance, results)
        for way, options in other_ways(model, args, guidance).items():
            rows = model.text_to_image(
                captions, seed=args.seed, guidance=guidance, stage="base", **options)
            result = shares([row[0] for row in rows], captions)[1]
            report(f"{name}: {way}, base", result, results)


def main():
    """Print the table; write grade.json and the grids."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=["base", "full"], default="full")
    parser.add_argument("--guidance", type=float, nargs="+", default=[None])
    parser.add_argument("--rerank", type=int, help="sample so many of each, keep CLIP's favourite")
    args = parser.parse_args()
    model, results = DALLE2.load(args.run), {}
    print(f"{'':<34}" + "".join(f"{column:>10}" for column in (*ASPECTS, *KINDS)))
    for split in ("val", "held_out"):
        grade_split(model, args, split, results)
    (results_folder(args.run) / "grade.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
