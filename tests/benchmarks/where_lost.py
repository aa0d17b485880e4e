"""At which noise level does a decoder lose what a caption says?

    python tests/benchmarks/where_lost.py --run runs/tiny [--n 96] [--t 250 400 700 850 950 999]

q(x_t | x_0) adds noise of time t to an unseen (`val`) picture. From there the decoder samples with
that picture's true z_img and caption, as its run is configured. metrics.grade reads the result.
Suppose a picture is right from a small t and wrong from a larger one: the decoder made its mistake
between the two. From the last t there is only noise.

Printed are the shares of pictures with everything right, `--n` of each kind of caption.
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
from grade_chain import shares                                  # noqa: E402
from mini_dalle2 import DALLE2                                  # noqa: E402
from mini_dalle2.data.pixels import to_float, to_pil            # noqa: E402
from mini_dalle2.data.shapes import CaptionedShapes, parse_caption            # noqa: E402
from mini_dalle2.data.tables import load_table                  # noqa: E402
from mini_dalle2.metrics.grader import KINDS                    # noqa: E402
from mini_dalle2.diffusion import randn_like                # noqa: E402
from mini_dalle2.sampling import strided_timesteps              # noqa: E402


def steps_below(cfg, start):
    """The sampling steps of a decoder's configuration that are not above t = start; ascending."""
    return [t for t in strided_timesteps(cfg.num_timesteps, cfg.sampling_steps) if t <= start]


def draw_on(decoder, images, z_img, tokens, start, generator):
    """Sample pictures (B, 3, S, S) from q(x_t | images), images (B, 3, S, S) in [-1, 1].

    t is the last sampling step that is not above `start`.
    """
    timesteps = steps_below(decoder.cfg, start)
    t = torch.full((len(images),), timesteps[-1])
    x_t = decoder.diffusion.q_sample(images, t, randn_like(images, generator))
    return decoder.sample(z_img, tokens, steps=timesteps, x_T=x_t, generator=generator)


def pictures_from(model, table, z_img, tokens, start):
    """Sample on from a table of pictures (N, 3, S, S): a list of N PIL images."""
    found = []
    for i in range(0, len(table), model.BATCH):
        part = slice(i, i + model.BATCH)
        generator = torch.Generator().manual_seed(i)
        found += map(to_pil, draw_on(
            model.decoder, to_float(table[part]), z_img[part], tokens[part], start, generator))
    return found


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--n", type=int, default=96, help="pictures of each kind")
    parser.add_argument("--t", type=int, nargs="+", default=[250, 400, 700, 850, 950, 999])
    args = parser.parse_args()
    if min(args.t) < 0 or args.n < 1:
        parser.error("--t from 0, --n from 1")
    model = DALLE2.load(args.run, device="cpu")
    data = CaptionedShapes("val", model.decoder.cfg.image_size, 0, 12 * args.n)
    table, captions = load_table(data, progress=False)
    kinds = [parse_caption(caption)[0] for caption in captions]
    of_kind = [[i for i, own in enumerate(kinds) if own == kind][:args.n] for kind in KINDS]
    z_img, tokens = model.encode_image(to_float(table)), model.tokens(captions)
    print(f"{'from t':>8}" + "".join(f"{kind:>10}" for kind in KINDS))
    for start in args.t:
        right = []
        for chosen in of_kind:
            drawn = pictures_from(model, table[chosen], z_img[chosen], tokens[chosen], start)
            right.append(shares(drawn, [captions[i] for i in chosen])[1]["all"])
        t = steps_below(model.decoder.cfg, start)[-1]
        print(f"{t:>8}" + "".join(f"{share:>10.1%}" for share in right), flush=True)


if __name__ == "__main__":
    main()
