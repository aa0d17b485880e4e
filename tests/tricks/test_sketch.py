"""sketch.py: the average of what belongs to a z_img, and how the decoder is shown it: beside x_t, frozen, grey where z_img is dropped."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import lively, three_words
from test_train import call, copy_of

from mini_dalle2 import configs
from mini_dalle2.pipeline import load_model
from mini_dalle2.tricks.sketch import Sketch, SketchConfig
from mini_dalle2.tricks.sketched import SketchedDecoder, SketchedDecoderConfig
from mini_dalle2.runtime.files import load_checkpoint
from mini_dalle2.training import overrides

EOT, L, D = 20, 6, 12
SHOWN = SketchedDecoderConfig(image_size=8, clip_dim=D, model_channels=16, channel_mult=(1,), num_res_blocks=1, attn_resolutions=(), head_dim=8,
                      norm_groups=8, vocab_size=30, context_length=L, eot_id=EOT, text_width=16, text_layers=1, text_heads=2,
                      sketch=True, sketch_width=24, sketch_layers=2)


def decoder(seed=0):
    """A small decoder that is shown sketches, lively."""
    torch.manual_seed(seed)
    return lively(SketchedDecoder(SHOWN), 0.1)


def batch(n, seed=1):
    """pictures (n, 3, 8, 8), z_img (n, D) of unit norm, captions (n, L)."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1
    return pictures, F.normalize(torch.randn(n, D, generator=generator), dim=1), three_words(n, L, EOT, generator)


def test_it_learns_the_average_of_the_pictures_with_the_same_embedding():
    """Of three pictures of each z_img, every one as often as another, least squares finds the mean, and no single one of them."""
    torch.manual_seed(0)
    pictures, z_img, _ = batch(4)
    answers = (pictures + 0.5 * torch.randn(3, *pictures.shape)).clamp(-1, 1)              # (3, 4, 3, 8, 8)
    sketch = Sketch(SketchConfig(clip_dim=D, image_size=8, width=64, layers=2))
    sketch.measure(batch(200, seed=2)[1])
    adam = torch.optim.Adam(sketch.parameters(), lr=3e-3)
    for _ in range(600):
        adam.zero_grad()
        sketch.loss(answers.flatten(0, 1), z_img.repeat(3, 1)).backward()
        adam.step()
    drawn, mean = sketch(z_img), answers.mean(0)
    assert (drawn - mean).abs().max() < 0.02
    assert ((drawn - answers).abs().amax((1, 2, 3, 4)) > 0.2).all()
    spread = (answers - mean).square().mean()                              # what no guess can know
    assert sketch.loss(answers.flatten(0, 1), z_img.repeat(3, 1)).item() == pytest.approx(spread.item(), rel=0.01)


@torch.no_grad()
def test_the_decoder_is_shown_it_beside_x_t():
    model, (x, z, tokens), t = decoder(), batch(2), torch.tensor([50, 900])
    told = model.condition(z, tokens)
    assert torch.allclose(told.sketch, model.sketch(z)) and told.sketch.shape == (2, 3, 8, 8)
    assert model.unet.in_conv.in_channels == 6
    assert torch.equal(model(x, t, told), model.unet(torch.cat([x, told.sketch], 1), t, told.emb, told.context))
    assert not torch.allclose(model(x, t, told), model(x, t, told._replace(sketch=-told.sketch)), atol=1e-3)


@torch.no_grad()
def test_no_z_img_is_no_sketch():
    model, (_, z, tokens) = decoder(), batch(3)
    keep = torch.tensor([True, False, True])
    shown = model.condition(z, tokens, keep_z=keep).sketch
    assert torch.equal(shown[1], torch.zeros(3, 8, 8)) and torch.allclose(shown[keep], model.sketch(z[keep]), atol=1e-6)
    assert torch.equal(model.condition(None, tokens).sketch, torch.zeros(3, 3, 8, 8))
    assert torch.allclose(model.condition(z, None).sketch, model.sketch(z), atol=1e-6)
    for given in ((None, tokens), (z, None), (z, tokens)):
        assert model.eval().sample(*given, guidance=2.0, steps=3).shape == (3, 3, 8, 8)


@torch.no_grad()
def test_guidance_leads_away_from_no_sketch():
    """The formula, with the two halves computed one by one."""
    model, (x, z, tokens), t = decoder().eval(), batch(2), torch.tensor([400, 400])
    drop = torch.zeros(2, dtype=torch.bool)
    with_z, without = (model(x, t, told)[:, :3] for told in (model.condition(z, tokens), model.condition(z, tokens, drop, drop)))
    eps = model.denoiser(z, tokens, guidance=3.0, clip=None)(x, t).eps
    assert torch.allclose(eps, without + 3 * (with_z - without), atol=1e-4)


def test_it_stays_as_it_was_trained():
    model, (x, z, tokens) = decoder().train(), batch(4)
    model.loss(x, z, tokens, torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is None for p in model.sketch.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("sketch."))


def test_the_decoder_carries_the_one_of_its_run(run):
    """Its own stage's averaged weights, whitening included, through the decoder's training and into its checkpoint."""
    sketch, checkpoint = load_model(run / "sketch.pt", "sketch")
    inside = load_model(run / "decoder.pt", "decoder")[0].sketch
    assert asdict(sketch.cfg) == asdict(inside.cfg) and sketch.whitening.mean.any()
    for (name, ours), theirs in zip(sketch.state_dict().items(), inside.state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert checkpoint["clip_signature"] == load_checkpoint(run / "decoder.pt")["clip_signature"]


def test_what_stands_in_for_it(run, tmp_path, capsys):
    """It must be there before the decoder, finished; a run whose decoder is shown none has no such stage."""
    folder = copy_of(run, tmp_path / "gone", ["sketch.pt", "sketch.resume.pt", "decoder.pt", "decoder.resume.pt"])
    code, _, error = call(capsys, "--out", folder, "--stage=decoder")
    assert code == 2 and "sketch.pt is missing: run `python train.py --stage sketch" in error
    half = copy_of(run, tmp_path / "half", ["decoder.pt", "decoder.resume.pt", "sketch.pt"])
    checkpoint = load_checkpoint(run / "sketch.pt")
    torch.save(checkpoint | {"step": 1}, half / "sketch.pt")
    code, _, error = call(capsys, "--out", half, "--stage=decoder")
    assert code == 2 and f"sketch.pt has 1 of 3 steps: run `python train.py --stage sketch --out {half} --resume`" in error
    code, _, error = call(capsys, "--out", tmp_path / "new", "--stage=sketch", "--preset=micro", "--decoder.sketch=false")
    assert code == 2 and "--decoder.sketch=true" in error
    assert "sketch" not in configs.stages(configs.preset("paper")) and "sketch" in configs.stages(configs.preset("tiny"))


def test_runs_from_before_there_were_sketches_are_read():
    config = overrides.override(configs.preset("tiny"), ["--decoder.sketch=false"])
    saved = overrides.to_dict(config)
    del saved["sketch"]
    for name in ("sketch", "sketch_width", "sketch_layers"):
        del saved["decoder"]["model"][name]
    old = overrides.from_dict(saved)
    assert old == config and "sketch" not in configs.stages(old)


def test_decoders_from_before_there_were_sketches_are_read(run, tmp_path):
    """Their checkpoints do not name the settings of sketches."""
    config = asdict(overrides.override(configs.preset("micro"), ["--decoder.sketch=false"]).decoder.model)
    model = SketchedDecoder(SketchedDecoderConfig(**config))
    for name in ("sketch", "sketch_width", "sketch_layers"):
        del config[name]
    torch.save(load_checkpoint(run / "decoder.pt") | {"model_config": config, "ema": model.state_dict()}, tmp_path / "decoder.pt")
    assert load_model(tmp_path / "decoder.pt", "decoder")[0].sketch is None


def test_another_sketch_than_the_decoders_is_noticed(run, tmp_path, capsys):
    folder = copy_of(run, tmp_path / "other", ["sketch.pt", "sketch.resume.pt"])
    checkpoint = load_checkpoint(run / "sketch.pt")
    checkpoint["ema"]["layers.0.bias"] += 1
    torch.save(checkpoint, folder / "sketch.pt")
    code, _, error = call(capsys, "--out", folder, "--resume")
    assert code == 2 and "was shown another sketch than" in error


def test_from_takes_it_out_of_a_decoder(run, tmp_path, capsys):
    """Whatever the steps of either: an origin without a sketch.pt has it in its decoder, finished, even where that one is not."""
    origin = copy_of(run, tmp_path / "origin", ["sketch.pt", "decoder.pt"])
    torch.save(load_checkpoint(run / "decoder.pt") | {"step": 1}, origin / "decoder.pt")
    one = ["--decoder.steps=1", "--sketch.steps=7"]
    assert call(capsys, "--from", origin, "--out", tmp_path / "new", "--stage=decoder", "--device=cpu", *one)[0] == 0
    taken = load_checkpoint(tmp_path / "new" / "sketch.pt")
    assert (taken["step"], taken["steps"]) == (7, 7)
    assert all(torch.equal(value, taken["ema"][name]) for name, value in load_checkpoint(run / "sketch.pt")["ema"].items())
    assert call(capsys, "--out", tmp_path / "new", "--resume", "--stage=decoder")[0] == 0
