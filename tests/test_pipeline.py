"""pipeline.py: which pictures come out for which captions and seeds; damaged run folders."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mini_dalle2 import DALLE2
from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.pipeline import check_words, load_model
from mini_dalle2.runtime.files import load_checkpoint, save_checkpoint
from mini_dalle2.runtime.noise import seeded
from pictures import CAPTIONS, half_mask, nearly, pixels, sampled


@pytest.fixture(scope="module")
def model(run):
    return DALLE2.load(run, "cpu")


def test_pictures_come_in_rows_of_n_at_the_size_of_the_last_stage(model):
    rows = sampled(model, CAPTIONS[:2], n=3)
    assert [len(row) for row in rows] == [3, 3]
    assert all(image.size == (64, 64) and image.mode == "RGB" for row in rows for image in row)
    assert sampled(model, CAPTIONS[0], stage="base")[0][0].size == (16, 16)


def test_each_stage_on_request_and_the_same_as_alone(model):
    each = sampled(model, CAPTIONS[:1], stage="each", seed=3)[0][0]
    assert {name: image.size[0] for name, image in each.items()} == {
        "base": 16,
        "up1": 32,
        "up2": 64,
    }
    for stage in each:
        assert nearly(each[stage], sampled(model, CAPTIONS[:1], stage=stage, seed=3)[0][0])
    assert nearly(each["up2"], sampled(model, CAPTIONS[:1], seed=3)[0][0])


def test_a_picture_depends_on_its_caption_and_seed_alone(model):
    many = sampled(model, CAPTIONS, n=2, seed=5, stage="base")
    assert nearly(many[1][0], sampled(model, CAPTIONS[1:2], seed=5, stage="base")[0][0])
    assert nearly(many[1][1], sampled(model, CAPTIONS[1:2], seed=6, stage="base")[0][0])
    assert not nearly(many[1][0], many[1][1])


def test_batches_do_not_show(model, monkeypatch):
    whole = sampled(model, CAPTIONS, n=2, stage="base")
    monkeypatch.setattr(model, "BATCH", 4)
    assert all(
        nearly(a, b)
        for row, again in zip(whole, sampled(model, CAPTIONS, n=2, stage="base"))
        for a, b in zip(row, again)
    )


# ------------------------------------------------------------------ noise


def starts(monkeypatch, model, **options):
    """Sample once; return what each model was shown first, its noise: {stage: x_T}."""
    seen = {}
    parts = {
        "prior": model.prior,
        "decoder": model.decoder,
        **{f"up{i}": u for i, u in enumerate(model.upsamplers, start=1)},
    }
    with monkeypatch.context() as patch:
        for name, part in parts.items():

            def watched(x, *rest, name=name, original=part.forward):
                seen.setdefault(name, x.clone())
                return original(x, *rest)

            patch.setattr(part, "forward", watched)
        sampled(model, **options)
    return seen


def test_each_stage_has_noise_of_its_own(model, monkeypatch):
    """A change in one stage leaves the noise of the others as it was; no two stages share noise."""
    options = dict(captions=CAPTIONS[:2], n=2, seed=3)
    seen = starts(monkeypatch, model, **options)
    assert set(seen) == {"prior", "decoder", "up1", "up2"}
    with monkeypatch.context() as patch:
        # The run has two steps.
        patch.setattr(model.prior, "cfg", replace(model.prior.cfg, sampling_steps=4))
        longer = starts(monkeypatch, model, **options)
    none = starts(monkeypatch, model, prior="z_txt", **options)
    fewer = starts(monkeypatch, model, steps=1, **options)
    for name in ("decoder", "up1", "up2"):
        assert all(
            torch.equal(seen[name][:, :3], other[name][:, :3]) for other in (longer, none, fewer)
        )
    numbers = [seen[name][0].flatten()[:32] for name in seen]
    assert all(not torch.equal(numbers[i], numbers[j]) for i in range(4) for j in range(i))


def test_base_pictures_do_not_depend_on_how_far_one_goes(model):
    base, each = (sampled(model, CAPTIONS, n=2, seed=1, stage=stage) for stage in ("base", "each"))
    full = sampled(model, CAPTIONS, n=2, seed=1, stage="full")
    for i in range(3):
        for j in range(2):
            assert np.array_equal(pixels(base[i][j]), pixels(each[i][j]["base"]))
            assert np.array_equal(pixels(full[i][j]), pixels(each[i][j]["up2"]))


def test_more_pictures_begin_with_the_same_ones(model, monkeypatch):
    one, four = sampled(model, CAPTIONS[:2], n=1, seed=7), sampled(model, CAPTIONS[:2], n=4, seed=7)
    assert all(nearly(one[i][0], four[i][0]) for i in range(2))
    # One large picture at a time.
    monkeypatch.setattr(model.upsamplers[1], "CHUNK_PIXELS", 64 * 64)
    again = sampled(model, CAPTIONS[:2], n=4, seed=7)
    assert all(nearly(a, b) for row, other in zip(four, again) for a, b in zip(row, other))


def test_seeds_of_any_size_differ():
    """torch reads 32 bits of a seed: without hashing, 2 ** 32 would be 0 again."""
    first = [
        torch.randn(4, generator=seeded(seed, stage))
        for seed in (0, 1, -1, 2**32, 2**80)
        for stage in ("prior", "decoder")
    ]
    assert all(not torch.equal(first[i], first[j]) for i in range(10) for j in range(i))
    assert torch.equal(first[0], torch.randn(4, generator=seeded(0, "prior")))


def given_to_the_decoder(model, monkeypatch, **options):
    """The z_img and tokens that Decoder.sample is called with for base pictures of CAPTIONS."""
    seen = []
    with monkeypatch.context() as patch:
        sample_ = model.decoder.sample
        patch.setattr(
            model.decoder,
            "sample",
            lambda z_img, tokens, **rest: (
                seen.append((z_img, tokens)) or sample_(z_img, tokens, **rest)
            ),
        )
        sampled(model, CAPTIONS, stage="base", **options)
    return seen[0]


def test_four_ways_to_an_embedding(model, monkeypatch):
    """The two priors, and the other rows of the paper's Fig. 8: z_txt, and the caption alone."""
    given = {prior: given_to_the_decoder(model, monkeypatch, prior=prior) for prior in model.PRIORS}
    assert torch.equal(given["z_txt"][0], model.encode_text(CAPTIONS))
    assert given["caption"][0] is None
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
    assert sampled(model, CAPTIONS[:1], stage="base")
    image = Image.new("RGB", (64, 64))
    for call in (
        lambda: sampled(model, CAPTIONS, prior="ar"),
        lambda: model.reconstruct(image, [2]),
        lambda: model.inpaint(image, half_mask(), CAPTIONS[0], prior="ar"),
    ):
        with pytest.raises(ValueError, match="--stage ar_prior"):
            call()


def test_reranking_keeps_what_clip_finds_closest(model):
    """The best two of six, the best first; each is the picture that its own seed gives."""
    six = sampled(model, CAPTIONS[:2], n=6, stage="base")
    best = sampled(model, CAPTIONS[:2], n=2, stage="base", rerank=6)
    for row, kept, z_txt in zip(six, best, model.encode_text(CAPTIONS[:2])):
        fit = (model.encode_image(row) @ z_txt).argsort(descending=True)
        assert all(nearly(row[int(i)], image) for i, image in zip(fit, kept))
    # Upsamplers, too, go by a picture's own seed.
    six, best = sampled(model, CAPTIONS[:1], n=6), sampled(model, CAPTIONS[:1], n=2, rerank=6)
    assert all(
        nearly(six[0][int(i)], image)
        for i, image in zip(
            (
                model.encode_image(sampled(model, CAPTIONS[:1], n=6, stage="base")[0])
                @ model.encode_text(CAPTIONS[:1])[0]
            ).argsort(descending=True),
            best[0],
        )
    )


def priors_own(model, monkeypatch, prior, **options):
    """What a prior sampled for CAPTIONS (3, k, D), and what the decoder was then given (3, D)."""
    drawn = []
    with monkeypatch.context() as patch:
        part = model.ar_prior if prior == "ar" else model.prior
        sample_ = part.sample
        patch.setattr(
            part,
            "sample",
            lambda *inputs, **rest: drawn.append(sample_(*inputs, **rest)) or drawn[0],
        )
        given = given_to_the_decoder(model, monkeypatch, prior=prior, **options)[0]
    return drawn[0].unflatten(0, (len(CAPTIONS), -1)), given


@pytest.mark.parametrize("prior", ["diffusion", "ar"])
def test_of_several_z_img_the_one_is_drawn_whose_sketch_clip_finds_closest(
    model, monkeypatch, prior
):
    """CLIP sees each sketch alone and compares it with its caption; not always the first wins."""
    chosen = []
    for k, options in ((5, dict(sketches=5)), (model.SKETCHES, {})):
        z_img, given = priors_own(model, monkeypatch, prior, **options)
        assert z_img.shape == (3, k, model.clip.cfg.clip_dim)
        for candidates, z, caption in zip(z_img, given, CAPTIONS):
            fit = [
                (
                    model.encode_image(to_pil(model.decoder.sketch(one[None])[0]))
                    @ model.encode_text(caption)[0]
                ).item()
                for one in candidates
            ]
            assert torch.equal(z, candidates[int(np.argmax(fit))])
            chosen.append(int(np.argmax(fit)))
    assert len(set(chosen)) > 1


def test_without_a_choice_the_priors_own_is_drawn(model, monkeypatch):
    """One sketch, no sketch, no image encoder, z_txt: in these cases nobody looks at sketches."""
    z_img, given = priors_own(model, monkeypatch, "diffusion", sketches=1)
    assert z_img.shape[1] == 1 and torch.equal(z_img[:, 0], given)
    monkeypatch.setattr(model, "choose", lambda *_: pytest.fail("a sketch was looked at"))
    assert torch.equal(
        given_to_the_decoder(model, monkeypatch, prior="z_txt")[0], model.encode_text(CAPTIONS)
    )
    for part, name in ((model.clip, "visual"), (model.decoder, "sketch")):
        with monkeypatch.context() as patch:
            patch.setitem(part._modules, name, None)
            assert torch.equal(model.embed(model.tokens(CAPTIONS), [0, 0, 0]), given)


def test_many_sketches_are_drawn_in_parts(model, monkeypatch):
    """A choice among more than SKETCHES takes no more memory at once, and no other pictures."""
    whole = model.embed(model.tokens(CAPTIONS), [0, 0, 0], sketches=20)
    assert torch.allclose(
        whole, priors_own(model, monkeypatch, "diffusion", sketches=20)[1], atol=1e-5
    )
    rows, sample_ = [], model.prior.sample
    monkeypatch.setattr(model, "BATCH", 3)
    monkeypatch.setattr(
        model.prior,
        "sample",
        lambda tokens, *rest, **options: (
            rows.append(len(tokens)) or sample_(tokens, *rest, **options)
        ),
    )
    assert torch.allclose(
        model.embed(model.tokens(CAPTIONS), [0, 0, 0], sketches=20), whole, atol=1e-5
    )
    assert rows == [20, 20, 20]


def test_a_choice_in_reduced_precision_with_models_that_come_and_go(run):
    light = DALLE2.load(run, "cpu", torch.bfloat16, offload=True)
    ((picture,),) = sampled(light, CAPTIONS[:1], stage="base", sketches=3)
    assert picture.size == (16, 16) and light.here == []


def test_embeddings_are_unit_vectors_of_the_clip(model):
    images = [to_pil(CaptionedShapes("val", 16, 0, 4)[i]["image"]) for i in range(4)]
    from_pil = model.encode_image(images)
    from_tensor = model.encode_image(
        torch.stack([CaptionedShapes("val", 16)[i]["image"] for i in range(4)])
    )
    # 8-bit rounding lies between them.
    assert torch.allclose(from_pil, from_tensor, atol=0.02)
    assert torch.allclose(from_pil.norm(dim=1), torch.ones(4))
    assert torch.allclose(model.encode_text(CAPTIONS).norm(dim=1), torch.ones(3))
    on_glass = images[0].convert("RGBA")
    assert torch.allclose(model.encode_image(on_glass), from_pil[:1], atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(captions=[""]), "empty"),
        (dict(captions=["  "]), "empty"),
        (dict(captions=[]), "no caption"),
        (dict(captions=["a red circle " * 40]), "too long"),
        (dict(n=0), "at least one"),
        (dict(prior="none such"), "unknown prior"),
        (dict(stage="huge"), "unknown stage"),
        (dict(steps=0), "sampling steps"),
        (dict(steps=2000), "sampling steps"),
        (dict(guidance=-1.0), "guidance"),
        (dict(guidance=float("nan")), "guidance"),
        (dict(sketches=0), "at least one"),
    ],
)
def test_mistakes_are_named(model, options, words):
    with pytest.raises(ValueError, match=words):
        sampled(model, **(dict(captions=CAPTIONS[:1]) | options))


# ------------------------------------------------------------------ run folders


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    return folder


def test_a_run_without_upsamplers_draws_base_pictures(copy):
    (copy / "upsampler1.pt").unlink()
    assert sampled(DALLE2.load(copy, "cpu"), CAPTIONS[:1])[0][0].size == (16, 16)


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
    save_checkpoint(
        checkpoint | {"model_config": checkpoint["model_config"] | {"width": 48}}, copy / "prior.pt"
    )
    with pytest.raises(ValueError, match="does not fit"):
        load_model(copy / "prior.pt")


@pytest.mark.parametrize("stage", ["prior", "ar_prior", "decoder"])
@pytest.mark.parametrize("key", ["clip_dim", "vocab_size", "context_length", "eot_id"])
def test_a_model_of_other_embeddings_or_ids_is_refused(stage, key):
    """Whatever its file says about the CLIP that it belongs to."""
    sizes = dict(clip_dim=32, vocab_size=600, context_length=16, eot_id=599)
    models = {name: SimpleNamespace(cfg=SimpleNamespace(**sizes))
              for name in ("clip", "prior", "ar_prior", "decoder")}
    tokenizer = SimpleNamespace(vocab_size=600, eot_id=599)
    check_words("run", models, tokenizer)
    setattr(models[stage].cfg, key, 24)
    with pytest.raises(ValueError, match=f"run/{stage}.pt has another {key} than run/clip.pt: copy"):
        check_words("run", models, tokenizer)
