"""Pictures that commands write: each has a name of its own, and a bad place is known before work."""

import os

import pytest

from mini_dalle2.runtime.pictures import samples_file


def test_each_sheet_gets_the_next_number(tmp_path):
    samples = tmp_path / "samples"
    assert samples_file(tmp_path, "text") == samples / "text-001.png" and not samples.exists()
    samples.mkdir()
    # Single pictures keep their sheet's number, though somebody deleted the sheet.
    for name in ("text-003.png", "text-007-1-2.png", "textdiff-050.png", "text-x.png", "text-9.txt"):
        (samples / name).touch()
    assert samples_file(tmp_path, "text") == samples / "text-008.png"
    assert samples_file(tmp_path, "textdiff") == samples / "textdiff-051.png"
    (samples / "text-999.png").touch()
    assert samples_file(tmp_path, "text") == samples / "text-1000.png"


def test_a_place_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "samples").touch()
    with pytest.raises(ValueError, match="samples is not a folder: name another file with --out"):
        samples_file(tmp_path, "text")
    (tmp_path / "samples").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match="cannot be written: name a file elsewhere with --out"):
        samples_file(tmp_path, "text")
