"""A folder of real pictures: concepts, nearest training pictures, and the whole command."""

import json
import math
import os

import pytest
import torch
from PIL import Image, ImageDraw

import train
from conftest import SMALL, train_variants
from mini_dalle2.evaluate import report
from mini_dalle2.evaluate.command import known, main
from mini_dalle2.evaluate.experiments import EXPERIMENTS
from mini_dalle2.evaluate.lab import Lab
from mini_dalle2.evaluate.making import Maker
from mini_dalle2.evaluate.real_pictures import concept_of, concepts_found, nearest


def test_concepts_are_told_apart_within_their_style():
    assert concept_of("tiger, noto style") == ("tiger", ", noto style") and concept_of(
        "a cat, asleep"
    ) == ("a cat, asleep", "")

    class Judge:
        memory = {}

        def remembered(self, key, make):
            return make()

        def embed_captions(self, captions):
            return torch.eye(2)[[int("dog" in caption) for caption in captions]]

    z = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    assert concepts_found(
        Judge(), z, ["cat, a style", "cat, b style", "dog, a style"], ["cat", "dog"]
    ).tolist() == [True, False, True]


def test_the_nearest_training_picture():
    table = torch.randint(
        0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pictures = table[[7, 31]].clone()
    pictures[1, 0, 0, 0] ^= 8
    index, far = nearest(pictures, table)
    assert (
        index.tolist() == [7, 31] and far[0] == 0 and far[1] == pytest.approx(math.sqrt(64 / 192))
    )


def test_a_folder_of_real_pictures(tmp_path, capsys):
    """Two styles of eight concepts, with held-out pictures in a folder of their own.

    Everything that real pictures allow runs.
    """
    for split, things in (("train", 24), ("val", 16), ("held_out", 16)):
        (tmp_path / "set" / split).mkdir(parents=True)
        lines = []
        for i in range(things):
            picture = Image.new("RGB", (32, 32), "white")
            ImageDraw.Draw(picture).ellipse(
                (4 + i % 8, 4, 20, 28 - i % 5), fill=(30 * (i % 8), 90, 200 - 20 * (i % 3))
            )
            picture.save(tmp_path / "set" / split / f"{i}.png")
            lines.append(
                json.dumps(
                    {
                        "file_name": f"{i}.png",
                        "text": f"thing {'abcdefgh'[i % 8]}, {('flat', 'round')[i // 8 % 2]} style",
                    }
                )
            )
        (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "run"
    assert (
        train.main(
            [*SMALL, f"--data={tmp_path / 'set'}", f"--out={folder}", "--data.val_images=16"]
        )
        == 0
    )
    train_variants(folder)
    assert main([f"--run={folder}", "--n=16", "--device=cpu", "--only", "pictures", "fig8"]) == 0
    text = (folder / "report.md").read_text()
    assert "among 8 concepts" in text and "one in 8" in text and "efficientnet" in text.lower()
    assert (folder / "evaluate" / "pictures.png").is_file() and (
        folder / "evaluate" / "pictures_nearest.png"
    ).is_file()
    assert "Not done yet: priors" in text and "textdiff" not in text and "8 captions;" in text, (
        "half of sixteen: the others are the measure"
    )
    lab, one = Lab(folder, 16, "cpu"), EXPERIMENTS["pictures"]
    assert (
        known(Maker(lab), one) is not None
        and lab.others().captions == lab.real()[1][8:]
        and lab.part(1, "held_out") == 8
    )
    page = tmp_path / "results.md"
    page.write_text("a\n<!-- evaluate set: begin -->\n<!-- evaluate set: end -->\nb\n")
    report.write_results(lab, page, "set", {"pictures": known(Maker(lab), one)}, {}, "a command")
    assert (
        "the judge finds what it shows" in page.read_text()
        and (tmp_path / "images/evaluate_set_pictures.png").is_file()
    )
    os.utime(tmp_path / "set" / "held_out" / "0.png", (0, 0))
    lab = Lab(folder, 16, "cpu")
    assert known(Maker(lab), one) is None and not lab.cache.exists(), "another file"
    assert lab.signature_of("judge"), "but the judge learned from what the run learned from"
    capsys.readouterr()
    assert main([f"--run={folder}", "--n=16", "--device=cpu", "--only", "textdiff"]) == 2
    assert "captioned shapes" in capsys.readouterr().err
