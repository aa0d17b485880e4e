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


@pytest.mark.parametrize("train, val, test", [
    ("images/train", "images/val", "images/test"), ("train2017", "val2017", "test2017"),
    ("train_images", "my val", "test-images"), ("train.zip", "valid.zip", "test.zip"),
    ("train-00000.tar", "dev-00000.tar", "eval-00000.tar"), ("cats/train", "cats/val", "dogs/test")])
def test_folders_that_lie_deeper_or_are_named_with_more_words(train, val, test):
    names = [f"{train}/a.png", f"{val}/b.png", f"{test}/c.png", "contest/d.png", "trained/test.png"]
    assert list(chosen(names).values()) == ["train", "val", "test", "", ""]


def test_a_subject_called_train_is_no_split():
    names = [f"{subject}/{i}.png" for subject in ("train", "car", "boat") for i in range(3)]
    assert set(chosen(names).values()) == {"train"}


def test_without_a_validation_folder_training_pictures_are_lent_and_test_pictures_never():
    names = [f"{folder}/{i}.png" for folder in ("train", "test") for i in range(140)]
    found = chosen(names)
    assert {found[f"test/{i}.png"] for i in range(140)} == {"test"}
    assert {found[f"train/{i}.png"] for i in range(140)} == {"train", "val"}


def test_a_subject_called_test_is_no_split():
    names = [f"{subject}/{i}.png" for subject in ("test", "dev", "cats") for i in range(3)]
    assert set(chosen(names).values()) == {"train"}


def test_a_training_picture_stays_one_when_the_set_grows():
    """From 100 to 5,000 pictures in any order: what was trained on once is never called unseen."""
    names = [f"{(i * 7919) % 5000}.png" for i in range(5000)]
    before = chosen(names[:100], most=20)
    for n in (101, 102, 130, 400, 1000, 5000):
        now = chosen(names[:n], most=20)
        assert all(now[name] == "train" for name, was in before.items() if was == "train")
        spared = sum(was == "val" for was in now.values())
        assert 1 <= spared <= 40
        before = now


def test_a_tenth_is_spared_and_of_a_few_none():
    names = [f"{i}.png" for i in range(4000)]
    assert 320 < sum(was == "val" for was in chosen(names).values()) < 480
    assert set(chosen(names[:99]).values()) == {"train"}
    for seed in range(20):
        assert "val" in chosen(names[:100], seed=seed).values()
    assert chosen(names, seed=1) != chosen(names, seed=2)
