"""latents.py: variations, reconstructions, interpolations, text diffs, inpainting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mini_dalle2 import DALLE2, latents
from mini_dalle2.data.pixels import from_pil, to_float, to_pil
from pictures import CAPTIONS, QUIET, half_mask, nearly, pixels, val_picture


@pytest.fixture(scope="module")
def model(run):
    return DALLE2.load(run, "cpu")


@pytest.fixture(scope="module")
def picture():
    return val_picture(1)


@pytest.fixture(scope="module")
def other():
    return val_picture(2)


def test_variations_with_eta_0_are_the_reconstruction_and_with_eta_1_differ(model, picture):
    still, moved = (model.variations(picture, n=3, eta=eta, **QUIET) for eta in (0.0, 1.0))
    again = model.reconstruct(picture, **QUIET)
    assert all(nearly(image, again[0]) for image in still) and len(again) == 1
    assert not any(nearly(moved[i], moved[j]) for i in range(3) for j in range(i))
    assert nearly(model.variations(picture, n=1, seed=2, **QUIET)[0], moved[2])
    assert model.variations(picture, n=1, progress=False)[0].size == (64, 64)


def test_a_picture_of_the_decoder_is_reconstructed(model):
    """The decoder can reach its own picture: there and back again, at the same size."""
    z_img, x_T = model.encode_image(Image.new("RGB", (16, 16), "white")), model.start(3)
    drawn = model.decoder.sample(z_img, None, guidance=1.0, eta=0.0, x_T=x_T, steps=50)
    found = model.decoder.invert(drawn, z_img, steps=50)
    again = model.decoder.sample(z_img, None, guidance=1.0, eta=0.0, x_T=found, steps=50)
    other = model.decoder.sample(z_img, None, guidance=1.0, eta=0.0, x_T=model.start(4), steps=50)
    assert (again - drawn).square().mean() < 0.01 * (other - drawn).square().mean()


def test_interpolations_end_at_the_reconstructions(model, picture, other):
    way = model.interpolate(picture, other, n=4, **QUIET)
    assert len(way) == 4
    assert nearly(way[0], model.reconstruct(picture, **QUIET)[0])
    assert nearly(way[-1], model.reconstruct(other, **QUIET)[0])
    assert not nearly(way[1], way[0]) and not nearly(way[1], way[-1])


def test_interpolations_from_one_noise(model, picture, other, monkeypatch):
    seen = []
    sample_ = model.decoder.sample
    monkeypatch.setattr(
        model.decoder,
        "sample",
        lambda *args, **rest: seen.append((args, rest)) or sample_(*args, **rest),
    )
    model.interpolate(picture, other, n=3, seed=5, fixed_noise=True, **QUIET)
    (z_img, tokens), x_T = seen[0][0][:2], seen[0][1]["x_T"]
    assert tokens is None and torch.equal(x_T[0], x_T[1]) and torch.equal(x_T[0], x_T[2])
    ends = model.encode_image([picture, other])
    assert torch.allclose(z_img[[0, 2]], ends, atol=1e-5)
    assert torch.allclose(z_img.norm(dim=1), torch.ones(3), atol=1e-5)
    middle = torch.nn.functional.normalize(ends.sum(0), dim=0)
    assert torch.allclose(z_img[1], middle, atol=1e-4)


def test_text_diffs_begin_at_the_picture(model, picture, monkeypatch):
    seen = []
    sample_ = model.decoder.sample
    with monkeypatch.context() as patch:
        patch.setattr(
            model.decoder,
            "sample",
            lambda *args, **rest: seen.append(args[0]) or sample_(*args, **rest),
        )
        pictures = model.textdiff(
            picture, "a red circle", "a blue circle", theta=[0.0, 0.25], guidance=1.0, **QUIET
        )
    assert nearly(pictures[0], model.reconstruct(picture, **QUIET)[0])
    assert torch.allclose(seen[0][0], model.encode_image(picture)[0], atol=1e-4)
    assert (seen[0][1] - seen[0][0]).norm() > 1e-3


def test_text_diffs_turn_to_the_difference_of_the_captions(model, picture, monkeypatch):
    """The paper's formula, which a run without whitening follows."""
    monkeypatch.setattr(model.prior, "cfg", replace(model.prior.cfg, whiten_z=False))
    source, target, z_img = ["a red circle"], ["a blue circle"], model.encode_image(picture)
    z = model.follow(z_img.expand(3, -1), source, target, torch.tensor([0.0, 0.25, 1.0]))
    difference = torch.nn.functional.normalize(
        model.encode_text(target) - model.encode_text(source), dim=-1
    )
    assert torch.allclose(z[0], z_img[0], atol=1e-5)
    assert torch.allclose(z[2:], difference, atol=1e-4)
    angle = (z[1] @ z[0]).acos() / (difference[0] @ z[0]).acos()
    assert angle.item() == pytest.approx(0.25, abs=1e-3)
    assert torch.allclose(
        model.follow(z_img, None, target, torch.ones(1)), model.encode_text(target), atol=1e-4
    )


def test_text_diffs_of_whitened_runs_add_what_the_prior_says(model, picture, monkeypatch):
    """The whole change at 1/2, half of it at 1/4, for one picture or for several."""
    source = ["a red circle", "two cyan rings"]
    target = ["a blue circle", "three cyan rings"]
    prior = model.prior
    z_img = torch.cat([model.encode_image(picture), model.encode_text(["a star"])])
    theta = torch.tensor([0.5, 0.25])
    d = torch.randn(2, z_img.shape[1], generator=torch.Generator().manual_seed(0))
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(latents, "flow_edit", lambda *args: asked.append(args) or d[: len(args[3])])
        z = model.follow(z_img, source, target, theta)
        one = model.follow(z_img[:1], source[:1], target[:1], torch.tensor([0.0, 0.25, 0.5]))
    x = prior.scale(z_img)
    assert torch.allclose(z, prior.unscale(x + torch.tensor([[1.0], [0.5]]) * d), atol=1e-5)
    assert torch.allclose(
        one, prior.unscale(x[:1] + torch.tensor([[0.0], [0.5], [1.0]]) * d[:1]), atol=1e-5
    )
    noisy = torch.randn(2, x.shape[1], generator=torch.Generator().manual_seed(1))
    t = torch.tensor([500, 500])
    for denoise, captions in zip(asked[0][1:3], (source, target)):
        tokens = model.tokens(captions)
        assert torch.allclose(
            denoise(noisy, t).x_start,
            prior.denoiser(tokens, model.encode_text(captions))(noisy, t).x_start,
            atol=1e-5,
        )
    assert torch.equal(asked[0][3], x) and len(asked[0][4]) == prior.cfg.sampling_steps


def test_text_diffs_take_their_noise_from_the_seed(model, picture, monkeypatch):
    monkeypatch.setattr(model.prior, "cfg", replace(model.prior.cfg, sampling_steps=8))
    z_img, half = model.encode_image(picture), torch.tensor([0.5])
    one, again, other = (
        model.follow(z_img, ["a red circle"], ["a blue circle"], half, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.allclose(
        model.follow(z_img, ["a red circle"], ["a red circle"], half), z_img, atol=1e-5
    )


def test_text_diffs_in_reduced_precision_are_nearly_the_same(run, model, picture):
    light = DALLE2.load(run, "cpu", torch.bfloat16, offload=True)
    z_img, half = model.encode_image(picture), torch.tensor([0.5])
    full, reduced = (
        one.follow(z_img, ["a red circle"], ["a blue circle"], half) for one in (model, light)
    )
    assert reduced.dtype == torch.float32 and (full * reduced).sum() > 0.99


def test_text_diffs_without_a_source_end_where_the_caption_does(model, picture):
    """At the noisy end nothing is left of the picture: z_θ at 1/2 depends on the caption alone."""
    z_img = model.encode_image(picture)
    others = torch.nn.functional.normalize(
        torch.randn(1, z_img.shape[1], generator=torch.Generator().manual_seed(0)), dim=-1
    )
    half = torch.tensor([0.5])
    one, other = (model.follow(z, None, ["a blue circle"], half) for z in (z_img, others))
    assert (one - other).norm() < 0.1 * (z_img - others).norm()


def test_reconstructions_from_components(model, picture, monkeypatch):
    seen = []
    sample_ = model.decoder.sample
    monkeypatch.setattr(
        model.decoder,
        "sample",
        lambda *args, **rest: seen.append((args[0], rest["x_T"])) or sample_(*args, **rest),
    )
    D = model.clip.cfg.clip_dim
    assert len(model.reconstruct(picture, [1, 4, D], **QUIET)) == 3
    z_img, x_T = seen[0]
    cosine = (z_img @ model.encode_image(picture).T)[:, 0]
    assert (cosine.diff() >= -1e-5).all() and cosine[-1] > 0.9999 and torch.equal(x_T[0], x_T[2])
    with pytest.raises(ValueError, match="components"):
        model.reconstruct(picture, [D + 1], **QUIET)


@pytest.mark.parametrize("stage, size", [("base", 16), ("up1", 32), ("full", 64)])
def test_inpainting_leaves_every_pixel_outside_the_mask(model, picture, stage, size):
    image = picture.resize((size, size), Image.Resampling.BICUBIC)
    drawn = model.inpaint(image, half_mask(size), CAPTIONS[0], n=2, progress=False, stage=stage)
    assert [d.size for d in drawn] == [(size, size)] * 2
    for d in drawn:
        assert np.array_equal(pixels(d)[:, size // 2 :], pixels(image)[:, size // 2 :])
        assert np.abs(pixels(d)[:, : size // 2] - pixels(image)[:, : size // 2]).max() > 10
    assert not nearly(*drawn)


def test_inpainting_shows_each_model_what_is_known(model, picture, monkeypatch):
    """An edge that lies on no coarse grid: a coarse pixel is new if any fine one in it is."""
    mask, masks, ends = Image.new("L", (64, 64)), {}, {}
    mask.paste(255, (0, 0, 29, 64))
    for network in (model.decoder, *model.upsamplers):

        def spy(*args, sample_=network.sample, known=None, **rest):
            images = sample_(*args, known=known, **rest)
            # Drawn only to choose z_img by.
            if known is None:
                return images
            masks[images.shape[-1]], ends[images.shape[-1]] = (
                known[1],
                (images - known[0]).abs() * (1 - known[1]),
            )
            return images

        monkeypatch.setattr(network, "sample", spy)
    model.inpaint(picture, mask, CAPTIONS[0], progress=False)
    assert {side: int(m[0, 0, 0].sum()) for side, m in masks.items()} == {16: 8, 32: 15, 64: 29}
    assert all(m[..., : int(m[0, 0, 0].sum())].all() for m in masks.values())
    # The models themselves end at the known pixels.
    assert all(end.max() < 0.02 for end in ends.values())


def test_inpainting_chooses_by_what_is_known_not_by_sketches(model, picture, monkeypatch):
    monkeypatch.setattr(model, "choose", lambda *_: pytest.fail("a sketch was looked at"))
    assert len(model.inpaint(picture, half_mask(), CAPTIONS[0], n=2, **QUIET)) == 2


def test_inpainting_takes_the_z_img_that_goes_with_what_is_known(model, monkeypatch):
    """Of three z_img the one wins that is right outside the mask, whatever is inside."""
    z_img = torch.randn(2, 3, model.clip.cfg.clip_dim)
    grey = {
        tuple(z.tolist()): (0.9, 0.2, -0.5)[i]
        for row, order in zip(z_img, ((0, 1, 2), (0, 2, 1)))
        for z, i in zip(row, order)
    }
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1

    def sample(z, tokens, **rest):
        drawn = torch.stack([torch.full((3, 16, 16), grey[tuple(row.tolist())]) for row in z])
        return torch.where(mask > 0.5, -drawn, drawn)

    monkeypatch.setattr(model.decoder, "sample", sample)
    known = torch.full((1, 3, 16, 16), 0.1)
    known[..., :8] = -0.9  # as the first draws it
    assert torch.equal(
        model.choose_by_known_pixels(z_img, [0, 1], known, mask),
        torch.stack([z_img[0, 1], z_img[1, 2]]),
    )


def test_masks_are_turned_upright_with_the_picture(model):
    sideways = Image.new("RGB", (90, 60), "grey")
    # A telephone held upright: 60 x 90.
    sideways.getexif()[0x0112] = 6
    upright = Image.new("L", (60, 90), 255)
    assert model.inpaint(sideways, upright, CAPTIONS[0], **QUIET)[0].size == (16, 16)
    with pytest.raises(ValueError, match="60 x 90"):
        model.inpaint(sideways, upright.rotate(90, expand=True), CAPTIONS[0], **QUIET)


def test_inpainting_needs_a_mask_that_fits(model, picture):
    for mask, said in (
        (half_mask(32), "64 x 64"),
        (Image.new("L", (64, 64)), "nothing in the mask"),
    ):
        with pytest.raises(ValueError, match=said):
            model.inpaint(picture, mask, CAPTIONS[0], **QUIET)
    with pytest.raises(ValueError, match="caption is empty"):
        model.inpaint(picture, half_mask(), " ", **QUIET)


def test_classification_gives_probabilities_by_clip(model, picture):
    p = model.classify(picture, CAPTIONS)
    logits = (
        model.clip.logit_scale.exp() * model.encode_image(picture) @ model.encode_text(CAPTIONS).T
    )
    assert torch.allclose(p, logits.softmax(-1)[0], atol=1e-5)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m, i: m.interpolate(i, i, n=1), "at least two"),
        (lambda m, i: m.textdiff(i, "a", "b", theta=[0, 1.5]), "theta"),
        (lambda m, i: m.textdiff(i, "two cyan rings", "two cyan rings"), "no difference"),
        (lambda m, i: m.textdiff(i, "a", ""), "empty"),
        (lambda m, i: m.variations(i, steps=0), "sampling steps"),
        (lambda m, i: m.variations(i, guidance=-1.0), "guidance"),
        (lambda m, i: m.text_to_image("a", n=3, rerank=2), "at least as many"),
        (lambda m, i: m.variations(i, n=0), "at least one"),
        (lambda m, i: m.inpaint(i, i, "a", n=0), "at least one"),
        (lambda m, i: m.reconstruct(i, []), "at least one"),
        (lambda m, i: m.textdiff(i, "a", "b", theta=[]), "at least one"),
        (lambda m, i: m.variations(i, eta=5), "eta"),
        (lambda m, i: m.interpolate(i, i, stage="bas"), "stage"),
        (lambda m, i: m.inpaint(i, i, "a", prior="foo"), "prior"),
    ],
)
def test_mistakes_with_pictures_are_value_errors(model, picture, call, said):
    with pytest.raises(ValueError, match=said):
        call(model, picture)


# ------------------------------------------------------------------------------ tensors and masks

# {what takes pictures: how it is called with one}; `small` has the side of CLIP and of the decoder.
ENTRANCES = {
    "encode_image": lambda model, image: model.encode_image(image),
    "classify": lambda model, image: model.classify(image, CAPTIONS),
    "invert": lambda model, image: model.invert(image)[0],
    "variations": lambda model, image: model.variations(image, n=1, **QUIET),
    "reconstruct": lambda model, image: model.reconstruct(image, **QUIET),
    "components": lambda model, image: model.reconstruct(image, [1], **QUIET),
    "interpolate": lambda model, image: model.interpolate(image, image, n=2, **QUIET),
    "fixed noise": lambda model, image: model.interpolate(
        image, image, n=2, fixed_noise=True, **QUIET),
    "textdiff": lambda model, image: model.textdiff(image, *CAPTIONS[:2], [0.3], **QUIET),
}  # fmt: skip


def small_tensor(model, picture):
    """The picture as uint8 (1, 3, S, S), S the side that CLIP takes."""
    return from_pil(picture.resize((model.clip.cfg.image_size,) * 2))[None]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_tensors_mean_the_same_pictures_wherever_they_enter(model, picture, entrance):
    bytes_ = small_tensor(model, picture)
    assert model.clip.cfg.image_size == model.decoder.cfg.image_size, "as in every preset for shapes"
    take = ENTRANCES[entrance]
    expected = take(model, to_pil(bytes_[0]))
    for image in (bytes_, to_float(bytes_), to_float(bytes_).double()):
        found = take(model, image)
        if torch.is_tensor(found):
            assert torch.allclose(found, expected, atol=1e-5)
        else:
            assert all(map(nearly, found, expected))


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_tensors_that_are_no_pictures_are_refused_wherever_they_enter(model, picture, entrance):
    bytes_ = small_tensor(model, picture)
    nan = to_float(bytes_)
    nan[0, 0, 0, 0] = float("nan")
    for image, said in (
        (bytes_.float(), r"values up to 2\d\d: give floats in \[-1, 1\]"),
        (bytes_.long(), "images are torch.int64"),
        (nan, "values up to nan"),
        (bytes_[0], r"shape \(3, 16, 16\): this model takes \(B, 3, 16, 16\)"),
        (bytes_[..., :8], "this model takes"),
        (bytes_[:, :1], "this model takes"),
        (bytes_.numpy(), "give PIL images"),
        ([to_float(bytes_[0])], "images are Tensor: give PIL images, or one tensor"),
        (["a.png"], "images are str"),
        ([], "images are none"),
    ):
        with pytest.raises(ValueError, match=said):
            ENTRANCES[entrance](model, image)


def test_a_tensor_a_little_beyond_white_passes(model, picture):
    """Resizing overshoots at edges."""
    image = to_float(small_tensor(model, picture))
    assert torch.allclose(
        model.encode_image(1.1 * image), model.clip.encode_image(1.1 * image), atol=1e-6
    )


def test_an_erased_part_is_painted_as_a_white_part_is(model, picture):
    """OpenAI's image API takes the picture itself, with a part erased."""
    erased = picture.copy()
    erased.putalpha(half_mask().point(lambda value: 255 - value))
    (found,) = model.inpaint(picture, erased, CAPTIONS[0], progress=False)
    (expected,) = model.inpaint(picture, half_mask(), CAPTIONS[0], progress=False)
    assert np.array_equal(pixels(found), pixels(expected))
    assert np.array_equal(pixels(found)[:, 32:], pixels(picture)[:, 32:])
    assert not np.array_equal(pixels(found)[:, :32], pixels(picture)[:, :32])
