"""The benchmarks' own arithmetic: FLOPs against counts by hand, ratios, kinds of operators.

Our own part of each benchmark also runs, at micro size. Nothing is timed.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import decoder_step  # noqa: E402
import peer_models  # noqa: E402
import peers  # noqa: E402
import quality_time  # noqa: E402
import read_z  # noqa: E402
import where_lost  # noqa: E402
from measuring import Timing, flops, kind_of, ratio, seconds  # noqa: E402
from mini_dalle2 import DALLE2  # noqa: E402
from mini_dalle2.transformer import Attention  # noqa: E402

MICRO = peer_models.SIZES["micro"]


def test_flops_are_those_of_a_count_by_hand():
    B, S, c_in, c_out = 2, 16, 3, 8
    conv, x = nn.Conv2d(c_in, c_out, 3, padding=1), torch.randn(B, c_in, S, S)
    forward = 2 * B * S * S * c_out * c_in * 9
    assert flops(lambda: conv(x)) == forward
    assert flops(lambda: conv(x).sum().backward()) == 2 * forward, "x itself wants no gradient"
    assert flops(lambda: conv(x.requires_grad_()).sum().backward()) == 3 * forward

    # Attention: four D × D layers, Q Kᵀ, and its product with V.
    L, D = 10, 32
    attention, x = Attention(D, 4), torch.randn(B, L, D, requires_grad=True)
    forward = 2 * B * L * 4 * D * D + 2 * (2 * B * L * L * D)
    assert flops(lambda: attention(x)) == forward
    assert flops(lambda: attention(x).sum().backward()) == 3 * forward


def test_flops_of_a_training_step_grow_with_the_batch_alone():
    def count(n):
        contender = peer_models.BUILDERS["decoder"]["ours"](MICRO, peer_models.Data(MICRO, n))
        return flops(lambda: contender.loss().backward())

    assert count(3) == 3 * count(1) == 3 * peers.flops_of_one("decoder", "ours", MICRO, {})


@pytest.mark.parametrize(
    "subject, who",
    [
        ("decoder", "diffusers"),
        ("prior", "diffusers"),
        ("upsampler", "diffusers"),
        ("clip", "transformers"),
    ],
)
def test_peers_take_as_many_flops_as_ours(subject, who):
    target = peers.flops_of_one(subject, "ours", MICRO, {}, every_place=True)
    # These two leave out the places of the last block that nobody reads.
    spares = subject in ("prior", "clip")
    assert (peers.flops_of_one(subject, "ours", MICRO, {}) < target) == spares
    change, count = peers.equalised(subject, who, MICRO, target)
    assert change == {} and abs(count / target - 1) <= MICRO.tolerance


def test_sizes_near_ours_come_first():
    near = peer_models.near(64, (2, 2))
    assert near[0] == (64, (2, 2)) and len(near) == len(set(near))
    assert near.index((64, (2, 3))) < near.index((64, (3, 3))) < near.index((128, (2, 2)))


def test_a_ratio_is_the_median_of_those_of_rounds():
    ours, theirs = [[Timing(s, 0, 0) for s in row] for row in ([1, 2, 9], [2, 8, 10])]
    assert ratio(ours, theirs) == 0.5 and seconds(ours) == 2
    with pytest.raises(ValueError):
        ratio(ours, theirs[:2])


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::addmm", "matrix product"),
        ("aten::bmm", "matrix product"),
        ("aten::mm", "matrix product"),
        ("aten::native_group_norm_backward", "norm"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::silu_backward", "elementwise"),
        ("aten::mul", "elementwise"),
        ("aten::add_", "elementwise"),
        ("aten::copy_", "copy, layout"),
        ("aten::cat", "copy, layout"),
        ("aten::_fused_adamw_", "optimiser"),
        ("aten::upsample_nearest2d", "resampling"),
        ("aten::avg_pool2d", "resampling"),
        ("aten::randn", "other"),
    ],
)
def test_kinds_of_operators(name, kind):
    assert kind_of(name) == kind


def test_ours_runs_alone(tmp_path, capsys):
    out = tmp_path / "new" / "peers.json"
    assert peers.main(["--size=micro", "--rounds=1", "--no-memory", f"--out={out}", "--peers"]) == 0
    results = json.loads(out.read_text())
    tables = [value for key, value in results.items() if ", " in key]
    # Four models, in training and in sampling.
    assert len(tables) == 8
    for row in (table["ours"] for table in tables):
        # No test may ask how fast it is.
        assert row["ratio"] == 1 and row["flops"] > 0 and 0 < row["share"] and row["seconds"] > 0
    # Nothing so small comes near a matrix product's rate.
    assert "missed" in capsys.readouterr().out


def test_ours_runs_in_two_precisions(tmp_path, monkeypatch):
    out, seen, training = tmp_path / "peers.json", [], peers.training

    def noting(contender, how):
        seen.append(how.dtype)
        return training(contender, how)

    monkeypatch.setattr(peers, "training", noting)
    assert (
        peers.main(
            [
                "--size=micro",
                "--rounds=1",
                "--precision",
                "--subjects",
                "prior",
                "decoder",
                f"--out={out}",
                "--peers",
            ]
        )
        == 0
    )
    tables = [value for key, value in json.loads(out.read_text()).items() if ", " in key]
    assert (
        len(tables) == 2
        and seen == ["fp32", "bf16"] * 2
        and all(table.keys() == {"ours", "in bf16"} for table in tables)
    )


def test_a_preset_s_decoder_takes_a_step(capsys):
    assert (
        decoder_step.main(
            ["--preset=micro", "--device=cpu", "--steps=1", "--batch=2", "--recompute"]
        )
        == 0
    )
    assert "2 pictures a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "main, arguments, said",
    [
        (peers.main, ["--rounds=0"], "--rounds must be at least 1"),
        (peers.main, ["--peers", "keras"], "invalid choice"),
        (peers.main, ["--peers", "dalle2-pytorch"], "dalle2-pytorch is not installed: pip install"),
        (peers.main, ["--out=."], "is a folder"),
        (decoder_step.main, ["--preset=micro", "--batch=0"], "must be at least 1"),
        (decoder_step.main, ["--preset=karlo"], "choose another"),
        (quality_time.main, ["--every=0"], "--every must be above 0"),
        (quality_time.main, ["--preset=micro"], "too small to be graded"),
        (quality_time.main, ["--decoder.stpes=3"], "the closest is --decoder.steps"),
    ],
)
def test_mistakes_are_one_sentence(main, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(peers, "installed", lambda who: False)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_reader_names_what_a_code_says_and_nothing_that_it_does_not():
    """The codes are one-hot in the colour alone.

    So a reader reads the colour's slot off, and guesses the shape's.
    """
    assert read_z.slots("a red circle below a blue square") == read_z.slots(
        "a blue square above a red circle"
    )
    assert read_z.slots("two cyan rings") == ("count two", "cyan", "ring", "", "")
    generator = torch.Generator().manual_seed(0)
    labels = torch.stack(
        [torch.randint(k, (4096,), generator=generator) for k in (2, 4, 3, 2, 2)], 1
    )
    z, sizes = nn.functional.one_hot(labels[:, 1], 4).float(), [2, 4, 3, 2, 2]
    for hidden in ((), (16,)):
        reader = read_z.train_reader(z[:3072], labels[:3072], sizes, hidden, epochs=100)
        found = read_z.read(reader, z[3072:], sizes)
        right = (found == labels[3072:]).float().mean(0)                   # (5,)
        assert (
            right[1] == 1
            and (right[[0, 2, 3, 4]] - torch.tensor([1 / 2, 1 / 3, 1 / 2, 1 / 2])).abs().max()
            < 0.08
        )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_drawing_on_from_a_true_picture(run, sampler):
    """From the last t, the picture is what sampling gives from the same x_T.

    From another t, it begins with q(x_t | x_0) and takes only the steps below.
    """
    model = DALLE2.load(run)
    decoder, captions = model.decoder, ["a red circle", "two cyan rings"]
    decoder.cfg = dataclasses.replace(decoder.cfg, sampling_steps=8, sampler=sampler, eta=0.5)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z_img, tokens = model.encode_image(images), model.tokens(captions)
    generator = torch.Generator().manual_seed(1)
    x_T = decoder.diffusion.q_sample(
        images, torch.full((2,), 999), torch.randn(images.shape, generator=generator)
    )
    expected = decoder.sample(z_img, tokens, x_T=x_T, generator=generator)
    assert torch.equal(
        where_lost.draw_on(decoder, images, z_img, tokens, 999, torch.Generator().manual_seed(1)),
        expected,
    )

    def perfect(x, t):
        """A network that knows the picture."""
        asked.append(t[0].item())
        seen.append(x)
        return decoder.diffusion.interpret(
            images.repeat(1, 2, 1, 1), x, t, "x_start", learned_variance=True, clip=1.0
        )

    asked, seen, decoder.denoiser = [], [], lambda *_: perfect
    drawn = where_lost.draw_on(
        decoder, images, z_img, tokens, 400, torch.Generator().manual_seed(2)
    )
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        seen[0], decoder.diffusion.q_sample(images, torch.full((2,), 285), noise)
    ) and torch.allclose(drawn, images, atol=1e-4)
    assert asked == [285, 143, 0], "those of the eight steps that are not above 400"
