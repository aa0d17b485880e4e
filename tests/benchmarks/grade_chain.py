"""How much of what a caption says is in the picture? Grades a trained run on captioned shapes; the README's table of results.

    python tests/benchmarks/grade_chain.py --run runs/tiny [--n 256] [--seed 0] [--stage base|full] [--guidance 1 2 3] [--rerank 4]

For captions of `val` (seen combinations) and `held_out` (a combination that training never saw) it draws one picture each, from the
whole chain, from the prior's own z_img (not chosen by its sketch, see DALLE2.choose), with the autoregressive prior in it (likewise), and
from the true z_img of a picture of that caption, and lets metrics.grade read the picture back. Every figure is the share of pictures where
that holds. A grid of the first pictures, with what is wrong written beneath, goes into the run folder (of the weights in the box,
`--run mini_dalle2/weights`: here). With --guidance it tries several scales at the base size instead; with --rerank it also draws so many
of each, and grades the one that CLIP likes best.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mini_dalle2 import DALLE2          # noqa: E402
from mini_dalle2.data.grid import caption_grid          # noqa: E402
from mini_dalle2.data.pixels import to_float          # noqa: E402
from mini_dalle2.data.shapes import CaptionedShapes          # noqa: E402
from mini_dalle2.data.tables import load_table          # noqa: E402
from mini_dalle2.evaluate.seen import note          # noqa: E402
from mini_dalle2.data.shapes import parse_caption          # noqa: E402
from mini_dalle2.metrics.grader import ASPECTS, KINDS, grade          # noqa: E402
from mini_dalle2.metrics.sets import retrieval_accuracy          # noqa: E402
from mini_dalle2.pipeline import results_folder          # noqa: E402


def shares(pictures, captions):
    """(grades, {aspect: share of pictures where it holds, and "all" by kind of caption})."""
    grades = [grade(picture, caption) for picture, caption in zip(pictures, captions)]
    result = {aspect: sum(g[aspect] for g in grades) / len(grades) for aspect in ASPECTS}
    for kind in KINDS:
        of_kind = [g["all"] for g, caption in zip(grades, captions) if parse_caption(caption)[0] == kind]
        result[kind] = sum(of_kind) / max(1, len(of_kind))
    return grades, result


def report(name, result, results):
    """Prints a line of the table and keeps it."""
    results[name] = result
    print(f"{name:<34}" + "".join(f"{result[key]:>10.1%}" for key in (*ASPECTS, *KINDS)), flush=True)


def picture_of(folder, name, pictures, grades, captions):
    """Writes a grid of the first 32 pictures, each with its caption and what is wrong with it."""
    notes = [note(caption, g) for caption, g in zip(captions, grades)]
    rows = [range(i, min(i + 8, len(pictures), 32)) for i in range(0, min(32, len(pictures)), 8)]
    caption_grid([[pictures[i] for i in row] for row in rows], [[notes[i] for i in row] for row in rows], folder / f"grade_{name}.png")


def main():
    """Prints the table; writes grade.json and the grids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=["base", "full"], default="full")
    parser.add_argument("--guidance", type=float, nargs="+", default=[None])
    parser.add_argument("--rerank", type=int, help="draw so many of each, keep CLIP's favourite")
    args = parser.parse_args()
    model, results = DALLE2.load(args.run), {}
    folder = results_folder(args.run)
    print(f"{'':<34}" + "".join(f"{key:>10}" for key in (*ASPECTS, *KINDS)))
    for split in ("val", "held_out"):
        table, captions = load_table(CaptionedShapes(split, model.clip.cfg.image_size, 0, 1000), progress=False)
        z_img, z_txt = model.encode_image(to_float(table)), model.encode_text(captions)
        found = retrieval_accuracy(z_img, z_txt, captions)
        print(f"{split}: CLIP finds the right caption among {len(captions)} for {found:.1%} of the pictures")
        results[f"{split} retrieval"] = found
        captions, z_img = captions[:args.n], z_img[:args.n]
        for guidance in args.guidance:
            label = f"{split}" + ("" if guidance is None else f", guidance {guidance:g}")
            seeds = [args.seed] * len(captions)
            true = []
            for i in range(0, len(captions), model.BATCH):
                part = slice(i, i + model.BATCH)
                true += model.decode(z_img[part], model.tokens(captions[part]), seeds[part], guidance, stage="base", progress=False)
            report(f"{label}: true z_img, base", shares(true, captions)[1], results)
            began = time.perf_counter()
            full = args.stage == "full" and split == "val" and args.guidance == [None]
            drawn = model.text_to_image(captions, seed=args.seed, guidance=guidance, stage="each" if full else "base")
            drawn = [row[0] if full else {"base": row[0]} for row in drawn]
            for size in drawn[0]:
                pictures = [d[size] for d in drawn]
                grades, result = shares(pictures, captions)
                report(f"{label}: whole chain, {size} ({pictures[0].width} px)", result, results)
                picture_of(folder, f"{split}_{size}", pictures, grades, captions)
            print(f"{'':<34}{(time.perf_counter() - began) / len(captions):.2f} s a picture")
            other_ways = {}
            if model.has_sketch and guidance is None:
                other_ways["z_img not chosen"] = dict(sketches=1)
            if model.ar_prior is not None and guidance is None:
                other_ways["AR prior"] = dict(prior="ar")
                if model.has_sketch:
                    other_ways["AR prior not chosen"] = dict(prior="ar", sketches=1)
            if args.rerank:
                other_ways[f"best of {args.rerank}"] = dict(rerank=args.rerank)
            for way, options in other_ways.items():
                drawn = model.text_to_image(captions, seed=args.seed, guidance=guidance, stage="base", **options)
                report(f"{label}: {way}, base", shares([row[0] for row in drawn], captions)[1], results)
    (folder / "grade.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
