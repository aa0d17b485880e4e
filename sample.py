"""Draw pictures from captions with a trained run, or change pictures that are there.

    python sample.py text "a red circle above a blue square"
    python sample.py text "two cyan rings" "a small red circle" --n 6 --seed 3 --guidance 3 --steps 100 --prior ar --rerank 24
    python sample.py variations cat.png                          other pictures of what CLIP sees in it
    python sample.py interpolate cat.png dog.png                 the way from one to the other
    python sample.py textdiff cat.png "a red circle" "a blue circle"
    python sample.py inpaint cat.png mask.png "a red circle"     new only where the mask is white; the caption describes all of it
    python sample.py reconstruct cat.png --components 1 2 5 20   what more and more principal components of its embedding say
    python sample.py classify cat.png "a red circle" "two cyan rings"
    torchrun --nproc_per_node=4 -- sample.py text "two cyan rings" --n 64    four GPUs, or processes on the CPU, draw a share each

Each writes one labelled grid; with --singles every picture by itself beside it. The same caption and seed give the same picture, whatever
else is drawn with it; picture j of a row of text, variations or inpaint has seed + j (with --rerank, the best come first). Read next: mini_dalle2/pipeline.py, which does the work.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from mini_dalle2 import DALLE2
from mini_dalle2.runtime.commands import run_command
from mini_dalle2.runtime.commands import Parser
from mini_dalle2.data.grid import caption_grid
from mini_dalle2.runtime.processes import is_main
from mini_dalle2.data.pixels import central_square
from mini_dalle2.pipeline import default_run, results_folder
from mini_dalle2.pretrained.karlo import load_karlo
from mini_dalle2.runtime.files import atomic_open


DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse(argv):
    """Command line -> namespace. Raises ValueError for anything that cannot be done."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", help="run folder of train.py (default: the weights in the box, or without these runs/tiny)")
    common.add_argument("--weights", metavar="FOLDER", help="Karlo's public weights instead of a run (see README)")
    common.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the matrices: fp16 for GPUs, bf16 also for CPUs with AMX (default: fp32)")
    common.add_argument("--offload", action="store_true", help="keep on the GPU only the model that is at work: for large models on small GPUs")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--out", type=Path, metavar="FILE.png", help="the grid (default: VERB.png in the run folder, or here if none is named)")
    common.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    drawing = argparse.ArgumentParser(add_help=False, parents=[common])
    drawing.add_argument("--steps", type=int, help="the decoder's sampling steps (default: the run's own)")
    drawing.add_argument("--stage", choices=["full", "base", "up1"], default="full",
                         help="base: the decoder's small pictures only; up1: after the first upsampler, as in the README (default: full)")
    drawing.add_argument("--singles", action="store_true", help="also write every picture as FILE-ROW-COLUMN.png")

    def verb(name, help, arguments, parent=drawing, **options):
        one = verbs.add_parser(name, help=help, parents=[parent])
        for argument, nargs in arguments.items():
            one.add_argument(argument, nargs=nargs, metavar=argument.rstrip("s").upper())
        for option, (kind, default, what) in options.items():
            one.add_argument(f"--{option}", type=kind, default=default, help=what)
        return one

    number = int, 4, "pictures (default: 4)"
    guidance = float, None, "the decoder's guidance scale, 1 for none (default: the run's own)"
    unguided = float, 1.0, "the decoder's guidance scale (default: 1, none)"
    text = verb("text", "draw captions", {"captions": "+"}, n=number, guidance=guidance,
                rerank=(int, None, "draw so many of each, show the --n that CLIP finds closest to the caption, the best first"),
                sketches=(int, DALLE2.SKETCHES, "draw so many image embeddings from the prior for each picture, and keep the one whose sketch CLIP "
                          f"finds closest to the caption; 1, or a run without sketch: no choice (default: {DALLE2.SKETCHES})"))
    inpaint = verb("inpaint", "draw into a picture", {"image": None, "mask": None, "caption": None}, n=number, guidance=guidance)
    for one in (text, inpaint):
        one.add_argument("--prior", choices=DALLE2.PRIORS, default="diffusion", help="where the image embedding comes from; z_txt takes CLIP's "
                         "text embedding for it, caption does without (default: diffusion)")
    verb("variations", "other pictures of what CLIP sees in one", {"image": None}, n=number, guidance=unguided,
         eta=(float, 1.0, "0 reconstructs, 1 varies most (default: 1)"))
    interpolate = verb("interpolate", "from one picture to another", {"image": None, "other": None}, n=(int, 6, "pictures (default: 6)"))
    interpolate.add_argument("--fixed-noise", action="store_true", help="one random x_T all the way, from --seed")
    textdiff = verb("textdiff", 'change a picture as caption TARGET differs from caption SOURCE ("" for none)',
                    {"image": None, "source": None, "target": None},
                    guidance=(float, 2.0, "the decoder's guidance scale; 1, none, reconstructs the picture at theta 0 (default: 2)"))
    textdiff.add_argument("--theta", type=float, nargs="+", default=[0, 0.2, 0.3, 0.4, 0.5], help="how far to go (default: 0 0.2 0.3 0.4 0.5)")
    reconstruct = verb("reconstruct", "a picture from its own latents", {"image": None})
    reconstruct.add_argument("--components", type=int, nargs="+", help="from so many principal components of z_img (default: from all and x_T)")
    verb("classify", "which caption fits?", {"image": None, "captions": "+"}, parent=common)

    args = parser.parse_args(argv)
    for option, what in {"n": "pictures", "rerank": "pictures", "sketches": "sketches"}.items():
        value = getattr(args, option, None)
        if value is not None and not 1 <= value <= 1000:
            raise ValueError(f"--{option} {value}: from 1 to 1000 {what}")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: a whole number from 0 to 2 ** 63 - 1")
    if not 0 <= getattr(args, "eta", 0) <= 1:
        raise ValueError(f"--eta {args.eta}: a number from 0 to 1")
    if args.run and args.weights:
        raise ValueError(f"--run {args.run} and --weights {args.weights}: draw with the one or with the other")
    folder = Path(".") if args.weights else results_folder(args.run or default_run())
    if args.out or folder.is_dir():                                        # that there is no run is for DALLE2.load to say
        args.out = args.out or folder / ("sample.png" if args.verb == "text" else f"{args.verb}.png")
        check_out(args.out, [getattr(args, key) for key in ("image", "other", "mask") if hasattr(args, key)], getattr(args, "singles", False))
    return args


def check_out(path, given, singles=False):
    """Raises ValueError unless a picture can be written to `path`, which is none of those given: better now than when it is drawn."""
    for other in map(Path, given):
        single = singles and other.resolve().parent == path.resolve().parent and re.fullmatch(re.escape(path.stem) + r"-\d+-\d+\.png", other.name)
        if single or other.resolve() == path.resolve():
            raise ValueError(f"--out {path} is, or with --singles may become, a picture that was given, {other}: it would be lost")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: pictures are written as .png")
    probe = path.with_name(path.name + ".tmp")                             # where atomic_open will write
    try:
        if path.is_dir():
            raise ValueError(f"--out {path} is a folder: name a file in it")
        if not path.parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}")
        probe.open("wb").close()
        probe.unlink(missing_ok=True)                                      # of several processes one was first
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from None


def open_picture(path):
    """A picture from a file. Raises FileNotFoundError, ValueError for anything that Pillow cannot read in full."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:                                             # Pillow raises half a dozen types for a damaged file
        raise ValueError(f"{path} cannot be read as a picture ({type(error).__name__})") from None


def given(path, size=None):
    """A picture that a model takes at size × size: (image, what is taken of it, its name as a label). Says so if it is of another size.

    size None: at whatever side its central square has.
    """
    image = open_picture(path)
    size = size or min(image.size)
    if image.size != (size, size):
        print(f"note: {path} has {image.width} x {image.height} pixels; its central square is taken at {size} x {size}")
    return image, central_square(image, size), f"given: {Path(path).name}"


# ---------------------------------------------------------------------------------------------------------------- the verbs
# Each: (model, args, side of the pictures, options for drawing) -> (rows of the grid, their labels, rows of what was drawn of it)

def text(model, args, size, options):
    rows = model.text_to_image(args.captions, n=args.n, seed=args.seed, prior=args.prior, guidance=args.guidance, rerank=args.rerank,
                               sketches=args.sketches, **options)
    return rows, args.captions, rows


def variations(model, args, size, options):
    image, shown, name = given(args.image, size)
    drawn = model.variations(image, args.n, args.eta, args.seed, args.guidance, **options)
    return [[shown, *drawn]], [[name] + [f"η = {args.eta:g}, seed {args.seed + j}" for j in range(args.n)]], [drawn]


def interpolate(model, args, size, options):
    (a, shown_a, name_a), (b, shown_b, name_b) = given(args.image, size), given(args.other, size)
    drawn = model.interpolate(a, b, args.n, args.seed, args.fixed_noise, **options)
    labels = [name_a, *(f"θ = {j / (args.n - 1):.2f}" for j in range(args.n)), name_b]
    return [[shown_a, *drawn, shown_b]], [labels], [drawn]


def textdiff(model, args, size, options):
    image, shown, name = given(args.image, size)
    drawn = model.textdiff(image, args.source or None, args.target, args.theta, args.seed, args.guidance, **options)
    return [[shown, *drawn]], [[name] + [f"θ = {theta:g}: to {args.target}" for theta in args.theta]], [drawn]


def inpaint(model, args, size, options):
    (image, shown, name), mask = given(args.image, size), open_picture(args.mask)
    drawn = model.inpaint(image, mask, args.caption, args.n, args.seed, args.prior, args.guidance, **options)
    labels = [name, "mask"] + [f"{args.caption}, seed {args.seed + j}" for j in range(args.n)]
    return [[shown, central_square(mask, size), *drawn]], [labels], [drawn]


def reconstruct(model, args, size, options):
    image, shown, name = given(args.image, size)
    drawn = model.reconstruct(image, args.components, args.seed, **options)
    labels = [f"{count} component{'s' * (count > 1)}" for count in args.components] if args.components else ["from z_img and x_T"]
    return [[shown, *drawn]], [[name, *labels]], [drawn]


def classify(model, args, size, options):
    image, shown, name = given(args.image)
    found = sorted(zip(model.classify(image, args.captions).tolist(), args.captions), reverse=True)
    lines = [f"{share:6.1%}  {caption}" for share, caption in found]
    print("\n".join(lines))
    return [[shown]], [[name + "\n" + "\n".join(lines)]], []


VERBS = {f.__name__: f for f in (text, variations, interpolate, textdiff, inpaint, reconstruct, classify)}


def work(args, device):
    """Draws, writes the grid, says where it is."""
    began = time.perf_counter()
    load, where = (load_karlo, args.weights) if args.weights else (DALLE2.load, args.run)
    model = load(where, device, dtype=DTYPES[args.dtype], offload=args.offload)
    options = {} if args.verb == "classify" else {"steps": args.steps, "stage": args.stage}
    size = model.sizes.get(options.get("stage"), model.size)
    rows, labels, drawn = VERBS[args.verb](model, args, size, options)
    if not is_main():
        return
    files = {args.out: caption_grid(rows, labels)}
    if getattr(args, "singles", False):
        files |= {args.out.with_name(f"{args.out.stem}-{i}-{j}.png"): picture
                  for i, row in enumerate(drawn, start=1) for j, picture in enumerate(row, start=1)}
    for path, picture in files.items():
        with atomic_open(path) as file:
            picture.save(file, format="PNG")
    seconds, n = time.perf_counter() - began, sum(map(len, drawn))
    print(f"{n} picture{'s' * (n > 1)} of {size} pixels in {seconds:.0f} s: " * (n > 0) + ", ".join(map(str, files)))


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error), 130 after Ctrl-C."""
    return run_command("sample.py", parse, work, argv, less="lower --n, or draw small pictures only with --stage base")


if __name__ == "__main__":
    sys.exit(main())
