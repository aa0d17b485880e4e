"""pipeline.py and sample.py: what comes out for which captions and seeds, and one sentence for every mistake."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample                                              # the script at the top level
from mini_dalle2 import DALLE2
from mini_dalle2 import latents
from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.latents import to_mask
from mini_dalle2.pipeline import load_model
from mini_dalle2.runtime.noise import seeded
from mini_dalle2.prior import DiffusionPrior
from mini_dalle2.runtime.files import load_checkpoint, save_checkpoint

CAPTIONS = ["a red circle above a blue square", "two cyan rings", "a small black star"]


@pytest.fixture(scope="module")
def model(run):
    return DALLE2.load(run, "cpu")


def pixels(image):
    return np.asarray(image).astype(int)


def draw(model, captions, **options):
    return model.text_to_image(captions, progress=False, **options)


def nearly(a, b):
    """The same picture: another batch size may round the last bit of a float differently, which can move a pixel by one level."""
    return np.abs(pixels(a) - pixels(b)).max() <= 1


def test_pictures_come_in_rows_of_n_at_the_size_of_the_last_stage(model):
    rows = draw(model, CAPTIONS[:2], n=3)
    assert [len(row) for row in rows] == [3, 3]
    assert all(image.size == (64, 64) and image.mode == "RGB" for row in rows for image in row)
    assert draw(model, CAPTIONS[0], stage="base")[0][0].size == (16, 16)


def test_each_stage_on_request_and_the_same_as_alone(model):
    each = draw(model, CAPTIONS[:1], stage="each", seed=3)[0][0]
    assert {name: image.size[0] for name, image in each.items()} == {"base": 16, "up1": 32, "up2": 64}
    for stage in each:
        assert nearly(each[stage], draw(model, CAPTIONS[:1], stage=stage, seed=3)[0][0])
    assert nearly(each["up2"], draw(model, CAPTIONS[:1], seed=3)[0][0])


def test_a_picture_depends_on_its_caption_and_seed_alone(model):
    many = draw(model, CAPTIONS, n=2, seed=5, stage="base")
    assert nearly(many[1][0], draw(model, CAPTIONS[1:2], seed=5, stage="base")[0][0])
    assert nearly(many[1][1], draw(model, CAPTIONS[1:2], seed=6, stage="base")[0][0])
    assert not nearly(many[1][0], many[1][1])


def test_batches_do_not_show(model, monkeypatch):
    whole = draw(model, CAPTIONS, n=2, stage="base")
    monkeypatch.setattr(model, "BATCH", 4)
    assert all(nearly(a, b) for row, again in zip(whole, draw(model, CAPTIONS, n=2, stage="base")) for a, b in zip(row, again))


# ---------------------------------------------------------------------------------------------------------------- noise

def starts(monkeypatch, model, **options):
    """Draws one call; returns what each model was first shown, its noise: {stage: x_T}."""
    seen = {}
    parts = {"prior": model.prior, "decoder": model.decoder, **{f"up{i}": u for i, u in enumerate(model.upsamplers, start=1)}}
    with monkeypatch.context() as patch:
        for name, part in parts.items():
            def watched(x, *rest, name=name, original=part.forward):
                seen.setdefault(name, x.clone())
                return original(x, *rest)
            patch.setattr(part, "forward", watched)
        draw(model, **options)
    return seen


def test_each_stage_has_noise_of_its_own(model, monkeypatch):
    """More steps of the prior, or none of it, leave what decoder and upsamplers start from as it was; no two stages share noise."""
    options = dict(captions=CAPTIONS[:2], n=2, seed=3)
    seen = starts(monkeypatch, model, **options)
    assert set(seen) == {"prior", "decoder", "up1", "up2"}
    with monkeypatch.context() as patch:
        patch.setattr(model.prior, "cfg", replace(model.prior.cfg, sampling_steps=4))      # two otherwise
        longer = starts(monkeypatch, model, **options)
    none = starts(monkeypatch, model, prior="z_txt", **options)
    fewer = starts(monkeypatch, model, steps=1, **options)
    for name in ("decoder", "up1", "up2"):
        assert all(torch.equal(seen[name][:, :3], other[name][:, :3]) for other in (longer, none, fewer))
    numbers = [seen[name][0].flatten()[:32] for name in seen]
    assert all(not torch.equal(numbers[i], numbers[j]) for i in range(4) for j in range(i))


def test_base_pictures_do_not_depend_on_how_far_one_goes(model):
    base, each = (draw(model, CAPTIONS, n=2, seed=1, stage=stage) for stage in ("base", "each"))
    full = draw(model, CAPTIONS, n=2, seed=1, stage="full")
    for i in range(3):
        for j in range(2):
            assert np.array_equal(pixels(base[i][j]), pixels(each[i][j]["base"]))
            assert np.array_equal(pixels(full[i][j]), pixels(each[i][j]["up2"]))


def test_more_pictures_begin_with_the_same_ones(model, monkeypatch):
    one, four = draw(model, CAPTIONS[:2], n=1, seed=7), draw(model, CAPTIONS[:2], n=4, seed=7)
    assert all(nearly(one[i][0], four[i][0]) for i in range(2))
    monkeypatch.setattr(model.upsamplers[1], "CHUNK_PIXELS", 64 * 64)      # one large picture at a time
    again = draw(model, CAPTIONS[:2], n=4, seed=7)
    assert all(nearly(a, b) for row, other in zip(four, again) for a, b in zip(row, other))


def test_seeds_of_any_size_differ():
    """torch reads 32 bits of a seed: without hashing, 2 ** 32 would be 0 again."""
    first = [torch.randn(4, generator=seeded(seed, stage)) for seed in (0, 1, -1, 2 ** 32, 2 ** 80) for stage in ("prior", "decoder")]
    assert all(not torch.equal(first[i], first[j]) for i in range(10) for j in range(i))
    assert torch.equal(first[0], torch.randn(4, generator=seeded(0, "prior")))


def given_to_the_decoder(model, monkeypatch, **options):
    """The z_img and tokens that Decoder.sample was called with when base pictures of CAPTIONS were drawn."""
    seen = []
    with monkeypatch.context() as patch:
        sample_ = model.decoder.sample
        patch.setattr(model.decoder, "sample", lambda z_img, tokens, **rest: seen.append((z_img, tokens)) or sample_(z_img, tokens, **rest))
        draw(model, CAPTIONS, stage="base", **options)
    return seen[0]


def test_four_ways_to_an_embedding(model, monkeypatch):
    """The two priors, and the upper rows of the paper's Fig. 8: CLIP's text embedding in z_img's place, and the caption alone."""
    given = {prior: given_to_the_decoder(model, monkeypatch, prior=prior) for prior in model.PRIORS}
    assert torch.equal(given["z_txt"][0], model.encode_text(CAPTIONS)) and given["caption"][0] is None
    for prior in ("diffusion", "ar"):
        z_img = given[prior][0]
        assert torch.allclose(z_img.norm(dim=1), torch.ones(3), atol=1e-5)
        assert not torch.allclose(z_img, given["z_txt"][0], atol=0.01)
    assert not torch.allclose(given["ar"][0], given["diffusion"][0], atol=0.01)
    assert all(torch.equal(tokens, model.tokens(CAPTIONS)) for _, tokens in given.values())


def test_a_run_without_the_autoregressive_prior(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "ar_prior.pt").unlink()
    model = DALLE2.load(copy, "cpu")
    assert draw(model, CAPTIONS[:1], stage="base")
    image = Image.new("RGB", (64, 64))
    for call in (lambda: draw(model, CAPTIONS, prior="ar"), lambda: model.reconstruct(image, [2]),
                 lambda: model.inpaint(image, half_mask(), CAPTIONS[0], prior="ar")):
        with pytest.raises(ValueError, match="--stage ar_prior"):
            call()


def test_reranking_keeps_what_clip_finds_closest(model):
    """The best two of six, the best first; each is the picture that its own seed gives."""
    six = draw(model, CAPTIONS[:2], n=6, stage="base")
    best = draw(model, CAPTIONS[:2], n=2, stage="base", rerank=6)
    for row, kept, z_txt in zip(six, best, model.encode_text(CAPTIONS[:2])):
        fit = (model.encode_image(row) @ z_txt).argsort(descending=True)
        assert all(nearly(row[int(i)], image) for i, image in zip(fit, kept))
    six, best = draw(model, CAPTIONS[:1], n=6), draw(model, CAPTIONS[:1], n=2, rerank=6)      # upsamplers, too, go by a picture's own seed
    assert all(nearly(six[0][int(i)], image) for i, image in zip(
        (model.encode_image(draw(model, CAPTIONS[:1], n=6, stage="base")[0]) @ model.encode_text(CAPTIONS[:1])[0]).argsort(descending=True),
        best[0]))


def priors_own(model, monkeypatch, prior, **options):
    """What a prior drew, (3, k, D) for the k of each of CAPTIONS, and which of them the decoder was then given (3, D)."""
    drawn = []
    with monkeypatch.context() as patch:
        part = model.ar_prior if prior == "ar" else model.prior
        sample_ = part.sample
        patch.setattr(part, "sample", lambda *inputs, **rest: drawn.append(sample_(*inputs, **rest)) or drawn[0])
        given = given_to_the_decoder(model, monkeypatch, prior=prior, **options)[0]
    return drawn[0].unflatten(0, (len(CAPTIONS), -1)), given


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_of_several_z_img_the_one_is_drawn_whose_sketch_clip_finds_closest(model, monkeypatch, prior):
    """Each sketch as a picture by itself, shown to CLIP, compared with its own caption; the choice is not always the first."""
    chosen = []
    for k, options in ((5, dict(sketches=5)), (model.SKETCHES, {})):
        z_img, given = priors_own(model, monkeypatch, prior, **options)
        assert z_img.shape == (3, k, model.clip.cfg.clip_dim)
        for candidates, z, caption in zip(z_img, given, CAPTIONS):
            fit = [(model.encode_image(to_pil(model.decoder.sketch(one[None])[0])) @ model.encode_text(caption)[0]).item() for one in candidates]
            assert torch.equal(z, candidates[int(np.argmax(fit))])
            chosen.append(int(np.argmax(fit)))
    assert len(set(chosen)) > 1


def test_without_a_choice_the_priors_own_is_drawn(model, monkeypatch):
    """For one sketch, none, a CLIP without eyes and where there is nothing to choose from, nobody looks at sketches."""
    z_img, given = priors_own(model, monkeypatch, "diffusion", sketches=1)
    assert z_img.shape[1] == 1 and torch.equal(z_img[:, 0], given)
    monkeypatch.setattr(model, "choose", lambda *_: pytest.fail("a sketch was looked at"))
    assert torch.equal(given_to_the_decoder(model, monkeypatch, prior="z_txt")[0], model.encode_text(CAPTIONS))
    for part, name in ((model.clip, "visual"), (model.decoder, "sketch")):
        with monkeypatch.context() as patch:
            patch.setitem(part._modules, name, None)
            assert torch.equal(model.embed(model.tokens(CAPTIONS), [0, 0, 0]), given)


def test_many_sketches_are_drawn_in_parts(model, monkeypatch):
    """A choice among more than SKETCHES takes no more memory at once, and no other pictures."""
    whole = model.embed(model.tokens(CAPTIONS), [0, 0, 0], sketches=20)
    assert torch.allclose(whole, priors_own(model, monkeypatch, "diffusion", sketches=20)[1], atol=1e-5)
    rows, sample_ = [], model.prior.sample
    monkeypatch.setattr(model, "BATCH", 3)
    monkeypatch.setattr(model.prior, "sample", lambda tokens, *rest, **options: rows.append(len(tokens)) or sample_(tokens, *rest, **options))
    assert torch.allclose(model.embed(model.tokens(CAPTIONS), [0, 0, 0], sketches=20), whole, atol=1e-5) and rows == [20, 20, 20]


def test_a_choice_in_reduced_precision_with_models_that_come_and_go(run):
    light = DALLE2.load(run, "cpu", torch.bfloat16, offload=True)
    (picture,), = draw(light, CAPTIONS[:1], stage="base", sketches=3)
    assert picture.size == (16, 16) and light.here == []


# ---------------------------------------------------------------------------------------------------------------- from picture to picture

@pytest.fixture(scope="module")
def picture():
    return to_pil(CaptionedShapes("val", 64, 0, 4)[1]["image"])


@pytest.fixture(scope="module")
def other():
    return to_pil(CaptionedShapes("val", 64, 0, 4)[2]["image"])


QUIET = dict(progress=False, stage="base")


def test_variations_with_eta_0_are_the_reconstruction_and_with_eta_1_differ(model, picture):
    still, moved = (model.variations(picture, n=3, eta=eta, **QUIET) for eta in (0.0, 1.0))
    again = model.reconstruct(picture, **QUIET)
    assert all(nearly(image, again[0]) for image in still) and len(again) == 1
    assert not any(nearly(moved[i], moved[j]) for i in range(3) for j in range(i))
    assert nearly(model.variations(picture, n=1, seed=2, **QUIET)[0], moved[2])
    assert model.variations(picture, n=1, progress=False)[0].size == (64, 64)


def test_a_picture_of_the_decoder_is_reconstructed(model):
    """What it drew itself from some (z_img, x_T) lies where it can go: there and back again, at the same size all the way."""
    z_img, x_T = model.encode_image(Image.new("RGB", (16, 16), "white")), model.start(3)
    drawn = model.decoder.sample(z_img, None, guidance=1.0, eta=0.0, x_T=x_T, steps=50)
    found = model.decoder.invert(drawn, z_img, steps=50)
    again = model.decoder.sample(z_img, None, guidance=1.0, eta=0.0, x_T=found, steps=50)
    other = model.decoder.sample(z_img, None, guidance=1.0, eta=0.0, x_T=model.start(4), steps=50)
    assert (again - drawn).square().mean() < 0.01 * (other - drawn).square().mean()


def test_interpolations_end_at_the_reconstructions(model, picture, other):
    way = model.interpolate(picture, other, n=4, **QUIET)
    assert len(way) == 4
    assert nearly(way[0], model.reconstruct(picture, **QUIET)[0]) and nearly(way[-1], model.reconstruct(other, **QUIET)[0])
    assert not nearly(way[1], way[0]) and not nearly(way[1], way[-1])


def test_interpolations_from_one_noise(model, picture, other, monkeypatch):
    seen = []
    sample_ = model.decoder.sample
    monkeypatch.setattr(model.decoder, "sample", lambda *args, **rest: seen.append((args, rest)) or sample_(*args, **rest))
    model.interpolate(picture, other, n=3, seed=5, fixed_noise=True, **QUIET)
    (z_img, tokens), x_T = seen[0][0][:2], seen[0][1]["x_T"]
    assert tokens is None and torch.equal(x_T[0], x_T[1]) and torch.equal(x_T[0], x_T[2])
    ends = model.encode_image([picture, other])
    assert torch.allclose(z_img[[0, 2]], ends, atol=1e-5) and torch.allclose(z_img.norm(dim=1), torch.ones(3), atol=1e-5)
    middle = torch.nn.functional.normalize(ends.sum(0), dim=0)
    assert torch.allclose(z_img[1], middle, atol=1e-4)


def test_text_diffs_begin_at_the_picture(model, picture, monkeypatch):
    seen = []
    sample_ = model.decoder.sample
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "sample", lambda *args, **rest: seen.append(args[0]) or sample_(*args, **rest))
        pictures = model.textdiff(picture, "a red circle", "a blue circle", theta=[0.0, 0.25], guidance=1.0, **QUIET)
    assert nearly(pictures[0], model.reconstruct(picture, **QUIET)[0])
    assert torch.allclose(seen[0][0], model.encode_image(picture)[0], atol=1e-4) and (seen[0][1] - seen[0][0]).norm() > 1e-3


def test_text_diffs_turn_to_the_difference_of_the_captions(model, picture, monkeypatch):
    """The paper's formula, which a run without whitening follows."""
    monkeypatch.setattr(model.prior, "cfg", replace(model.prior.cfg, whiten_z=False))
    source, target, z_img = ["a red circle"], ["a blue circle"], model.encode_image(picture)
    z = model.follow(z_img.expand(3, -1), source, target, torch.tensor([0.0, 0.25, 1.0]))
    difference = torch.nn.functional.normalize(model.encode_text(target) - model.encode_text(source), dim=-1)
    assert torch.allclose(z[0], z_img[0], atol=1e-5) and torch.allclose(z[2:], difference, atol=1e-4)
    angle = (z[1] @ z[0]).acos() / (difference[0] @ z[0]).acos()
    assert angle.item() == pytest.approx(0.25, abs=1e-3)
    assert torch.allclose(model.follow(z_img, None, target, torch.ones(1)), model.encode_text(target), atol=1e-4)


def test_text_diffs_of_whitened_runs_add_what_the_prior_says(model, picture, monkeypatch):
    """All of it at 1/2, half at 1/4, and back on the sphere: of one picture or of several, each with captions of its own."""
    source, target, prior = ["a red circle", "two cyan rings"], ["a blue circle", "three cyan rings"], model.prior
    z_img, theta = torch.cat([model.encode_image(picture), model.encode_text(["a star"])]), torch.tensor([0.5, 0.25])
    d = torch.randn(2, z_img.shape[1], generator=torch.Generator().manual_seed(0))
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(latents, "flow_edit", lambda *args: asked.append(args) or d[:len(args[3])])
        z = model.follow(z_img, source, target, theta)
        one = model.follow(z_img[:1], source[:1], target[:1], torch.tensor([0.0, 0.25, 0.5]))
    x = prior.scale(z_img)
    assert torch.allclose(z, prior.unscale(x + torch.tensor([[1.0], [0.5]]) * d), atol=1e-5)
    assert torch.allclose(one, prior.unscale(x[:1] + torch.tensor([[0.0], [0.5], [1.0]]) * d[:1]), atol=1e-5)
    noisy, t = torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(1)), torch.tensor([500, 500])
    for denoise, captions in zip(asked[0][1:3], (source, target)):
        tokens = model.tokens(captions)
        assert torch.allclose(denoise(noisy, t).x_start, prior.denoiser(tokens, model.encode_text(captions))(noisy, t).x_start, atol=1e-5)
    assert torch.equal(asked[0][3], x) and len(asked[0][4]) == prior.cfg.sampling_steps


def test_text_diffs_take_their_noise_from_the_seed(model, picture, monkeypatch):
    monkeypatch.setattr(model.prior, "cfg", replace(model.prior.cfg, sampling_steps=8))
    z_img, half = model.encode_image(picture), torch.tensor([0.5])
    one, again, other = (model.follow(z_img, ["a red circle"], ["a blue circle"], half, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.allclose(model.follow(z_img, ["a red circle"], ["a red circle"], half), z_img, atol=1e-5)


def test_text_diffs_in_reduced_precision_are_nearly_the_same(run, model, picture):
    light = DALLE2.load(run, "cpu", torch.bfloat16, offload=True)
    z_img, half = model.encode_image(picture), torch.tensor([0.5])
    full, reduced = (one.follow(z_img, ["a red circle"], ["a blue circle"], half) for one in (model, light))
    assert reduced.dtype == torch.float32 and (full * reduced).sum() > 0.99


def test_text_diffs_without_a_source_end_where_the_caption_does(model, picture):
    """From whichever picture: at the noisy end nothing is left of it, so that z_θ at 1/2 depends on the caption and the noise alone."""
    z_img = model.encode_image(picture)
    others = torch.nn.functional.normalize(torch.randn(1, z_img.shape[1], generator=torch.Generator().manual_seed(0)), dim=-1)
    half = torch.tensor([0.5])
    one, other = (model.follow(z, None, ["a blue circle"], half) for z in (z_img, others))
    assert (one - other).norm() < 0.1 * (z_img - others).norm()


def test_reconstructions_from_components(model, picture, monkeypatch):
    seen = []
    sample_ = model.decoder.sample
    monkeypatch.setattr(model.decoder, "sample", lambda *args, **rest: seen.append((args[0], rest["x_T"])) or sample_(*args, **rest))
    D = model.clip.cfg.clip_dim
    assert len(model.reconstruct(picture, [1, 4, D], **QUIET)) == 3
    z_img, x_T = seen[0]
    cosine = (z_img @ model.encode_image(picture).T)[:, 0]
    assert (cosine.diff() >= -1e-5).all() and cosine[-1] > 0.9999 and torch.equal(x_T[0], x_T[2])
    with pytest.raises(ValueError, match="components"):
        model.reconstruct(picture, [D + 1], **QUIET)


def half_mask(size=64):
    """White on the left half."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    return mask


@pytest.mark.parametrize("stage, size", [("base", 16), ("up1", 32), ("full", 64)])
def test_inpainting_leaves_every_pixel_outside_the_mask(model, picture, stage, size):
    image = picture.resize((size, size), Image.Resampling.BICUBIC)
    drawn = model.inpaint(image, half_mask(size), CAPTIONS[0], n=2, progress=False, stage=stage)
    assert [d.size for d in drawn] == [(size, size)] * 2
    for d in drawn:
        assert np.array_equal(pixels(d)[:, size // 2:], pixels(image)[:, size // 2:])
        assert np.abs(pixels(d)[:, :size // 2] - pixels(image)[:, :size // 2]).max() > 10
    assert not nearly(*drawn)


def test_inpainting_shows_each_model_what_is_known(model, picture, monkeypatch):
    """An edge that lies on no coarse grid: a coarse pixel is new if any fine one in it is."""
    mask, masks, ends = Image.new("L", (64, 64)), {}, {}
    mask.paste(255, (0, 0, 29, 64))
    for network in (model.decoder, *model.upsamplers):
        def spy(*args, sample_=network.sample, known=None, **rest):
            images = sample_(*args, known=known, **rest)
            if known is None:                                              # drawn only to choose z_img by
                return images
            masks[images.shape[-1]], ends[images.shape[-1]] = known[1], (images - known[0]).abs() * (1 - known[1])
            return images
        monkeypatch.setattr(network, "sample", spy)
    model.inpaint(picture, mask, CAPTIONS[0], progress=False)
    assert {side: int(m[0, 0, 0].sum()) for side, m in masks.items()} == {16: 8, 32: 15, 64: 29}
    assert all(m[..., :int(m[0, 0, 0].sum())].all() for m in masks.values())
    assert all(end.max() < 0.02 for end in ends.values())                  # the models themselves end at the known pixels


def test_inpainting_chooses_by_what_is_known_not_by_sketches(model, picture, monkeypatch):
    monkeypatch.setattr(model, "choose", lambda *_: pytest.fail("a sketch was looked at"))
    assert len(model.inpaint(picture, half_mask(), CAPTIONS[0], n=2, **QUIET)) == 2


def test_inpainting_takes_the_z_img_that_goes_with_what_is_known(model, monkeypatch):
    """Of three per picture the second and the third draw what is outside the mask; what they draw inside is not looked at."""
    z_img = torch.randn(2, 3, model.clip.cfg.clip_dim)
    grey = {tuple(z.tolist()): (0.9, 0.2, -0.5)[i] for row, order in zip(z_img, ((0, 1, 2), (0, 2, 1))) for z, i in zip(row, order)}
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1

    def sample(z, tokens, **rest):
        drawn = torch.stack([torch.full((3, 16, 16), grey[tuple(row.tolist())]) for row in z])
        return torch.where(mask > 0.5, -drawn, drawn)
    monkeypatch.setattr(model.decoder, "sample", sample)
    known = torch.full((1, 3, 16, 16), 0.1)
    known[..., :8] = -0.9                                                  # as the first draws it
    assert torch.equal(model.choose_by_known_pixels(z_img, [0, 1], known, mask), torch.stack([z_img[0, 1], z_img[1, 2]]))


@pytest.mark.parametrize("paint", ["RGBA", "LA", "1", "P"])
def test_masks_of_any_mode(model, picture, paint):
    grey = half_mask()
    mask = {"RGBA": lambda: Image.merge("RGBA", [Image.new("L", (64, 64), 255)] * 3 + [grey]),      # white paint on a transparent sheet
            "LA": lambda: Image.merge("LA", [grey, Image.new("L", (64, 64), 255)]), "1": lambda: grey.convert("1"),
            "P": lambda: grey.convert("P")}[paint]()
    assert np.array_equal(pixels(to_mask(mask)), pixels(grey))


def test_masks_are_turned_upright_with_the_picture(model):
    sideways = Image.new("RGB", (90, 60), "grey")
    sideways.getexif()[0x0112] = 6                                         # a telephone held upright: 60 x 90
    upright = Image.new("L", (60, 90), 255)
    assert model.inpaint(sideways, upright, CAPTIONS[0], **QUIET)[0].size == (16, 16)
    with pytest.raises(ValueError, match="60 x 90"):
        model.inpaint(sideways, upright.rotate(90, expand=True), CAPTIONS[0], **QUIET)


def test_inpainting_needs_a_mask_that_fits(model, picture):
    for mask, said in ((half_mask(32), "64 x 64"), (Image.new("L", (64, 64)), "nothing in the mask")):
        with pytest.raises(ValueError, match=said):
            model.inpaint(picture, mask, CAPTIONS[0], **QUIET)
    with pytest.raises(ValueError, match="caption is empty"):
        model.inpaint(picture, half_mask(), " ", **QUIET)


def test_classification_gives_probabilities_by_clip(model, picture):
    p = model.classify(picture, CAPTIONS)
    logits = model.clip.logit_scale.exp() * model.encode_image(picture) @ model.encode_text(CAPTIONS).T
    assert torch.allclose(p, logits.softmax(-1)[0], atol=1e-5) and p.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("call, said", [
    (lambda m, i: m.interpolate(i, i, n=1), "at least two"), (lambda m, i: m.textdiff(i, "a", "b", theta=[0, 1.5]), "theta"),
    (lambda m, i: m.textdiff(i, "two cyan rings", "two cyan rings"), "no difference"), (lambda m, i: m.textdiff(i, "a", ""), "empty"),
    (lambda m, i: m.variations(i, steps=0), "sampling steps"), (lambda m, i: m.variations(i, guidance=-1.0), "guidance"),
    (lambda m, i: m.text_to_image("a", n=3, rerank=2), "at least as many"), (lambda m, i: m.variations(i, n=0), "at least one"),
    (lambda m, i: m.inpaint(i, i, "a", n=0), "at least one"), (lambda m, i: m.reconstruct(i, []), "at least one"),
    (lambda m, i: m.textdiff(i, "a", "b", theta=[]), "at least one"), (lambda m, i: m.variations(i, eta=5), "eta"),
    (lambda m, i: m.interpolate(i, i, stage="bas"), "stage"), (lambda m, i: m.inpaint(i, i, "a", prior="foo"), "prior")])
def test_mistakes_with_pictures_are_value_errors(model, picture, call, said):
    with pytest.raises(ValueError, match=said):
        call(model, picture)


def test_embeddings_are_unit_vectors_of_the_clip(model):
    images = [to_pil(CaptionedShapes("val", 16, 0, 4)[i]["image"]) for i in range(4)]
    from_pil = model.encode_image(images)
    from_tensor = model.encode_image(torch.stack([CaptionedShapes("val", 16)[i]["image"] for i in range(4)]))
    assert torch.allclose(from_pil, from_tensor, atol=0.02)                 # 8-bit rounding lies between them
    assert torch.allclose(from_pil.norm(dim=1), torch.ones(4)) and torch.allclose(model.encode_text(CAPTIONS).norm(dim=1), torch.ones(3))
    on_glass = images[0].convert("RGBA")
    assert torch.allclose(model.encode_image(on_glass), from_pil[:1], atol=1e-5)


@pytest.mark.parametrize("options, words", [
    (dict(captions=[""]), "empty"), (dict(captions=["  "]), "empty"), (dict(captions=[]), "no caption"),
    (dict(captions=["a red circle " * 40]), "context_length"), (dict(n=0), "at least one"), (dict(prior="none such"), "unknown prior"),
    (dict(stage="huge"), "unknown stage"), (dict(steps=0), "sampling steps"), (dict(steps=2000), "sampling steps"),
    (dict(guidance=-1.0), "guidance"), (dict(guidance=float("nan")), "guidance"), (dict(sketches=0), "at least one"),
])
def test_mistakes_are_named(model, options, words):
    with pytest.raises(ValueError, match=words):
        draw(model, **(dict(captions=CAPTIONS[:1]) | options))


# ---------------------------------------------------------------------------------------------------------------- run folders

@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    return folder


def test_a_run_without_upsamplers_draws_base_pictures(copy):
    (copy / "upsampler1.pt").unlink()
    assert draw(DALLE2.load(copy, "cpu"), CAPTIONS[:1])[0][0].size == (16, 16)


def test_missing_and_damaged_files_are_named(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        DALLE2.load(tmp_path / "nowhere")
    (copy / "prior.pt").rename(copy / "elsewhere.pt")
    with pytest.raises(FileNotFoundError, match="no prior.pt"):
        DALLE2.load(copy)
    (copy / "prior.pt").write_bytes((copy / "elsewhere.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="prior.pt"):
        DALLE2.load(copy)


def test_stages_of_two_clips_are_not_mixed(copy):
    checkpoint = load_checkpoint(copy / "decoder.pt")
    save_checkpoint(checkpoint | {"clip_signature": "0" * 16}, copy / "decoder.pt")
    with pytest.raises(ValueError, match="another CLIP"):
        DALLE2.load(copy)


def test_weights_of_other_sizes_are_refused(copy):
    checkpoint = load_checkpoint(copy / "prior.pt")
    save_checkpoint(checkpoint | {"model_config": checkpoint["model_config"] | {"width": 48}}, copy / "prior.pt")
    with pytest.raises(ValueError, match="does not fit"):
        load_model(copy / "prior.pt")


# ---------------------------------------------------------------------------------------------------------------- the command

def command(capsys, *arguments):
    """Exit code and what was written to standard error by sample.py itself, not by progress bars."""
    code = sample.main([str(a) for a in arguments])
    return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample.py")]


def test_command_writes_a_grid_and_singles(run, tmp_path, capsys):
    code, errors = command(capsys, "text", *CAPTIONS[:2], "--run", run, "--n", 2, "--out", tmp_path / "grid.png", "--singles")
    assert (code, errors) == (0, [])
    singles = [f"grid-{i}-{j}.png" for i in (1, 2) for j in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*singles, "grid.png"]
    with Image.open(tmp_path / "grid-2-1.png") as image:
        assert image.size == (64, 64)


VERBS = [["variations", "a.png", "--n=2"], ["interpolate", "a.png", "b.png", "--n=3"], ["interpolate", "a.png", "b.png", "--fixed-noise"],
         ["textdiff", "a.png", "a red circle", "a blue circle", "--theta", "0", "0.3"], ["inpaint", "a.png", "mask.png", "two cyan rings"],
         ["reconstruct", "a.png"], ["reconstruct", "a.png", "--components", "1", "3"], ["classify", "a.png", *CAPTIONS],
         ["text", CAPTIONS[0], "--prior=ar", "--n=1", "--rerank=3"]]


@pytest.fixture
def folder(tmp_path, monkeypatch, picture, other):
    """The working folder, with pictures and masks to be named."""
    monkeypatch.chdir(tmp_path)
    picture.save("a.png"), other.save("b.png"), half_mask().save("mask.png"), half_mask(32).save("small.png")
    picture.resize((90, 50)).save("wide.jpg")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return tmp_path


@pytest.mark.parametrize("arguments", VERBS, ids=" ".join)
def test_each_verb_writes_one_labelled_grid(run, folder, capsys, arguments):
    assert sample.main([*arguments, "--run", str(run), "--out", "grid.png"]) == 0
    said = capsys.readouterr().out
    assert "grid.png" in said and "note" not in said
    with Image.open("grid.png") as grid:
        assert grid.width > 64 and grid.height > 64


def test_pictures_of_another_size_are_fitted_and_the_person_told(run, folder, capsys):
    assert sample.main(["variations", "wide.jpg", "--n=1", "--run", str(run), "--out", "grid.png", "--singles"]) == 0
    assert "wide.jpg has 90 x 50 pixels; its central square is taken at 64 x 64" in capsys.readouterr().out
    with Image.open("grid-1-1.png") as drawn:
        assert drawn.size == (64, 64)
    assert sample.main(["variations", "a.png", "--n=2", "--run", str(run), "--out", "grid.png", "--stage=base"]) == 0
    said = capsys.readouterr().out
    assert "taken at 16 x 16" in said and "2 pictures of 16 pixels" in said


@pytest.mark.parametrize("arguments", [["variations", "a.png", "--n=1"], ["inpaint", "a.png", "mask.png", "two cyan rings", "--n=1"],
                                       ["interpolate", "a.png", "b.png", "--n=2"], ["text", "a red circle", "--n=1"],
                                       ["textdiff", "a.png", "a red circle", "a blue circle", "--theta", "0.3"]], ids=lambda a: a[0])
def test_each_verb_obeys_its_seed(run, folder, arguments):
    drawn = []
    for i, seed in enumerate((1, 1, 2)):
        assert sample.main([*arguments, "--run", str(run), "--out", f"{i}.png", "--singles", "--seed", str(seed)]) == 0
        with Image.open(f"{i}-1-1.png") as image:
            drawn.append(pixels(image.convert("RGB")))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("arguments, said", [
    (["variations", "nowhere.png"], "there is no picture nowhere.png"), (["variations", "broken.png"], "broken.png cannot be read"),
    (["inpaint", "a.png", "small.png", "two cyan rings"], "the mask has 32 x 32 pixels, the image 64 x 64"),
    (["inpaint", "a.png", "nowhere.png", "two cyan rings"], "there is no picture nowhere.png"), (["classify", "a.png"], "CAPTION"),
    (["variations", "a.png", "--eta=2"], "--eta 2"), (["interpolate", "a.png", "b.png", "--n=1"], "at least two"),
    (["textdiff", "a.png", "a red circle", "a blue circle", "--theta", "3"], "theta"), (["textdiff", "a.png", "a red circle"], "TARGET"),
    (["reconstruct", "a.png", "--components", "1000"], "components"), (["text", "a circle", "--rerank=2"], "rerank"),
    (["text", "a circle", "--rerank=1001"], "--rerank 1001"), (["text", "a circle", "--rerank=0"], "--rerank 0"),
    (["text", "a circle", "--prior=none"], "prior")])
def test_mistakes_with_pictures_are_one_sentence(run, folder, capsys, arguments, said):
    before = sorted(path.name for path in folder.iterdir())
    code, errors = command(capsys, *arguments, "--run", run, "--out", "grid.png")
    assert code == 2 and len(errors) == 1 and said in errors[0]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_picture_given_is_not_written_over(run, folder, capsys):
    before = (folder / "mask.png").read_bytes()
    code, errors = command(capsys, "inpaint", "a.png", "mask.png", "a circle", "--run", run, "--out", folder / "mask.png")
    assert code == 2 and "it would be lost" in errors[0] and (folder / "mask.png").read_bytes() == before


@pytest.mark.parametrize("arguments", [
    ["text", "", "--out", "x.png"], ["text", "a circle", "--out", "x.gif"], ["text", "a circle", "--n", "0"],
    ["text", "a circle", "--n", "two"],
    ["text"], ["paint", "a circle"], ["text", "a circle", "--colour", "red"], ["text", "word " * 200],
])
def test_mistakes_are_one_sentence_and_exit_code_2(run, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, errors = command(capsys, *arguments, *(["--run", run] if len(arguments) > 1 else []))
    assert code == 2 and len(errors) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, said", [
    (["--n=0"], "--n 0"), (["--sketches=0"], "--sketches 0"), (["--n=-3"], "--n -3"), (["--n=1000000000"], "from 1 to 1000"), (["--seed=-1"], "--seed -1"),
    (["--seed=9223372036854775808"], "--seed 9223372036854775808"), (["--seed=1.5"], "invalid int"), (["--steps=0"], "sampling steps"),
    (["--guidance=-1"], "guidance"), (["--out=nowhere/x.png"], "there is no folder nowhere"), (["--out=x.tiff"], "written as .png"),
    (["--out=x"], "written as .png"), (["--out=folder.png"], "is a folder"), (["--out=file/x.png"], "there is no folder file"),
    (["--out=/proc/x.png"], "/proc"), (["--out=" + "x" * 300 + ".png"], "cannot be written")])
def test_mistakes_are_found_before_anything_is_drawn(run, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(DiffusionPrior, "sample", lambda *_, **__: pytest.fail("it was drawing already"))
    before = sorted(run.iterdir())
    code, errors = command(capsys, "text", "a circle", "--run", run, *arguments)
    assert code == 2 and len(errors) == 1 and said in errors[0]
    assert sorted(run.iterdir()) == before and sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def out_of_gpu_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("failure", [lambda: torch.empty(2 ** 55), lambda: bytearray(2 ** 55), out_of_gpu_memory])
def test_too_little_memory_is_one_sentence(run, tmp_path, capsys, monkeypatch, failure):
    monkeypatch.setattr(DALLE2, "base", lambda *_, **__: failure())
    code, errors = command(capsys, "text", "a circle", "--run", run, "--out", tmp_path / "x.png")
    assert code == 2 and len(errors) == 1 and "--n" in errors[0] and "--stage base" in errors[0]
    assert not list(tmp_path.iterdir())


def test_other_failures_are_not_hidden(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(DALLE2, "base", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        sample.main(["text", "a circle", "--run", str(run), "--out", str(tmp_path / "x.png")])


def test_no_run_is_one_sentence_too(tmp_path, capsys):
    code, errors = command(capsys, "text", "a circle", "--run", tmp_path / "nowhere")
    assert code == 2 and len(errors) == 1 and "train.py" in errors[0]
