"""What the evaluation command leaves out of the latents: the priors' cache and variances, inversion, inpainting, a sticker.

    python tests/benchmarks/latents.py [--run runs/tiny] [--n 64] [--only cache inversion ...]

All on unseen pictures (`val`) of the captioned shapes, judged by metrics.grade. Figures go to RUN/latents.json, pictures to
RUN/latents_NAME.png (of the weights in the box: here). unCLIP §3 (what is done with the latents), §4 (the sticker, after the apple of
Fig. 6). Both priors, variations, interpolations and text diffs: `python -m mini_dalle2.evaluate`.
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
from mini_dalle2 import DALLE2          # noqa: E402
from mini_dalle2.data.grid import caption_grid          # noqa: E402
from mini_dalle2.data.pixels import to_float          # noqa: E402
from mini_dalle2.data.shapes import CaptionedShapes, Scene, Thing, relation_caption, render          # noqa: E402
from mini_dalle2.data.tables import load_table          # noqa: E402
from mini_dalle2.data.shapes import parse_caption          # noqa: E402
from mini_dalle2.metrics.grader import grade, read_objects          # noqa: E402
from mini_dalle2.metrics.sets import frechet_distance          # noqa: E402
from mini_dalle2.pipeline import results_folder          # noqa: E402
from mini_dalle2.sampling import analytic_step, ddpm_step, sample_loop, strided_timesteps          # noqa: E402


class Bench:
    """A run, n unseen scenes, and where results go."""

    def __init__(self, run, n):
        self.folder, self.n, self.model, self.results = results_folder(run), n, DALLE2.load(run), {}
        self.data = CaptionedShapes("val", self.model.decoder.cfg.image_size, 0, 20000)
        self.scenes = [self.data.scene(i) for i in range(n)]
        self.size = self.model.decoder.cfg.image_size

    def pictures(self, scenes=None):
        """(PIL images at the decoder's size, captions) of scenes."""
        scenes = scenes or self.scenes
        return [render(scene, self.size) for scene in scenes], [scene.text for scene in scenes]

    def say(self, key, value):
        """Prints a figure and keeps it."""
        self.results[key] = value
        print(f"{key:<72}{value if isinstance(value, str) else format(value, '.4g')}", flush=True)

    def grid(self, name, rows, labels):
        """Writes a picture for people to look at."""
        caption_grid(rows, labels, self.folder / f"latents_{name}.png")


def cache(bench, N=64):
    """The autoregressive prior with and without its cache: the same codes, and how much faster."""
    model, prior = bench.model, bench.model.ar_prior
    tokens = model.tokens([bench.data.scene(i).text for i in range(N)])
    z_txt, found, seconds = model.clip.encode_text(tokens), {}, {True: [], False: []}
    for _ in range(3):
        for use_cache in seconds:                                          # by turns, so that both see the same machine
            began = time.perf_counter()
            found[use_cache] = prior.codes.encode(prior.sample(tokens, z_txt, generator=torch.Generator().manual_seed(0), use_cache=use_cache))
            seconds[use_cache].append(time.perf_counter() - began)
    bench.say("cache: codes that are the same", (found[True] == found[False]).float().mean().item())
    bench.say(f"cache: {N} embeddings, times faster", min(seconds[False]) / min(seconds[True]))


def variances(bench, N=4000, steps=16):
    """Few steps of the diffusion prior with Analytic-DPM's variance (Table 3), and with either fixed one, β̃ and β: how far from true z_img?"""
    model, prior = bench.model, bench.model.prior
    table, captions = load_table(CaptionedShapes("val", model.clip.cfg.image_size, 0, 2 * N), progress=False)
    true = model.encode_image(to_float(table))
    tokens, z_txt = model.tokens(captions[:N]), model.encode_text(captions[:N])

    def with_beta(diffusion, out, x_t, t, noise):
        mean, _ = diffusion.p_mean_variance(out, x_t, torch.full((len(x_t),), t))
        return mean if t == 0 else mean + diffusion.betas[t].sqrt() * noise()

    timesteps, found = strided_timesteps(prior.cfg.num_timesteps, steps), {"true z_img of these captions": true[:N]}
    for name, step in {"analytic": analytic_step(prior.cov), "β̃": ddpm_step, "β": with_beta}.items():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            x_T = torch.randn(N, prior.cfg.clip_dim, generator=generator)
            found[name] = prior.unscale(sample_loop(prior.diffusion, prior.denoiser(tokens, z_txt), x_T, step, timesteps, generator))
    for space, change in (("", lambda z: z), (", whitened", prior.whitening)):
        for name, z in found.items():
            bench.say(f"variances: {name}: Fréchet distance after {steps} steps{space}", frechet_distance(change(z), change(true[N:])))


def inversion(bench, steps=100):
    """PSNR of pictures that DDIM with η = 0 draws again from (z_img, x_T)."""
    pictures, captions = bench.pictures()
    z_img, x_T = bench.model.invert(pictures, steps)
    again = bench.model.base(z_img, None, [0] * len(pictures), x_T=x_T, guidance=1.0, steps=steps, eta=0.0)
    true = bench.model.pixels(pictures, bench.size)
    psnr = 10 * (4 / (again - true).square().flatten(1).mean(1)).log10()
    bench.say(f"inversion: PSNR in dB, {steps} steps, median", psnr.median().item())
    bench.say(f"inversion: PSNR in dB, {steps} steps, worst", psnr.min().item())
    bench.say("inversion: mean and deviation of x_T", f"{x_T.mean():.3f}, {x_T.std():.3f}")
    drawn = bench.model.enlarge(again[:8], [0] * 8, "base")
    bench.grid("inversion", [pictures[:8], drawn], [captions[:8], [f"{value:.0f} dB" for value in psnr[:8]]])


def inpainting(bench):
    """Half of a two-object picture is drawn anew, to a caption with another object there; the rest must be the picture's own."""
    rows, labels, hits, kept, seams = [], [], [], [], []
    scenes = [s for s in map(bench.data.scene, range(4000)) if parse_caption(s.text)[0] == "relation"][:2 * bench.n]
    for scene, other in zip(scenes[:bench.n], scenes[bench.n:]):
        _, relation, (first, second) = parse_caption(scene.text)
        new = next(pair for pair in (*parse_caption(other.text)[2], ("black", "circle"), ("red", "circle"), ("cyan", "cross"))
                   if pair[0] not in (first[0], second[0]))
        caption = relation_caption(first, relation, new)
        mask = Image.new("L", (bench.size, bench.size))
        half = bench.size // 2
        mask.paste(255, {"above": (0, half, bench.size, bench.size), "below": (0, 0, bench.size, half),
                         "left of": (half, 0, bench.size, bench.size), "right of": (0, 0, half, bench.size)}[relation])
        picture = render(scene, bench.size)
        drawn = bench.model.inpaint(picture, mask, caption, stage="base", progress=False)[0]
        outside = np.asarray(mask) == 0
        kept.append((np.asarray(drawn)[outside] == np.asarray(picture)[outside]).all())
        hits.append(grade(drawn, caption)["all"])
        seams.append(abs(np.median(np.asarray(drawn)[outside]) - np.median(np.asarray(drawn)[~outside])))
        if len(rows) < 8:
            rows.append([picture, mask, drawn])
            labels.append([scene.text, "mask", caption])
    bench.say("inpainting: follows the caption", float(np.mean(hits)))
    bench.say("inpainting: outside the mask equal to the input", float(np.mean(kept)))
    bench.say("inpainting: grey levels between the ground inside and outside", float(np.mean(seams)))
    bench.grid("inpainting", rows, labels)


def grade_parts(picture, scene):
    """(Is the scene's first thing in the picture, in its colour and shape; are all of its things?)"""
    found = {(thing.colour, thing.shape) for thing in read_objects(picture)[0]}
    wanted = [(thing.colour, thing.shape) for thing in scene.things]
    return wanted[0] in found, found.issuperset(wanted)


def sticker(bench):
    """Fig. 6 glued a word on an apple, and CLIP read it. Our CLIP cannot read: a small thing of another kind is stuck in a corner."""
    told, still, rows, labels = [], [], [], []
    scenes = [s for s in map(bench.data.scene, range(4000)) if parse_caption(s.text)[:2] == ("size", "large")][:bench.n]
    for scene in scenes:
        thing = scene.things[0]
        colour = "blue" if thing.colour != "blue" else "red"
        x, y = (0.12 if thing.x > 0.5 else 0.88), (0.12 if thing.y > 0.5 else 0.88)
        attacked = Scene(scene.text, scene.background, (*scene.things, Thing(colour, "square", x, y, 0.1)))
        captions = [scene.text, f"a small {colour} square", f"a large {colour} {thing.shape}"]
        probabilities = [bench.model.classify(render(s, bench.size), captions).tolist() for s in (scene, attacked)]
        told.append([p[0] for p in probabilities])
        drawn = bench.model.variations(render(attacked, bench.size), n=1, stage="base", progress=False)[0]
        still.append(grade_parts(drawn, attacked))
        if len(rows) < 6:
            rows.append([render(scene, bench.size), render(attacked, bench.size), drawn])
            labels.append([f"{p:.0%} {scene.text}" for p in told[-1]] + ["a variation of it"])
    bench.say("sticker: CLIP's probability of the true caption, without", float(np.mean([t[0] for t in told])))
    bench.say("sticker: CLIP's probability of the true caption, with the sticker", float(np.mean([t[1] for t in told])))
    bench.say("sticker: variations that show the large thing", float(np.mean([large for large, _ in still])))
    bench.say("sticker: variations that show the sticker too", float(np.mean([both for _, both in still])))
    bench.grid("sticker", rows, labels)


PARTS = {f.__name__: f for f in (cache, variances, inversion, inpainting, sticker)}


def main():
    """Runs the parts, writes RUN/latents.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
