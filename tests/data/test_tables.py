"""Tables: the same pictures in the same order, by one process or several, of shapes or a folder."""

import multiprocessing
import time

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from mini_dalle2.data import tables
from mini_dalle2.data.folder import CaptionedFolder
from mini_dalle2.data.pixels import to_float, to_uint8
from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.data.tables import load_table


def test_load_table_matches_one_by_one(capsys):
    dataset = CaptionedShapes("val", 32, length=70)
    table, texts = load_table(dataset, progress=False)
    assert (
        table.shape == (70, 3, 32, 32)
        and table.dtype == torch.uint8
        and capsys.readouterr().err == ""
    )
    for i in (0, 31, 32, 69):
        assert (
            torch.equal(to_float(table[i]), dataset[i]["image"]) and texts[i] == dataset[i]["text"]
        )
    some, words = load_table(Subset(dataset, [4, 2]), progress=False)
    assert torch.equal(some, table[[4, 2]]) and words == [texts[4], texts[2]]
    with pytest.raises(ValueError, match="empty"):
        load_table(Subset(dataset, []))


class Slow(CaptionedShapes):
    """So slow in this process that others are worth their start; counts how often it is asked."""

    asked = 0

    def __getitem__(self, index):
        if multiprocessing.parent_process() is None:
            Slow.asked += 1
            time.sleep(0.05)
        return super().__getitem__(index)


def test_load_table_over_processes(monkeypatch):
    """The same table, in the same order, from several processes."""
    monkeypatch.setattr(tables.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    table, texts = load_table(Slow("val", 32, length=320), progress=False)
    plain = CaptionedShapes("val", 32, length=320)
    assert Slow.asked < 50, "the rest was drawn elsewhere"
    assert texts == [plain.scene(i).text for i in range(320)]
    assert all(torch.equal(table[i], to_uint8(plain[i]["image"])) for i in range(0, 320, 7))


def test_into_a_table(tmp_path):
    for i in range(5):
        Image.new("RGB", (30, 20), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    table, texts = load_table(CaptionedFolder(tmp_path, 8), progress=False)
    assert table[:, 0, 4, 4].tolist() == [0, 50, 100, 150, 200] and texts == [
        f"number {i}" for i in range(5)
    ]
