"""Caption files that are understood in part: what is kept, and what is said about the rest."""

import builtins

import pytest

from mini_dalle2.data.captions import NO_COLUMN, NOT_UNDERSTOOD, read_metadata, read_sidecar


def test_a_line_without_a_file_name_is_shown_one_that_has():
    content = b'{"file_name": "a.png", "text": "a"}\n{"text": "b"}\n\n[1]\n{"file_name": 3, "text": "c"}\n'
    entries, bad = read_metadata("metadata.jsonl", content)
    assert entries == [("a.png", ["a"])]
    assert [(place, reason) for place, reason, _ in bad] == [
        (f"metadata.jsonl line {i}", NOT_UNDERSTOOD) for i in (2, 4, 5)]
    assert bad[0][2] == "no file_name" and '{"file_name": "tom.png", "text": "a grey cat"}' in NOT_UNDERSTOOD


@pytest.mark.parametrize("name, content, wanted", [
    ("metadata.csv", b"id,text\n1,a\n2,b\n", "pictures' names"),
    ("metadata.csv", b"file_name,label\na.png,3\n", "captions"),
    ("metadata.jsonl", b'{"file_name": "a.png", "label": 3}\n', "captions"),
    ("metadata.jsonl", b'{"id": "a.png", "text": "b"}\n', "pictures' names"),
])
def test_where_no_column_fits_the_columns_are_named(name, content, wanted):
    _, bad = read_metadata(name, content)
    assert [(place, reason) for place, reason, _ in bad] == [(name, NO_COLUMN)]
    columns = content.split(b"\n")[0].decode() if name.endswith("csv") else None
    assert bad[0][2].startswith(wanted)
    for column in (columns or "file_name,label" if "label" in str(content) else columns or "id,text").split(","):
        assert column in bad[0][2]


def test_a_missing_caption_is_no_mistake_of_the_file():
    assert read_metadata("metadata.jsonl", b'{"file_name": "a.png", "text": null}') == ([("a.png", [])], [])
    # Another column may have what the first lacks.
    both = b'{"file_name": "a.png", "text": null, "caption": "a cat"}'
    assert read_metadata("metadata.jsonl", both) == ([("a.png", ["a cat"])], [])
    assert read_metadata("metadata.csv", b"file_name,text\na.png,\nb.png,b,,\n") == ([("a.png", []), ("b.png", ["b"])], [])


def test_a_caption_with_a_comma_and_no_quotes_is_not_cut_short():
    entries, bad = read_metadata("metadata.csv", b"file_name,text\na.png,red, not blue\nb.png,b\n")
    assert entries == [("b.png", ["b"])]
    assert [(place, reason) for place, reason, _ in bad] == [("metadata.csv line 2", NOT_UNDERSTOOD)]
    assert bad[0][2] == "more cells than headings: a caption with ',' needs quotes"


def test_the_name_of_a_table_may_be_in_capitals():
    assert read_metadata("METADATA.CSV", b"file_name,text\na.png,a\n") == ([("a.png", ["a"])], [])


def test_parquet_without_pyarrow_names_the_install(monkeypatch):
    load = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: load(
        "no_such_module" if name == "pyarrow" else name, *rest))
    entries, bad = read_metadata("metadata.parquet", b"")
    assert entries == [] and bad[0][1:] == ("captions cannot be read", "reading it needs pyarrow: pip install pyarrow")


@pytest.mark.parametrize("name, content", [
    ("metadata.parquet", b"no parquet"), ("metadata.csv", "file_name,text\na.png,Bär\n".encode("latin-1"))])
def test_a_damaged_table_is_reported(name, content):
    entries, bad = read_metadata(name, content)
    assert entries == [] and [(place, reason) for place, reason, _ in bad] == [(name, "captions cannot be read")]


def test_side_cars():
    assert read_sidecar(".txt", b"\xef\xbb\xbf one \r\n\r\ntwo") == ["one", "two"]
    assert read_sidecar(".json", b'{"caption": "one", "width": 3}') == ["one"]
    for other in (b'{"shapes": []}', b"[1]", b"{", b'{"caption": null}', b"7"):
        assert read_sidecar(".json", other) == []
    with pytest.raises(ValueError):
        read_sidecar(".txt", "Bär".encode("latin-1"))
