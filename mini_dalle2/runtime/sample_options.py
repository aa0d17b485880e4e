"""The command line of sample.py: one verb, its inputs, its options.

    python sample.py VERB INPUT ... [--option value ...]

Read next: sample.py at the top level, which does what is asked for.
"""

import argparse
import difflib
import re
import shlex
from pathlib import Path

import torch

from .commands import Parser
from .device import DEVICES

DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def sample_parser(description, priors, sketches, grammar):
    """Return the parser of sample.py.

    description: what --help shows first. priors: names to choose from. sketches: the
    default of --sketches. grammar: what captions can say to the bundled weights.
    """
    shared = shared_options()
    sampling = sampling_options(shared)
    parser = Parser(prog="sample.py", description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=Parser)
    add_text(verbs, sampling, priors, sketches, grammar)
    add_inpaint(verbs, sampling, priors)
    add_variations(verbs, sampling)
    add_interpolate(verbs, sampling)
    add_textdiff(verbs, sampling)
    add_reconstruct(verbs, sampling)
    add_classify(verbs, shared)
    return parser


def check_verb(argv, verbs):
    """Raise ValueError, with the command that was meant, unless a command line begins with a verb.

    verbs: their names.
    """
    example = 'python sample.py text "a red circle"'
    if not argv:
        raise ValueError(f"say what to do: {', '.join(verbs)}; for example: {example}")
    first = argv[0]
    if first in (*verbs, "-h", "--help"):
        return
    if first.startswith("-"):
        raise ValueError(f"{first} stands before the verb: the verb comes first, as in: {example}")
    closest = difflib.get_close_matches(first, verbs, n=1)
    if closest:
        raise ValueError(f'there is no verb "{first}"; the closest is {closest[0]}')
    flags = [i for i, word in enumerate(argv) if word.startswith("-")]
    end = flags[0] if flags else len(argv)
    pictures = [word for word in argv[:end] if Path(word).is_file()]
    if pictures and not Path(first).is_file():
        raise ValueError(f'"{first}" is none of {", ".join(verbs)}: to change a picture, say what '
                         f'it shows and what it should show: python sample.py textdiff '
                         f'{shlex.quote(pictures[0])} "a red circle" "a blue circle"')
    # Somebody may have forgotten the quotes, too.
    caption = re.sub(r"^(please )?(draw|paint|make|show)( me)? |^a picture of ", "",
                     " ".join(argv[:end]))
    words = ["variations", first] if Path(first).is_file() else ["text", caption]
    meant = shlex.join([*words, *argv[end:]])
    raise ValueError(f'"{first}" is none of {", ".join(verbs)}: perhaps this was meant: '
                     f'python sample.py {meant}')


def captions_of(args):
    """List all captions of a command line."""
    alone = [getattr(args, key, None) for key in ("caption", "source", "target")]
    return getattr(args, "captions", []) + [caption for caption in alone if caption]


def quotes_notes(captions):
    """Say that several captions of one word each may be one caption: list of one note or none."""
    if len(captions) > 1 and not any(" " in caption.strip() for caption in captions):
        return [f'these are {len(captions)} captions of one word each: a caption of several words '
                f'stands in quotes, as in "{" ".join(captions)}"']
    return []


def check_numbers(args):
    """Raise ValueError for numbers that no run can sample with."""
    for name, what in (("n", "pictures"), ("rerank", "pictures"), ("sketches", "sketches")):
        value = getattr(args, name, None)
        if value is not None and not 1 <= value <= 1000:
            raise ValueError(f"--{name} {value}: from 1 to 1000 {what}")
    if not 0 <= args.seed < 2 ** 63:
        raise ValueError(f"--seed {args.seed}: a whole number from 0 to 2 ** 63 - 1")
    if not 0 <= getattr(args, "eta", 0) <= 1:
        raise ValueError(f"--eta {args.eta}: a number from 0 to 1")


# ------------------------------------------------------------------ options of several verbs

def shared_options():
    """Return the options of all verbs."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--run", help="run folder of train.py (default: the bundled weights, "
                                      "or runs/tiny where there are none)")
    parser.add_argument("--weights", metavar="FOLDER",
                        help="Karlo's public weights instead of a run (see the README)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32",
                        help="precision of the matrices: fp16 for GPUs, bf16 also for CPUs with "
                             "AMX (default: fp32)")
    parser.add_argument("--offload", action="store_true",
                        help="keep only the working model on the GPU: for large models on small "
                             "GPUs")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.png",
                        help="file of the grid (default: samples/VERB-001.png, then -002 and so "
                             "on, in the folder of --run, or in the current one without --run)")
    parser.add_argument("--device", default="auto", choices=DEVICES,
                        help="where the models run (default: the GPU if there is one)")
    return parser


def sampling_options(shared):
    """Return the options of the verbs that sample pictures."""
    parser = argparse.ArgumentParser(add_help=False, parents=[shared])
    parser.add_argument("--steps", type=int,
                        help="sampling steps of the decoder (default: the run's own; more of them "
                             "take longer, and hardly look better)")
    parser.add_argument("--stage", choices=["full", "base", "up1"], default="full",
                        help="base: the small pictures of the decoder; up1: the pictures of the "
                             "first upsampler; full: the largest (default: full)")
    parser.add_argument("--singles", action="store_true",
                        help="also write each picture as FILE-ROW-COLUMN.png")
    return parser


def add_number(parser, default=4):
    """Add --n."""
    parser.add_argument("--n", type=int, default=default,
                        help=f"number of pictures (default: {default})")


def add_guidance(parser, default=None):
    """Add --guidance."""
    shown = "the run's own" if default is None else f"{default:g}"
    parser.add_argument("--guidance", type=float, default=default,
                        help=f"guidance scale of the decoder; 1 is none, and a large one makes "
                             f"edges rough (default: {shown})")


def add_prior(parser, priors):
    """Add --prior."""
    parser.add_argument("--prior", choices=priors, default="diffusion",
                        help="source of the image embedding: one of the two priors, diffusion or "
                             "ar; z_txt uses CLIP's text embedding instead; caption uses none "
                             "(default: diffusion)")


# ------------------------------------------------------------------ the verbs

def add_text(verbs, sampling, priors, sketches, grammar):
    """Add the verb text."""
    parser = verbs.add_parser(
        "text", parents=[sampling], help="sample pictures of captions",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The bundled weights know only the words of the captioned shapes:\n{grammar}\n"
               "A run of train.py knows the words of its own captions, in RUN/words.txt.")
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
    add_number(parser)
    add_guidance(parser)
    add_prior(parser, priors)
    parser.add_argument("--rerank", type=int,
                        help="sample this many pictures of each caption, and show the --n that "
                             "CLIP finds closest to the caption, the best first")
    parser.add_argument("--sketches", type=int, default=sketches,
                        help="sample this many image embeddings for each picture, and keep the "
                             "one whose sketch CLIP finds closest to the caption; 1 means no "
                             f"choice, as does a run without a sketch (default: {sketches})")


def add_inpaint(verbs, sampling, priors):
    """Add the verb inpaint."""
    parser = verbs.add_parser(
        "inpaint", parents=[sampling],
        help="change a picture where the mask is white, or transparent; the caption describes the "
             "whole picture")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("mask", metavar="MASK")
    parser.add_argument("caption", metavar="CAPTION")
    add_number(parser)
    add_guidance(parser)
    add_prior(parser, priors)


def add_variations(verbs, sampling):
    """Add the verb variations."""
    parser = verbs.add_parser("variations", parents=[sampling],
                              help="sample other pictures of what CLIP sees in one")
    parser.add_argument("image", metavar="IMAGE")
    add_number(parser)
    add_guidance(parser, default=1.0)
    parser.add_argument("--eta", type=float, default=1.0,
                        help="0 reconstructs the picture, 1 varies most (default: 1)")


def add_interpolate(verbs, sampling):
    """Add the verb interpolate."""
    parser = verbs.add_parser("interpolate", parents=[sampling],
                              help="go from one picture to another")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("other", metavar="OTHER")
    add_number(parser, default=6)
    parser.add_argument("--fixed-noise", action="store_true",
                        help="use one random x_T for all pictures, from --seed")


def add_textdiff(verbs, sampling):
    """Add the verb textdiff."""
    parser = verbs.add_parser(
        "textdiff", parents=[sampling],
        help='change a picture as the caption TARGET differs from SOURCE ("" for no source)')
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("source", metavar="SOURCE", help="the caption of the picture as it is")
    parser.add_argument("target", metavar="TARGET", help="the caption that it should have")
    # With guidance 1 the picture itself comes out at theta 0.
    add_guidance(parser, default=2.0)
    parser.add_argument("--theta", type=float, nargs="+", default=[0, 0.2, 0.3, 0.4, 0.5],
                        help="how far to go, from 0 to 1 (default: 0 0.2 0.3 0.4 0.5); beyond "
                             "0.6, shapes may break")


def add_reconstruct(verbs, sampling):
    """Add the verb reconstruct."""
    parser = verbs.add_parser("reconstruct", parents=[sampling],
                              help="reconstruct a picture from its own latents")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--components", type=int, nargs="+",
                        help="numbers of principal components of z_img to keep (default: all, and "
                             "the picture's own x_T)")


def add_classify(verbs, shared):
    """Add the verb classify."""
    parser = verbs.add_parser("classify", parents=[shared],
                              help="ask CLIP which caption fits a picture")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
