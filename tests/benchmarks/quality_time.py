"""Time to quality: how many minutes of training until the decoder draws what captions say?

    python tests/benchmarks/quality_time.py --out runs/quality [--preset tiny] [--every 10] [--until 90] [--n 256] [--decoder.steps=36000 ...]

Trains tokenizer and CLIP as train.py does, then the decoder. Every so many minutes of the decoder's training it is stopped, as by Ctrl-C, and
its averaged weights draw n unseen captions (`val`) from true z_img; a picture counts if the grader finds all of the caption in it
(metrics.grade). Goes on until that share, in per cent, is reached, or the steps are done. Minutes are those of the training alone, of all
stages so far. Called again with the same --out it goes on where it was. Prints a line per grade; writes OUT/quality_time.json and .png.

The rate falls to zero at --decoder.steps, and quality comes late in that: with another number of steps it is another curve.
"""

import argparse
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
from grade_chain import shares                                             # noqa: E402
from mini_dalle2 import configs          # noqa: E402
from mini_dalle2.runtime.commands import Parser, sentence          # noqa: E402
from mini_dalle2.data.pixels import to_pil          # noqa: E402
from mini_dalle2.metrics.grader import ASPECTS          # noqa: E402
from mini_dalle2.pipeline import load_model          # noqa: E402
from mini_dalle2.runtime.noise import seeded          # noqa: E402
from mini_dalle2.training.figures import save_figure          # noqa: E402
from mini_dalle2.runtime.files import read_json, write_json          # noqa: E402
from mini_dalle2.training.run import Run          # noqa: E402
from mini_dalle2.runtime.device import pick_device          # noqa: E402
from mini_dalle2.runtime.files import load_checkpoint, read_metrics          # noqa: E402
from mini_dalle2.training import overrides          # noqa: E402

BATCH = 64                                                                 # pictures drawn at once


def spent(run, stage):
    """(steps, all its steps, minutes) that a stage's training has behind it."""
    path = run / f"{stage}.pt"
    if not path.is_file():
        return 0, None, 0.0
    checkpoint = load_checkpoint(path, stage)
    return checkpoint["step"], checkpoint["steps"], checkpoint["seconds"] / 60


def train_until(args, stage, minutes=math.inf):
    """Trains a stage until it has `minutes` behind it, then stops it with Ctrl-C's signal, upon which it saves. Or until it is finished.

    Raises ValueError when train.py refuses.
    """
    resume = ["--resume"] if (args.out / f"{stage}.resume.pt").is_file() else []
    command = [sys.executable, "train.py", "--preset", args.preset, "--out", str(args.out.absolute()), "--stage", stage, *resume, *args.settings]
    asked = False
    with tempfile.TemporaryFile("w+") as said:
        # A session of its own, so that Ctrl-C does not reach it twice: from the terminal and from here.
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
        try:
            while child.poll() is None:
                time.sleep(min(5, 6 * args.every))                  # reading metrics costs a little time itself
                lines = [line for line in read_metrics(args.out) if line["stage"] == stage] if minutes < math.inf else []
                if lines and lines[-1]["seconds"] >= 60 * minutes and not asked:
                    asked = True
                    child.send_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if not asked and child.poll() is None:
                child.send_signal(signal.SIGINT)
            child.wait()
            raise
        said.seek(0)
        message = re.split(r"[\r\n]+", said.read().strip())[-1].removeprefix("train.py: ")
    if child.returncode not in (0, 130):
        raise ValueError(message or f"train.py ended with exit code {child.returncode}")


def grade(run, n, seed):
    """{aspect: share of n unseen captions where it holds}: the decoder samples from true z_img."""
    path = run.folder / "decoder.pt"
    decoder = load_model(path, "decoder")[0]
    decoder.to(run.device, memory_format=torch.channels_last)
    seen, captions = (part[:n] for part in run.table("val", run.config.clip.model.image_size))
    z_img, _ = run.clip_embeddings(seen, captions)
    tokens = run.tokens(captions)
    images = []
    for start in range(0, len(captions), BATCH):
        part = slice(start, start + BATCH)
        # The noise is the same for every grade.
        noise = [seeded(seed, "quality", i) for i in range(len(captions))[part]]
        made = decoder.sample(z_img[part], tokens[part], generator=noise)
        images += [to_pil(image) for image in made]
    return shares(images, captions)[1]


def plot(path, graded, until):
    """The shares over minutes, as a picture."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for aspect in ASPECTS:
        axes.plot([g["minutes"] for g in graded], [100 * g[aspect] for g in graded], marker="o", label=aspect, linewidth=2 if aspect == "all" else 1)
    axes.axhline(until, color="0.6", linestyle="--")
    axes.set(xlabel="minutes of training, all stages so far", ylabel="% of pictures", ylim=(0, 100), title="the decoder, from true z_img")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def parse(argv):
    """Command line -> namespace, with train.py's settings as a list, and the configuration they make. Raises ValueError."""
    parser = Parser(prog="quality_time.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--preset", choices=["micro", "tiny", "small"], default="tiny")
    parser.add_argument("--every", type=float, default=10, help="minutes of the decoder's training between two grades")
    parser.add_argument("--until", type=float, default=90, help="per cent of captions all right")
    parser.add_argument("--n", type=int, default=256, help="captions")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    args, args.settings = parser.parse_known_args(argv)
    if not args.every > 0 or not 0 < args.until <= 100 or args.n < 1:
        raise ValueError("--every must be above 0, --until above 0 and at most 100, and --n at least 1")
    args.config = config = overrides.override(configs.preset(args.preset), args.settings)
    if config.data.source != "shapes":
        raise ValueError("only captioned shapes can be graded: leave out --data.source")
    if config.decoder.model.image_size < 24:
        raise ValueError(f"pictures of {config.decoder.model.image_size} pixels are too small to be graded: 24 is the least")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: it names the run folder")
    return args


def work(args):
    """Trains and grades by turns."""
    needed = ["tokenizer", "clip", *(["sketch"] if args.config.decoder.model.sketch else [])]
    for stage in needed:
        step, steps, _ = spent(args.out, stage)
        done = (args.out / "tokenizer.json").is_file() if stage == "tokenizer" else step == steps
        if not done:
            train_until(args, stage)
    file, before = args.out / "quality_time.json", sum(spent(args.out, stage)[2] for stage in needed[1:])
    graded = read_json(file)["graded"] if file.is_file() else []
    print(f"{'minutes':>8}{'of decoder':>12}{'steps':>8}" + "".join(f"{aspect:>10}" for aspect in ASPECTS))
    for g in graded:
        print(row(g), "  (from before)")
    while True:
        step, steps, minutes = spent(args.out, "decoder")
        if step and step not in [g["step"] for g in graded]:
            config = overrides.from_dict(read_json(args.out / "config.json"))
            run = Run(config, args.out, pick_device(), resume=True)
            spent_so_far = {"minutes": before + minutes, "decoder": minutes, "step": step}
            graded.append(spent_so_far | grade(run, args.n, args.seed))
            write_json({"until": args.until, "n": args.n, "settings": args.settings, "graded": graded}, file)
            plot(args.out / "quality_time.png", graded, args.until)
            print(row(graded[-1]), flush=True)
        if graded and 100 * graded[-1]["all"] >= args.until:
            print(f"{args.until:g} % after {graded[-1]['minutes']:.1f} minutes")
            return
        if step == steps:
            print(f"{args.until:g} % was not reached in {steps:,} steps; the best was {max(g['all'] for g in graded):.1%}")
            return
        train_until(args, "decoder", (math.floor(minutes / args.every + 1e-6) + 1) * args.every)


def row(g):
    """A line of the table."""
    return f"{g['minutes']:>8.1f}{g['decoder']:>12.1f}{g['step']:>8,}" + "".join(f"{g[aspect]:>10.1%}" for aspect in ASPECTS)


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error), 130 after Ctrl-C."""
    try:
        work(parse(argv))
    except (ValueError, OSError) as error:
        print(f"quality_time.py: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
