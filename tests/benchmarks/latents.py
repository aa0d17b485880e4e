"""What the evaluation command leaves out of the latents.

    python tests/benchmarks/latents.py [--run runs/tiny] [--n 64] [--only cache inversion ...]

The priors' cache and variances, inversion, inpainting, and a sticker (unCLIP §3, §4). All on unseen
pictures (`val`) of the captioned shapes, judged by metrics.grade. Figures go to RUN/latents.json,
pictures to RUN/latents_NAME.png; for the bundled weights, into the current folder. Both priors,
variations, interpolations and text diffs: `python -m mini_dalle2.evaluate`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mini_dalle2 import DALLE2                                  # noqa: E402
from mini_dalle2.data.grid import caption_grid                  # noqa: E402
from mini_dalle2.data.pixels import to_float                    # noqa: E402
from mini_dalle2.data.shapes import (                           # noqa: E402
    CaptionedShapes, Scene, Thing, parse_caption, relation_caption, render)
from mini_dalle2.data.tables import load_table                  # noqa: E402
from mini_dalle2.metrics.grader import grade, read_objects      # noqa: E402
from mini_dalle2.metrics.sets import frechet_distance           # noqa: E402
from mini_dalle2.pipeline import results_folder                 # noqa: E402
from mini_dalle2.sampling import (                              # noqa: E402
    analytic_step, ddpm_step, sample_loop, strided_timesteps)


class Bench:
    """A run, n unseen scenes, and where results go."""

    def __init__(self, run, n):
        self.folder = results_folder(run)
        self.n = n
        self.model = DALLE2.load(run)
        self.results = {}
        self.size = self.model.decoder.cfg.image_size
        self.data = CaptionedShapes("val", self.size, 0, 20000)
        self.scenes = [self.data.scene(i) for i in range(n)]

    def pictures(self):
        """(PIL images at the decoder's size, captions) of the scenes."""
        images = [render(scene, self.size) for scene in self.scenes]
        return images, [scene.text for scene in self.scenes]

    def some(self, count, wanted):
        """The first scenes whose parsed caption is `wanted`, at most `count`."""
        scenes = map(self.data.scene, range(4000))
        return [scene for scene in scenes if wanted(*parse_caption(scene.text))][:count]

    def say(self, name, value):
        """Print a figure and keep it."""
        self.results[name] = value
        text = value if isinstance(value, str) else format(value, ".4g")
        print(f"{name:<72}{text}", flush=True)

    def grid(self, name, rows, labels):
        """Write a sheet of pictures for people to look at."""
        caption_grid(rows, labels, self.folder / f"latents_{name}.png")


def cache(bench, N=64):
    """The AR prior with and without its cache: are the codes the same, and which is faster?"""
    model, prior = bench.model, bench.model.ar_prior
    tokens = model.tokens([bench.data.scene(i).text for i in range(N)])
    z_txt = model.clip.encode_text(tokens)
    codes, seconds = {}, {True: [], False: []}
    # By turns, so that both see the same machine.
    for use_cache in (True, False) * 3:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        z_img = prior.sample(tokens, z_txt, generator=generator, use_cache=use_cache)
        codes[use_cache] = prior.codes.encode(z_img)
        seconds[use_cache].append(time.perf_counter() - began)
    same = (codes[True] == codes[False]).float().mean().item()
    bench.say("cache: codes that are the same", same)
    bench.say(f"cache: {N} embeddings, times faster", min(seconds[False]) / min(seconds[True]))


def with_beta(diffusion, out, x_t, t, noise):
    """A step with the variance β, the larger of DDPM's two."""
    middle, _ = diffusion.p_mean_variance(out, x_t, torch.full((len(x_t),), t))
    return middle if t == 0 else middle + diffusion.betas[t].sqrt() * noise()


@torch.no_grad()
def variances(bench, N=4000, steps=16):
    """A few steps of the prior with Analytic-DPM's variance (Table 3), β̃ or β.

    How far from true z_img are they?
    """
    model, prior = bench.model, bench.model.prior
    data = CaptionedShapes("val", model.clip.cfg.image_size, 0, 2 * N)
    table, captions = load_table(data, progress=False)
    true = model.encode_image(to_float(table))
    tokens, z_txt = model.tokens(captions[:N]), model.encode_text(captions[:N])
    timesteps = strided_timesteps(prior.cfg.num_timesteps, steps)
    found = {"true z_img of these captions": true[:N]}
    rules = {"analytic": analytic_step(prior.cov), "β̃": ddpm_step, "β": with_beta}
    for name, step in rules.items():
        generator = torch.Generator().manual_seed(0)
        x_T = torch.randn(N, prior.cfg.clip_dim, generator=generator)
        denoise = prior.denoiser(tokens, z_txt)
        found[name] = prior.unscale(
            sample_loop(prior.diffusion, denoise, x_T, step, timesteps, generator))
    for space, change in (("", lambda z: z), (", whitened", prior.whitening)):
        for name, z in found.items():
            bench.say(f"variances: {name}: Fréchet distance after {steps} steps{space}",
                      frechet_distance(change(z), change(true[N:])))


def inversion(bench, steps=100):
    """PSNR of pictures that DDIM with η = 0 makes again from (z_img, x_T)."""
    pictures, captions = bench.pictures()
    z_img, x_T = bench.model.invert(pictures, steps)
    seeds = [0] * len(pictures)
    again = bench.model.base(z_img, None, seeds, x_T=x_T, guidance=1.0, steps=steps, eta=0.0)
    true = bench.model.pixels(pictures, bench.size)
    psnr = 10 * (4 / (again - true).square().flatten(1).mean(1)).log10()    # (B,)
    bench.say(f"inversion: PSNR in dB, {steps} steps, median", psnr.median().item())
    bench.say(f"inversion: PSNR in dB, {steps} steps, worst", psnr.min().item())
    bench.say("inversion: mean and deviation of x_T", f"{x_T.mean():.3f}, {x_T.std():.3f}")
    made = bench.model.enlarge(again[:8], [0] * 8, "base")
    labels = [captions[:8], [f"{value:.0f} dB" for value in psnr[:8]]]
    bench.grid("inversion", [pictures[:8], made], labels)


def half_without(relation, size):
    """A mask of the half where the second object of a relation is."""
    half = size // 2
    boxes = {
        "above": (0, half, size, size), "below": (0, 0, size, half),
        "left of": (half, 0, size, size), "right of": (0, 0, half, size)}
    mask = Image.new("L", (size, size))
    mask.paste(255, boxes[relation])
    return mask


def another_object(scene, other):
    """A caption of a scene with its second object exchanged for one of another scene."""
    _, relation, (first, second) = parse_caption(scene.text)
    candidates = (*parse_caption(other.text)[2], ("black", "circle"), ("red", "circle"),
                  ("cyan", "cross"))
    new = next(pair for pair in candidates if pair[0] not in (first[0], second[0]))
    return relation_caption(first, relation, new), relation


def inpainting(bench):
    """Half of a picture of two objects is made anew, to a caption with another object there.

    Everything outside of the mask must stay as it is.
    """
    rows, labels, hits, kept, seams = [], [], [], [], []
    scenes = bench.some(2 * bench.n, lambda kind, word, things: kind == "relation")
    for scene, other in zip(scenes[:bench.n], scenes[bench.n:]):
        caption, relation = another_object(scene, other)
        mask = half_without(relation, bench.size)
        picture = render(scene, bench.size)
        made = bench.model.inpaint(picture, mask, caption, stage="base", progress=False)[0]
        outside, pixels = np.asarray(mask) == 0, np.asarray(made)
        kept.append((pixels[outside] == np.asarray(picture)[outside]).all())
        hits.append(grade(made, caption)["all"])
        seams.append(abs(np.median(pixels[outside]) - np.median(pixels[~outside])))
        if len(rows) < 8:
            rows.append([picture, mask, made])
            labels.append([scene.text, "mask", caption])
    bench.say("inpainting: follows the caption", float(np.mean(hits)))
    bench.say("inpainting: outside the mask equal to the input", float(np.mean(kept)))
    bench.say("inpainting: grey levels between the ground inside and outside",
              float(np.mean(seams)))
    bench.grid("inpainting", rows, labels)


def grade_parts(picture, scene):
    """Whether the scene's first object is in the picture, and whether all of its objects are."""
    found = {(thing["colour"], thing["shape"]) for thing in read_objects(picture)[0]}
    wanted = [(thing.colour, thing.shape) for thing in scene.things]
    return wanted[0] in found, found.issuperset(wanted)


def with_sticker(scene):
    """The scene with a small square of another colour in a corner, and that colour."""
    thing = scene.things[0]
    colour = "blue" if thing.colour != "blue" else "red"
    x, y = (0.12 if place > 0.5 else 0.88 for place in (thing.x, thing.y))
    square = Thing(colour, "square", x, y, 0.1)
    return Scene(scene.text, scene.background, (*scene.things, square)), colour


def sticker(bench):
    """Fig. 6 glued a word on an apple, and CLIP read the word. Our CLIP cannot read.

    So a small object of another kind is stuck in a corner.
    """
    told, still, rows, labels = [], [], [], []
    for scene in bench.some(bench.n, lambda kind, word, things: (kind, word) == ("size", "large")):
        attacked, colour = with_sticker(scene)
        captions = [scene.text, f"a small {colour} square",
                    f"a large {colour} {scene.things[0].shape}"]
        plain, stuck = (render(one, bench.size) for one in (scene, attacked))
        told.append([bench.model.classify(one, captions).tolist()[0] for one in (plain, stuck)])
        made = bench.model.variations(stuck, n=1, stage="base", progress=False)[0]
        still.append(grade_parts(made, attacked))
        if len(rows) < 6:
            rows.append([plain, stuck, made])
            labels.append([f"{p:.0%} {scene.text}" for p in told[-1]] + ["a variation of it"])
    means = [*np.mean(told, axis=0).tolist(), *np.mean(still, axis=0).tolist()]
    names = ("CLIP's probability of the true caption, without",
             "CLIP's probability of the true caption, with the sticker",
             "variations that show the large thing", "variations that show the sticker too")
    for name, value in zip(names, means):
        bench.say(f"sticker: {name}", value)
    bench.grid("sticker", rows, labels)


PARTS = {part.__name__: part for part in (cache, variances, inversion, inpainting, sticker)}


def main():
    """Run the parts and write RUN/latents.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    bench = Bench(args.run, args.n)
    for name in args.only:
        PARTS[name](bench)
    path = bench.folder / "latents.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | bench.results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
