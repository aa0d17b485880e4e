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
from mini_dalle2.pipeline import out_of_memory
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
    if not 1 <= args.n <= 1000:
        raise ValueError(f"--n {args.n}: from 1 to 1000 pictures of each caption")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: a whole number from 0 to 2 ** 63 - 1")
    if args.out or Path(args.run).is_dir():                                # that there is no run is for DALLE2.load to say
        args.out = args.out or Path(args.run) / "sample.png"
        check_out(args.out)
    return args


def check_out(path):
    """Raises ValueError unless a picture can be written to `path`: better now than when it is drawn."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: pictures are written as .png")
    probe = path.with_name(path.name + ".tmp")                             # where atomic_open will write
    try:
        if path.is_dir():
            raise ValueError(f"--out {path} is a folder: name a file in it")
        if not path.parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}")
        probe.open("wb").close()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from None


def text(args):
    """The verb "text": draw, write the grid, say where it is."""
    began = time.perf_counter()
    model = DALLE2.load(args.run, args.device)
    rows = model.text_to_image(args.captions, n=args.n, seed=args.seed, guidance=args.guidance, steps=args.steps, stage=args.stage)
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
        return 0
    except KeyboardInterrupt:
        return 130
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message = "there is not enough memory for this: lower --n, or draw small pictures only with --stage base"
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
    print(f"sample.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
