"""Draw pictures from captions with a trained run.

    python sample.py text "a red circle above a blue square"
    python sample.py text "two cyan rings" "a small red circle" --n 6 --seed 3 --guidance 3 --steps 100 --out grid.png

writes one grid, a row for each caption, and with --singles every picture by itself beside it. The same caption and seed give the same
picture, whatever else is drawn with it; picture j of a row has seed + j. Read next: mini_dalle2/pipeline.py, which does the work.
"""

import argparse
import sys
import time
from pathlib import Path

from mini_dalle2 import DALLE2
from mini_dalle2.configs import Parser
from mini_dalle2.data import caption_grid
from mini_dalle2.training import atomic_open


def parse(argv):
    """Command line -> namespace. Raises ValueError for anything that cannot be done."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    text = verbs.add_parser("text", help="draw captions")
    text.add_argument("captions", nargs="+", metavar="CAPTION")
    text.add_argument("--run", default="runs/tiny", help="run folder of train.py (default: runs/tiny)")
    text.add_argument("--n", type=int, default=4, help="pictures of each caption (default: 4)")
    text.add_argument("--seed", type=int, default=0)
    text.add_argument("--guidance", type=float, help="the decoder's guidance scale, 1 for none (default: the run's own)")
    text.add_argument("--steps", type=int, help="the decoder's sampling steps (default: the run's own)")
    text.add_argument("--stage", choices=["full", "base"], default="full", help="base: the decoder's small pictures only")
    text.add_argument("--out", type=Path, metavar="FILE.png", help="the grid (default: sample.png in the run folder)")
    text.add_argument("--singles", action="store_true", help="also write every picture as FILE-ROW-COLUMN.png")
    text.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args(argv)
    args.out = args.out or Path(args.run) / "sample.png"
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: pictures are written as .png")
    return args


def text(args):
    """The verb "text": draw, write the grid, say where it is."""
    began = time.perf_counter()
    model = DALLE2.load(args.run, args.device)
    rows = model.text_to_image(args.captions, n=args.n, seed=args.seed, guidance=args.guidance, steps=args.steps, stage=args.stage)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files = {args.out: caption_grid(rows, args.captions)}
    if args.singles:
        files |= {args.out.with_name(f"{args.out.stem}-{i}-{j}.png"): picture
                  for i, row in enumerate(rows, start=1) for j, picture in enumerate(row, start=1)}
    for path, picture in files.items():
        with atomic_open(path) as file:
            picture.save(file, format="PNG")
    seconds = time.perf_counter() - began
    print(f"{sum(map(len, rows))} pictures of {rows[0][0].width} pixels in {seconds:.0f} s: {', '.join(map(str, files))}")


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error), 130 after Ctrl-C."""
    try:
        text(parse(argv))
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
