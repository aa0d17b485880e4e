"""Sample pictures from captions with a trained run, or change pictures that are there.

    python sample.py text "a red circle above a blue square"
    python sample.py text "two cyan rings" "a small red circle" --n 6 --seed 3
    python sample.py variations cat.png
    python sample.py interpolate cat.png dog.png
    python sample.py textdiff cat.png "a red circle" "a blue circle"
    python sample.py inpaint cat.png mask.png "a red circle"
    python sample.py reconstruct cat.png --components 1 2 5 20
    python sample.py classify cat.png "a red circle" "two cyan rings"
    torchrun --nproc_per_node=4 -- sample.py text "two cyan rings" --n 64

Each verb writes one labelled grid into the folder samples, under a new name, or to --out. --singles
also writes each picture to a file of its own. The same caption and seed give the same picture.
Picture j of a row has the seed --seed + j in text, variations and inpaint; with --rerank the best
pictures come first. torchrun shares the pictures among several GPUs, or among several processes on
a CPU. Read next: mini_dalle2/pipeline.py, which does the work.
"""

import sys
import time
from pathlib import Path

from mini_dalle2 import DALLE2
from mini_dalle2.data.grid import caption_grid, refuse_sheet
from mini_dalle2.data.pixels import central_square, mask_square, to_mask, to_pil
from mini_dalle2.data.words import shapes_grammar, word_notes
from mini_dalle2.pipeline import default_run, results_folder
from mini_dalle2.pretrained.karlo import load_karlo
from mini_dalle2.runtime.commands import run_command
from mini_dalle2.runtime.pictures import (
    check_out, open_picture, result_file, samples_file, save_singles)
from mini_dalle2.runtime.processes import is_main
from mini_dalle2.runtime.sample_options import (
    DTYPES, captions_of, check_numbers, check_verb, quotes_notes, sample_parser)


def given(path, size=None):
    """Read a picture that a model takes at size × size: (image, its square, a label).

    size None: the side of the central square. Prints a note if the picture has another size.
    """
    image = open_picture(path)
    refuse_sheet(image, path)
    size = size or min(image.size)
    if image.size != (size, size):
        print(f"note: {path} has {image.width} x {image.height} pixels; "
              f"its central square is taken at {size} x {size}")
    return image, central_square(image, size), f"given: {Path(path).name}"


# ------------------------------------------------------------------ the verbs
# Each: (model, arguments, side of the pictures, steps and stage)
# -> (rows of the grid, their labels, rows of the sampled pictures alone)

def text(model, args, size, options):
    rows = model.text_to_image(
        args.captions, n=args.n, seed=args.seed, prior=args.prior, guidance=args.guidance,
        rerank=args.rerank, sketches=args.sketches, **options)
    return rows, args.captions, rows


def variations(model, args, size, options):
    image, shown, name = given(args.image, size)
    found = model.variations(image, args.n, args.eta, args.seed, args.guidance, **options)
    labels = [f"η = {args.eta:g}, seed {args.seed + j}" for j in range(args.n)]
    return [[shown, *found]], [[name, *labels]], [found]


def interpolate(model, args, size, options):
    a, shown_a, name_a = given(args.image, size)
    b, shown_b, name_b = given(args.other, size)
    found = model.interpolate(a, b, args.n, args.seed, args.fixed_noise, **options)
    labels = [f"θ = {j / (args.n - 1):.2f}" for j in range(args.n)]
    return [[shown_a, *found, shown_b]], [[name_a, *labels, name_b]], [found]


def textdiff(model, args, size, options):
    image, shown, name = given(args.image, size)
    found = model.textdiff(image, args.source or None, args.target, args.theta, args.seed,
                           args.guidance, **options)
    labels = [f"θ = {theta:g}: to {args.target}" for theta in args.theta]
    return [[shown, *found]], [[name, *labels]], [found]


def inpaint(model, args, size, options):
    image, shown, name = given(args.image, size)
    mask, mark = to_mask(open_picture(args.mask))
    print(f"{args.mask}: something new where it is {mark}")
    found = model.inpaint(image, mask, args.caption, args.n, args.seed, args.prior, args.guidance,
                          **options)
    labels = [f"{args.caption}, seed {args.seed + j}" for j in range(args.n)]
    used = to_pil(2 * mask_square(mask, size)[0].expand(3, -1, -1) - 1)
    label = f"mask: new where white (in the file: {mark})"
    return [[shown, used, *found]], [[name, label, *labels]], [found]


def reconstruct(model, args, size, options):
    image, shown, name = given(args.image, size)
    found = model.reconstruct(image, args.components, args.seed, **options)
    labels = ["from z_img and x_T"]
    if args.components:
        labels = [f"{k} component{'s' if k > 1 else ''}" for k in args.components]
    return [[shown, *found]], [[name, *labels]], [found]


def classify(model, args, size, options):
    image, shown, name = given(args.image)
    shares = model.classify(image, args.captions).tolist()
    ranked = sorted(zip(shares, args.captions), reverse=True)
    lines = "\n".join(f"{share:6.1%}  {caption}" for share, caption in ranked)
    print(lines)
    return [[shown]], [[f"{name}\n{lines}"]], []


VERBS = {
    "text": text, "variations": variations, "interpolate": interpolate, "textdiff": textdiff,
    "inpaint": inpaint, "reconstruct": reconstruct, "classify": classify}


# ------------------------------------------------------------------ the command

def parse(argv):
    """Turn the command line into a namespace. Raises ValueError for what cannot be done."""
    check_verb(sys.argv[1:] if argv is None else argv, VERBS)
    parser = sample_parser(__doc__, DALLE2.PRIORS, DALLE2.SKETCHES, shapes_grammar())
    args = parser.parse_args(argv)
    check_numbers(args)
    if args.run and args.weights:
        raise ValueError(f"--run {args.run} and --weights {args.weights}: use one of the two")
    args.model = args.weights or args.run or default_run()
    args.folder = Path(".") if args.weights else results_folder(args.model)
    if args.out:
        inputs = [getattr(args, key) for key in ("image", "other", "mask") if hasattr(args, key)]
        check_out(args.out, inputs, getattr(args, "singles", False))
    elif args.folder.is_dir():
        # Fail now, not after sampling. A missing run folder is reported by DALLE2.load.
        samples_file(args.folder, args.verb)
    return args


def work(args, device):
    """Sample the pictures, write the grid, and print where it is."""
    began = time.perf_counter()
    load = load_karlo if args.weights else DALLE2.load
    model = load(args.model, device, dtype=DTYPES[args.dtype], offload=args.offload)
    options = {} if args.verb == "classify" else {
        "steps": args.steps, "stage": args.stage, "progress": sys.stderr.isatty()}
    size = model.sizes.get(options.get("stage"), model.size)
    if is_main():
        captions = captions_of(args)
        for note in quotes_notes(captions) + word_notes(captions, args.model):
            print(f"note: {note}", file=sys.stderr)
    rows, labels, found = VERBS[args.verb](model, args, size, options)
    if not is_main():
        return
    with result_file(args.out, args.folder, args.verb) as out:
        caption_grid(rows, labels, out)
    files = [out]
    if getattr(args, "singles", False):
        files += save_singles(found, out)
    n = sum(map(len, found))
    if n:
        seconds = time.perf_counter() - began
        print(f"{n} picture{'s' if n > 1 else ''} of {size} pixels in {seconds:.0f} s:", end=" ")
    print(", ".join(map(str, files)))


def main(argv=None):
    """Run the command: 0, 2 after a mistake (a sentence on standard error), 130 after Ctrl-C."""
    less = "lower --n, or sample small pictures with --stage base"
    return run_command("sample.py", parse, work, argv, less=less)


if __name__ == "__main__":
    sys.exit(main())
