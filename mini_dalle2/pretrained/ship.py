"""The bundled weights: a trained run, made small enough for the repository.

    python -m mini_dalle2.pretrained.ship runs/tiny --commit 1234abc

It takes a run that is trained and graded, and writes into mini_dalle2/weights. Of each stage only
the EMA weights are kept, in half precision; the pictures look the same. What was measured rather
than learned (whitening, PCA) stays in float32. A card beside the weights, README.md, says what they
are, with the commands that made them.

Read next: ../pipeline.py, which loads them when no run is named.
"""

import argparse
import shlex
import sys
from pathlib import Path

from ..configs import MODELS, parameters
from ..data import words
from ..metrics.grader import ASPECTS
from ..pipeline import OPTIONAL, WEIGHTS, load_model
from ..runtime.commands import Parser, sentence
from ..runtime.files import atomic_open, card_rows, read_json, save_checkpoint, signature
from ..training import overrides

CARD = """# The bundled weights

`DALLE2.load()` and `sample.py` use these weights when no run is named.
They are EMA weights in half precision, trained from scratch on the captioned shapes of
`mini_dalle2/data/shapes.py`.
The program draws these shapes itself, so the weights contain nothing from pictures, texts or
weights of other people.
The weights have the licence of the code.

Trained at commit {commit} with seed {seed}:

```bash
{commands}
```

| stage | parameters | steps | minutes |
|---|---|---|---|
{stages}

{figures}

`DALLE2.load` compares each file with its SHA-256:

| file | SHA-256 |
|---|---|
{digests}
"""


def half(tensors, learned):
    """Return a state dict with what was learned in half precision."""
    return {name: value.half() if name in learned and value.is_floating_point() else value
            for name, value in tensors.items()}


def without_redraw(checkpoint):
    """Return CLIP's checkpoint without the network that redraws pictures.

    That network only helps in training, and is as large as the rest of CLIP.
    """
    weights = {name: value for name, value in checkpoint["ema"].items()
               if not name.startswith("redraw.")}
    config = checkpoint["config"]
    clip = config["clip"] | {"model": config["clip"]["model"] | {"picture_weight": 0.0}}
    return checkpoint | {
        "ema": weights, "model_config": checkpoint["model_config"] | {"picture_weight": 0.0},
        "config": config | {"clip": clip}}


def on_lines(words, width=100):
    """Return a shell command, folded into lines of about `width` letters."""
    lines = [""]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def small_checkpoints(run):
    """Return {stage: small checkpoint} of a finished run, and the card's lines about its stages.

    Raises FileNotFoundError, ValueError.
    """
    small = {}
    lines = []
    for stage in MODELS:
        path = run / f"{stage}.pt"
        if stage in (*OPTIONAL, "sketch") and not path.is_file():
            continue
        model, checkpoint = load_model(path, stage)
        step, steps = checkpoint["step"], checkpoint["steps"]
        if step < steps:
            raise ValueError(f"{path} is not finished: {step} of {steps} steps")
        if stage == "clip":
            model.redraw = None
            checkpoint = without_redraw(checkpoint)
        minutes = checkpoint["seconds"] / 60
        lines.append(f"| {stage} | {parameters(model):,} | {steps:,} | {minutes:.1f} |")
        # The sketch's weights lie in the decoder.
        if stage == "sketch":
            continue
        learned = dict(model.named_parameters())
        small[stage] = checkpoint | {"ema": half(checkpoint["ema"], learned)}
        # The signature is that of CLIP as it is now.
        if checkpoint.get("clip_signature"):
            small[stage]["clip_signature"] = signature(small["clip"]["ema"])
    return small, lines


def figures_of(run):
    """Return the card's table of grades, or a sentence where the run is not graded."""
    path = run / "grade.json"
    grades = read_json(path) if path.is_file() else {}
    rows = [[name, *(f"{grade[aspect]:.1%}" for aspect in ASPECTS)]
            for name, grade in grades.items() if isinstance(grade, dict)]
    if not rows:
        return "Not graded."
    rows = [["captions, from, size", *ASPECTS], ["---"] * (1 + len(ASPECTS)), *rows]
    title = (f"The share of pictures that is right, "
             f"by `python tests/benchmarks/grade_chain.py --run {run}`:\n")
    return "\n".join([title, *(f"| {' | '.join(row)} |" for row in rows)])


def ship(run, out, commit):
    """Write the small checkpoints of a finished run, and their card, into the folder `out`.

    Returns their bytes. Raises FileNotFoundError, ValueError.
    """
    run = Path(run)
    out = Path(out)
    small, lines = small_checkpoints(run)
    config = overrides.from_dict(read_json(run / "config.json"))
    commands = (run / "commands.txt").read_text("utf-8", "backslashreplace").splitlines()
    commands = [on_lines(shlex.split(line)) for line in commands]
    figures = figures_of(run)
    out.mkdir(parents=True, exist_ok=True)
    for stage, checkpoint in small.items():
        save_checkpoint(checkpoint, out / f"{stage}.pt")
    if (run / words.FILE).is_file():
        with atomic_open(out / words.FILE) as file:
            file.write((run / words.FILE).read_bytes())
    files = [path for path in sorted(out.iterdir()) if path.suffix in (".pt", ".txt")]
    card = CARD.format(commit=commit, seed=config.data.seed, commands="\n".join(commands),
                       stages="\n".join(lines), figures=figures, digests=card_rows(files))
    with atomic_open(out / "README.md") as file:
        file.write(card.encode())
    return sum((out / f"{stage}.pt").stat().st_size for stage in small)


def main(argv=None):
    """Run the command. Returns 0, or 2 after a mistake (one sentence on standard error)."""
    parser = Parser(prog="shipped", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of train.py, finished")
    parser.add_argument("--commit", required=True, help="the commit it was trained at")
    parser.add_argument("--out", type=Path, default=WEIGHTS, metavar="FOLDER")
    try:
        args = parser.parse_args(argv)
        print(f"{args.out}: {ship(args.run, args.out, args.commit) / 1e6:.1f} MB")
        return 0
    except (ValueError, OSError) as error:
        print(f"shipped: {sentence(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
