"""What one can do with the latents, in figures: both priors, Analytic-DPM, inversion, variations, text diffs, inpainting, a sticker.

    python tests/benchmarks/latents.py [--run runs/tiny] [--n 64] [--only priors analytic cache inversion ...]

All on unseen pictures (`val`) of the captioned shapes, judged by metrics.grade. Figures go to RUN/latents.json, pictures to
RUN/latents_NAME.png. unCLIP §2.2 (priors), §3 (what is done with the latents), §4 (the sticker, after the apple of Fig. 6).
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
from mini_dalle2 import DALLE2                                             # noqa: E402
from mini_dalle2.data import CaptionedShapes, Scene, Thing, caption_grid, relation_caption, render      # noqa: E402
from mini_dalle2.metrics import frechet_distance, grade, parse_caption, read_objects         # noqa: E402
from mini_dalle2.sampling import analytic_step, ddpm_step, sample_loop, strided_timesteps      # noqa: E402

# Ten edits, chosen before any was tried. (what the caption says, what it is to say instead)
EDITS = [("red circle", "blue circle"), ("yellow star", "cyan star"), ("black cross", "orange cross"), ("green triangle", "purple triangle"),
         ("blue circle", "blue square"), ("red triangle", "red ring"), ("orange square", "orange star"),
         ("above", "below"), ("left of", "right of"), ("small", "large")]


class Bench:
    """A run, n unseen scenes, and where results go."""

    def __init__(self, run, n):
        self.run, self.n, self.model, self.results = run, n, DALLE2.load(run), {}
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
        print(f"{key:<64}{value if isinstance(value, str) else format(value, '.4g')}", flush=True)

    def grid(self, name, rows, labels):
        """Writes a picture for people to look at."""
        caption_grid(rows, labels, self.run / f"latents_{name}.png")


def right(pictures, captions):
    """Share of pictures in which the grader finds all that their captions say."""
    return float(np.mean([grade(picture, caption)["all"] for picture, caption in zip(pictures, captions)]))


def priors(bench):
    """The whole chain by either prior, and the upper rows of Fig. 8."""
    _, captions = bench.pictures()
    for prior in bench.model.PRIORS:
        if prior == "ar" and bench.model.ar_prior is None:
            continue
        drawn = [row[0] for row in bench.model.text_to_image(captions, prior=prior, stage="base", progress=False)]
        bench.say(f"priors: all right, {prior}", right(drawn, captions))


@torch.no_grad()
def analytic(bench, N=1000):
    """Fréchet distance to the true z_img of N captions, 16 steps with each variance."""
    model, prior = bench.model, bench.model.prior
    scenes = [bench.data.scene(i) for i in range(N)]
    z_img, tokens = model.encode_image(bench.pictures(scenes)[0]), model.tokens([scene.text for scene in scenes])
    z_txt = model.clip.encode_text(tokens)

    def large(diffusion, out, x_t, t, noise):                              # β_t itself: a learned variance that always says 1
        return ddpm_step(diffusion, out._replace(frac=torch.ones_like(x_t)), x_t, t, noise)

    for name, step in (("analytic", analytic_step(prior.cov)), ("β̃ (fixed, small)", ddpm_step), ("β (fixed, large)", large)):
        x_T = torch.randn(N, model.clip.cfg.clip_dim, generator=torch.Generator().manual_seed(0)).to(model.device)
        x_0 = sample_loop(prior.diffusion, prior.denoiser(tokens, z_txt), x_T, step, strided_timesteps(prior.cfg.num_timesteps, 16),
                          torch.Generator().manual_seed(1))
        sampled = prior.unscale(x_0)
        bench.say(f"analytic: Fréchet distance, 16 steps, {name}", frechet_distance(sampled, z_img))
        bench.say(f"analytic: the same of whitened embeddings, {name}",
                  frechet_distance(prior.whitening(sampled), prior.whitening(z_img)))


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


def variations(bench, etas=(0.0, 0.5, 1.0)):
    """Does the caption still hold, and how much moves, at each η?"""
    pictures, captions = bench.pictures()
    z_img, x_T = bench.model.invert(pictures)
    true, rows = bench.model.pixels(pictures, bench.size), [pictures[:8]]
    for eta in etas:
        drawn = bench.model.base(z_img, None, list(range(len(pictures))), x_T=x_T, guidance=1.0, eta=eta)
        images = bench.model.enlarge(drawn, [0] * len(drawn), "base")
        rows.append(images[:8])
        bench.say(f"variations: caption still holds, η = {eta:g}", right(images, captions))
        bench.say(f"variations: difference in grey levels (rms), η = {eta:g}", (drawn - true).square().mean().sqrt().item() * 127.5)
        corner = (drawn[:, :, 0, 0] - true[:, :, 0, 0]).abs().mean().item() * 127.5
        bench.say(f"variations: difference of the background in grey levels, η = {eta:g}", corner)
    bench.grid("variations", rows, [captions[:8]] + [[f"η = {eta:g}"] * 8 for eta in etas])


def edited(caption, old, new):
    """The caption with the edit made, or None where the grammar has no such caption or nothing to edit."""
    if f" {old} " not in f" {caption} ":
        return None
    text = f" {caption} ".replace(f" {old} ", f" {new} ", 1).strip()
    for wrong, better in (("a orange", "an orange"), ("an blue", "a blue"), ("an cyan", "a cyan"), ("an purple", "a purple")):
        text = text.replace(wrong, better)
    try:
        kind, _, things = parse_caption(text)
    except ValueError:
        return None
    return None if kind == "relation" and things[0][0] == things[1][0] else text


@torch.no_grad()
def textdiff(bench, theta=(0.0, 0.25, 0.5, 0.625, 0.75, 1.0), guidance=2.0):
    """Ten edits, n pictures together: does the edit happen, and does the rest stay, at the θ that is best for all of them?

    As DALLE2.textdiff does it, between whole captions; but all pictures at once, because inversion in batches is much faster.
    """
    model, share, jobs = bench.model, -(-bench.n // len(EDITS)), []
    for old, new in EDITS:
        scenes = [s for s in map(bench.data.scene, range(6000)) if edited(s.text, old, new)][:share]
        jobs += [(f"{old} → {new}", scene, edited(scene.text, old, new)) for scene in scenes]
    names, scenes, wanted = zip(*jobs)
    pictures, captions = bench.pictures(scenes)
    z_img, x_T = (torch.cat(parts) for parts in zip(*(model.invert(pictures[i:i + 64]) for i in range(0, len(pictures), 64))))
    drawn = []                                                             # (θ) of lists of pictures
    for t in theta:
        z = model.follow(z_img, captions, wanted, torch.full((len(z_img),), t, device=z_img.device))
        drawn.append(model.enlarge(model.base(z, None, [0] * len(z), x_T=x_T, guidance=guidance, eta=0.0), [0] * len(z), "base"))
    made = np.array([[grade(picture, caption)["all"] for picture, caption in zip(row, wanted)] for row in drawn], dtype=float)
    best = int(made.mean(1).argmax())
    for t, row in zip(theta, made):
        bench.say(f"textdiff: edit made and rest kept, all {len(jobs)} pictures, θ = {t:g}", float(row.mean()))
    bench.say("textdiff: at the best θ of each picture", float(made.max(0).mean()))
    firsts = [names.index(name) for name in dict.fromkeys(names)]
    for first in firsts:
        bench.say(f"textdiff: {names[first]}, θ = {theta[best]:g}", float(made[best][[name == names[first] for name in names]].mean()))
    bench.grid("textdiff", [[pictures[i], *(row[i] for row in drawn)] for i in firsts],
               [[captions[i], *(f"θ = {t:g}: {wanted[i]}" for t in theta)] for i in firsts])


def inpainting(bench):
    """Half of a two-object picture is drawn anew, to a caption with another object there; the rest must be the picture's own."""
    rows, labels, hits, kept = [], [], [], []
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
        if len(rows) < 8:
            rows.append([picture, mask, drawn])
            labels.append([scene.text, "mask", caption])
    bench.say("inpainting: follows the caption", float(np.mean(hits)))
    bench.say("inpainting: outside the mask equal to the input", float(np.mean(kept)))
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


PARTS = {f.__name__: f for f in (priors, analytic, cache, inversion, variations, textdiff, inpainting, sticker)}


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
    path = args.run / "latents.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | bench.results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
