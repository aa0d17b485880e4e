"""At which noise does a decoder lose what a caption says? It draws on from true pictures with more and more noise.

    python tests/benchmarks/where_lost.py --run runs/tiny [--n 96] [--t 250 400 700 850 950 999]

q(x_t | x_0) puts noise of time t on an unseen (`val`) picture; from there the decoder draws with that picture's true z_img and caption, as its
run is configured. metrics.grade then reads what came of it. What is still right from a small t and wrong from a larger one was decided, wrongly,
between the two; from the last t there is nothing but noise. Printed are the shares of `--n` pictures of each kind of caption with everything right.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from grade_chain import shares                                             # noqa: E402
from mini_dalle2 import DALLE2          # noqa: E402
from mini_dalle2.data.pixels import to_float          # noqa: E402
from mini_dalle2.data.shapes import CaptionedShapes          # noqa: E402
from mini_dalle2.data.tables import load_table          # noqa: E402
from mini_dalle2.diffusion import randn_like          # noqa: E402
from mini_dalle2.data.shapes import parse_caption          # noqa: E402
from mini_dalle2.metrics.grader import KINDS          # noqa: E402
from mini_dalle2.data.pixels import to_pil          # noqa: E402
from mini_dalle2.sampling import strided_timesteps          # noqa: E402


def steps_below(cfg, start):
    """The sampling steps of a decoder's configuration that are not above t = start; ascending."""
    return [t for t in strided_timesteps(cfg.num_timesteps, cfg.sampling_steps) if t <= start]


def draw_on(decoder, images, z_img, tokens, start, generator):
    """Pictures (B, 3, S, S) drawn from q(x_t | images), t the last sampling step not above `start`; images (B, 3, S, S) in [-1, 1]."""
    timesteps = steps_below(decoder.cfg, start)
    x_t = decoder.diffusion.q_sample(images, torch.full((len(images),), timesteps[-1]), randn_like(images, generator))
    return decoder.sample(z_img, tokens, steps=timesteps, x_T=x_t, generator=generator)


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--n", type=int, default=96, help="pictures of each kind")
    parser.add_argument("--t", type=int, nargs="+", default=[250, 400, 700, 850, 950, 999])
    args = parser.parse_args()
    if min(args.t) < 0 or args.n < 1:
        parser.error("--t from 0, --n from 1")
    model = DALLE2.load(args.run, device="cpu")
    table, captions = load_table(CaptionedShapes("val", model.decoder.cfg.image_size, 0, 12 * args.n), progress=False)
    of_kind = {kind: [i for i, caption in enumerate(captions) if parse_caption(caption)[0] == kind][:args.n] for kind in KINDS}
    z_img, tokens = model.encode_image(to_float(table)), model.tokens(captions)
    print(f"{'from t':>8}" + "".join(f"{kind:>10}" for kind in KINDS))
    for start in args.t:
        right = []
        for chosen in of_kind.values():
            drawn = []
            for i in range(0, len(chosen), model.BATCH):
                part, generator = chosen[i:i + model.BATCH], torch.Generator().manual_seed(i)
                drawn += map(to_pil, draw_on(model.decoder, to_float(table[part]), z_img[part], tokens[part], start, generator))
            right.append(shares(drawn, [captions[i] for i in chosen])[1]["all"])
        print(f"{steps_below(model.decoder.cfg, start)[-1]:>8}" + "".join(f"{share:>10.1%}" for share in right), flush=True)


if __name__ == "__main__":
    main()
