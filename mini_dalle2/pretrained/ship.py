"""The weights in the box: a trained run, made small enough to lie in the repository, so that a fresh clone draws at once.

    python -m mini_dalle2.shipped runs/tiny --commit 1234abc          from a run that is trained and graded, into mini_dalle2/weights

Of each stage only the averaged weights are kept, in half precision: 11 significant bits, of which a picture shows nothing. What was measured
rather than learned (whitening, PCA) stays in float32. A card beside them, README.md, says what they are, with the commands that made them.

Read next: pipeline.py, which loads them when no run is named.
"""

import argparse
import shlex
import sys
from pathlib import Path

from ..runtime.commands import Parser, sentence
from ..metrics.grader import ASPECTS
from ..configs import MODELS, parameters
from ..pipeline import OPTIONAL, WEIGHTS, load_model
from ..runtime.files import read_json, signature
from ..runtime.files import atomic_open, save_checkpoint
from ..training import overrides

CARD = """# The bundled weights

`DALLE2.load()` and `sample.py` use these weights when no run is named.
They are EMA weights in half precision, trained from scratch on the captioned shapes of `mini_dalle2/data/shapes.py`.
The program draws these shapes itself, so the weights contain nothing from pictures, texts or weights of other people.
The weights have the licence of the code.

Trained at commit {commit} with seed {seed}:

```bash
{commands}
```

| stage | parameters | steps | minutes |
|---|---|---|---|
{stages}

{figures}
"""


def half(tensors, learned):
    """A state dict with what was learned in half precision."""
    return {name: value.half() if name in learned and value.is_floating_point() else value for name, value in tensors.items()}


def without_redraw(checkpoint):
    """CLIP's checkpoint without the network that redraws pictures: it only ever helps in training, and is as large as all the rest."""
    def off(model):
        return model | {"picture_weight": 0.0}

    config = checkpoint["config"]
    return checkpoint | {"ema": {name: value for name, value in checkpoint["ema"].items() if not name.startswith("redraw.")},
                         "model_config": off(checkpoint["model_config"]),
                         "config": config | {"clip": config["clip"] | {"model": off(config["clip"]["model"])}}}


def on_lines(words, width=100):
    """A command for the shell, folded so that a page shows all of it: as many words to a line as `width` letters hold."""
    lines = [""]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def ship(run, out, commit):
    """Writes the small checkpoints of a finished run, and their card, into `out`; returns their bytes. Raises FileNotFoundError, ValueError."""
    run, out, lines, small = Path(run), Path(out), [], {}
    for stage in MODELS:
        if stage in (*OPTIONAL, "sketch") and not (run / f"{stage}.pt").is_file():
            continue
        model, checkpoint = load_model(run / f"{stage}.pt", stage)
        if checkpoint["step"] < checkpoint["steps"]:
            raise ValueError(f"{run}/{stage}.pt is not finished: {checkpoint['step']} of {checkpoint['steps']} steps")
        if stage == "clip":
            model.redraw, checkpoint = None, without_redraw(checkpoint)
        lines.append(f"| {stage} | {parameters(model):,} | {checkpoint['steps']:,} | {checkpoint['seconds'] / 60:.1f} |")
        if stage == "sketch":                                              # its weights lie in the decoder
            continue
        small[stage] = checkpoint | {"ema": half(checkpoint["ema"], dict(model.named_parameters()))}
        if "clip_signature" in checkpoint and checkpoint["clip_signature"]:        # that of CLIP as it now is
            small[stage]["clip_signature"] = signature(small["clip"]["ema"])
    config = overrides.from_dict(read_json(run / "config.json"))
    given = [on_lines(shlex.split(line)) for line in (run / "commands.txt").read_text(encoding="utf-8").splitlines()]
    grades = read_json(run / "grade.json") if (run / "grade.json").is_file() else {}
    rows = [[name, *(f"{grade[aspect]:.1%}" for aspect in ASPECTS)] for name, grade in grades.items() if isinstance(grade, dict)]
    table = [f"| {' | '.join(row)} |" for row in (["captions, from, size", *ASPECTS], ["---"] * (1 + len(ASPECTS)), *rows)]
    figures = "\n".join([f"The share of pictures that is right, by `python tests/benchmarks/grade_chain.py --run {run}`:\n", *table]) if rows else "Not graded."
    out.mkdir(parents=True, exist_ok=True)
    for stage, checkpoint in small.items():
        save_checkpoint(checkpoint, out / f"{stage}.pt")
    with atomic_open(out / "README.md") as file:
        card = CARD.format(commit=commit, seed=config.data.seed, commands="\n".join(given), stages="\n".join(lines), figures=figures)
        file.write(card.encode())
    return sum((out / f"{stage}.pt").stat().st_size for stage in small)


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error)."""
    parser = Parser(prog="shipped", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
