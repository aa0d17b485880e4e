"""The split of a folder: by the folders' names, else by a hash of each picture's name."""

from pathlib import Path

import pytest

from mini_dalle2.data import split


def chosen(names, most=1000, seed=0):
    return dict(zip(names, split.splits([Path("root", name) for name in names], "root", most, seed)))


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev"])
@pytest.mark.parametrize("test", ["test", "testing", "eval", "held_out"])
def test_folders_are_named_as_people_name_them(train, val, test):
    names = [f"{train}/a.png", f"{train}/cats/b.png", f"{val}/c.png", f"{test}/d.png", "thumbs/e.png", "f.png"]
    assert list(chosen(names).values()) == ["train", "train", "val", "test", "", ""]


def test_without_a_validation_folder_training_pictures_are_lent_and_test_pictures_never():
    names = [f"train/{i}.png" for i in range(40)] + [f"test/{i}.png" for i in range(40)]
    found = chosen(names)
    assert {found[f"test/{i}.png"] for i in range(40)} == {"test"}
    assert {found[f"train/{i}.png"] for i in range(40)} == {"train", "val"}


def test_a_subject_called_test_is_no_split():
    names = [f"{subject}/{i}.png" for subject in ("test", "dev", "cats") for i in range(3)]
    assert set(chosen(names).values()) == {"train"}


def test_a_training_picture_stays_one_when_the_set_grows():
    """From 10 to 5,000 pictures in any order: what was trained on once is never called unseen."""
    names = [f"{(i * 7919) % 5000}.png" for i in range(5000)]
    before = chosen(names[:10], most=20)
    for n in (11, 12, 30, 100, 101, 1000, 5000):
        now = chosen(names[:n], most=20)
        assert all(now[name] == "train" for name, was in before.items() if was == "train")
        spared = sum(was == "val" for was in now.values())
        assert 1 <= spared <= (0.3 * n if n < 100 else 40)
        before = now


def test_a_tenth_is_spared_and_of_a_few_none():
    names = [f"{i}.png" for i in range(4000)]
    assert 320 < sum(was == "val" for was in chosen(names).values()) < 480
    assert set(chosen(names[:9]).values()) == {"train"}
    for seed in range(20):
        assert "val" in chosen(names[:10], seed=seed).values()
    assert chosen(names, seed=1) != chosen(names, seed=2)
