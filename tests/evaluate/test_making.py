"""Recipes are made as they say: each picture's own noise, inversions, moves of z_img."""

import pytest
import torch

from mini_dalle2.evaluate.experiments import EXPERIMENTS
from mini_dalle2.evaluate.lab import Lab
from mini_dalle2.evaluate.making import Maker
from mini_dalle2.evaluate.recipes import Embed, Sampled
from mini_dalle2.pipeline import DALLE2
from mini_dalle2.runtime.files import load_checkpoint, save_checkpoint

SHAPES = [name for name, one in EXPERIMENTS.items() if one.data != "folder"]


def test_recipes_say_what_is_needed_before_it_is_drawn(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    maker = Maker(lab)
    for name in SHAPES:
        needs = EXPERIMENTS[name].needs(lab)
        assert maker.missing(needs.values()) == [], name
        assert all(maker.timing.seconds(maker.settled(recipe)) >= 0 for recipe in needs.values())
    assert [
        type(one).__name__ for one in maker.ingredients(Sampled(4, z="diffusion", x_T="inverted"))
    ] == ["Embed", "Inverted", "Sampled"]
    cfg = lab.model.decoder.cfg
    assert maker.settled(Sampled(16)) == maker.settled(
        Sampled(16, guidance=cfg.guidance, steps=cfg.sampling_steps)
    ), "said or not, it is the same"


def test_priors_are_judged_by_z_img_of_their_own(evaluated, monkeypatch):
    """Not by the best of several sketches: neither the paper nor GLIDE has sketches."""
    lab = Lab(evaluated, 16, "cpu")
    maker = Maker(lab)
    monkeypatch.setattr(DALLE2, "choose", lambda *_: pytest.fail("a sketch was looked at"))
    for prior in ("diffusion", "ar"):
        z_img = maker.make_embeddings(Embed(8, prior=prior))
        assert lab.model.has_sketch and z_img.shape == (8, lab.model.clip.cfg.clip_dim)


def test_each_picture_of_a_crowd_has_noise_of_its_own_and_keeps_it(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    maker = Maker(lab)
    a, b, other = (
        maker.make_pictures(maker.settled(Sampled(n, seed=seed)))
        for n, seed in ((4, 0), (6, 0), (4, 1))
    )
    assert (a.int() - b[:4].int()).abs().max() <= 1 and not torch.equal(a, other)
    ancestral = maker.make_pictures(maker.settled(Sampled(4, rule="ancestral")))
    assert not torch.equal(maker.make_pictures(maker.settled(Sampled(4, rule=0.0))), ancestral)


def test_inversion_and_moves(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    maker = Maker(lab)
    n = 4
    true = lab.real()[0][:n].float()
    both = maker.make_pictures(
        maker.settled(Sampled(2 * n, z="true", told=False, guidance=1.0, rule=0.0, x_T="inverted"))
    ).float()
    back = both[:n]
    ends = [
        maker.make_pictures(
            maker.settled(
                Sampled(
                    n,
                    z="true",
                    told=False,
                    guidance=1.0,
                    rule=0.0,
                    x_T="inverted",
                    move=("between", theta),
                )
            )
        ).float()
        for theta in (0, 1)
    ]
    assert (ends[0] - back).abs().max() <= 1 and (ends[1] - both[n:]).abs().max() <= 1
    assert (back - true).abs().mean() < (back.roll(1, 0) - true).abs().mean()
    full = maker.make(Embed(n, prior="true"))
    assert torch.allclose(
        lab.model.ar_prior.codes.project(full, lab.model.clip.cfg.clip_dim), full, atol=1e-5
    )


@pytest.mark.parametrize("damage", ["one bit", "a number that is not finite"])
def test_a_damaged_file_of_the_cache_is_made_again(copied, damage):
    maker = Maker(Lab(copied, 16, "cpu"))
    recipe = maker.settled(Embed(16, prior="true"))
    whole = maker.load_or_make(recipe)
    path = maker.place(recipe)
    if damage == "one bit":
        data = bytearray(path.read_bytes())
        data[data.index(whole.numpy().tobytes()) + 5] ^= 1
        path.write_bytes(data)
    else:
        save_checkpoint(load_checkpoint(path) | {"made": whole / 0}, path)
    assert torch.equal(maker.load_or_make(recipe), whole)
    assert torch.equal(load_checkpoint(path, "cache")["made"], whole)
