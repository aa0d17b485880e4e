"""Folders as people have them, read by Hugging Face's `datasets` and by CaptionedFolder.

A picture has one colour, which tells it from the others. Either both read the same pictures with
the same captions, or the table says why not.
"""

import io
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from mini_dalle2.data.captions import TEXT_COLUMNS
from mini_dalle2.data.folder import CaptionedFolder

CAPTIONS = {"red": "a red sheet", "green": "a green sheet", "blue": "a blue sheet"}
COLOURS = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}


def picture(colour, kind="PNG"):
    """The bytes of a small picture."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, kind)
    return file.getvalue()


def pictures(where="{}.png", kind="PNG"):
    """Three pictures: {name: bytes}."""
    return {where.format(colour): picture(colour, kind) for colour in CAPTIONS}


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def rows(file="file_name", text="text", where="{}.png", captions=CAPTIONS):
    """Rows of a table, one for each picture."""
    return [{file: where.format(colour), text: caption} for colour, caption in captions.items()]


def table(heading, *lines):
    return "\n".join((heading, *lines)).encode()


def parquet(entries):
    from pyarrow import Table, parquet
    file = io.BytesIO()
    parquet.write_table(Table.from_pylist(entries), file)
    return file.getvalue()


def tar(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def beside(ending, where="{}"):
    return {where.format(colour) + ending: caption.encode() for colour, caption in CAPTIONS.items()}


CSV = table("file_name,text", *(f"{colour}.png,{caption}" for colour, caption in CAPTIONS.items()))
DATES = dict(zip(CAPTIONS, ("2024-05-01", "2024-05-02", "1999-12-31")))
# What `datasets` does not read. The layout's name, and why.
NO_SIDECARS = "imagefolder reads no files beside the pictures"
OTHER_COLUMN = "imagefolder wants the column file_name"
ONE_FILE = "imagefolder leaves out pictures that no metadata file names"

# The captions of layouts that have others than CAPTIONS.
OWN = {
    "captions that look like dates": DATES,
    "captions in CSV that look like numbers": {"red": "1", "green": "007", "blue": "1e3"},
    "the caption NA in CSV": {"red": "NA"},
}

# name: (files, the reason why `datasets` reads something else, or None)
LAYOUTS = {
    "metadata.jsonl": (pictures() | {"metadata.jsonl": jsonl(*rows())}, None),
    "metadata.csv": (pictures() | {"metadata.csv": CSV}, None),
    "metadata.parquet": (pictures() | {"metadata.parquet": parquet(rows())}, None),
    "the column caption": (pictures() | {"metadata.jsonl": jsonl(*rows(text="caption"))}, None),
    "the column prompt": (pictures() | {"metadata.csv": CSV.replace(b",text", b",prompt", 1)}, None),
    "a list of captions": (pictures() | {"metadata.jsonl": jsonl(*(
        {"file_name": f"{colour}.png", "captions": [caption, "a sheet"]}
        for colour, caption in CAPTIONS.items()))}, None),
    "two rows for a picture": (
        pictures() | {"metadata.jsonl": jsonl(*rows(), {"file_name": "red.png", "text": "paint"})}, None),
    "image_file_name": (
        pictures() | {"metadata.jsonl": jsonl(*rows(file="image_file_name"))}, None),
    "the column image": (pictures() | {"metadata.jsonl": jsonl(*rows(file="image"))}, OTHER_COLUMN),
    "captions in subfolders of one table": (
        pictures("deep/er/{}.png") | {"metadata.jsonl": jsonl(*rows(where="deep/er/{}.png"))}, None),
    "a table in each subfolder": ({
        f"{colour}s/{name}": content for colour, caption in CAPTIONS.items() for name, content in (
            (f"{colour}.png", picture(colour)),
            ("metadata.jsonl", jsonl({"file_name": f"{colour}.png", "text": caption})))}, None),
    "train and test, each with its table": ({
        "train/red.png": picture("red"), "train/green.png": picture("green"), "test/blue.png": picture("blue"),
        "train/metadata.jsonl": jsonl(*rows()[:2]), "test/metadata.jsonl": jsonl(rows()[2])}, None),
    "train and test, one table above": ({
        "train/red.png": picture("red"), "train/green.png": picture("green"), "test/blue.png": picture("blue"),
        "metadata.csv": table("file_name,text", "train/red.png,a red sheet", "train/green.png,a green sheet",
                              "test/blue.png,a blue sheet")},
        "datasets looks for the table in the folder of each split"),
    "JPEG with other endings": (
        {"red.jpe": picture("red", "JPEG"), "green.JPEG": picture("green", "JPEG"), "blue.jfif": picture("blue", "JPEG"),
         "metadata.csv": table("file_name,text", "red.jpe,a red sheet", "green.JPEG,a green sheet", "blue.jfif,a blue sheet")},
        None),
    "TGA, PCX and JPEG 2000": (
        {"red.tga": picture("red", "TGA"), "green.pcx": picture("green", "PCX"), "blue.jp2": picture("blue", "JPEG2000"),
         "metadata.csv": table("file_name,text", "red.tga,a red sheet", "green.pcx,a green sheet", "blue.jp2,a blue sheet")},
        None),
    "captions that look like dates": (
        pictures() | {"metadata.jsonl": jsonl(*rows(captions=DATES))},
        "datasets makes a time of a text that looks like a date"),
    "captions in CSV that look like numbers": (
        pictures() | {"metadata.csv": table("file_name,text", "red.png,1", "green.png,007", "blue.png,1e3")},
        "datasets makes numbers of texts that look like numbers"),
    "the caption NA in CSV": (
        pictures() | {"metadata.csv": table("file_name,text", "red.png,NA", "green.png,a green sheet", "blue.png,a blue sheet")},
        "datasets takes NA for a missing value"),
    "commas and quotes in CSV": (
        pictures() | {"metadata.csv": table("file_name,text", 'red.png,"red, not blue"', 'green.png,"a ""green"" sheet"',
                                            "blue.png,a blue sheet")}, None),
    "semicolons in CSV": (
        pictures() | {"metadata.csv": CSV.replace(b",", b";")}, OTHER_COLUMN),
    "a mark of byte order in CSV": (pictures() | {"metadata.csv": b"\xef\xbb\xbf" + CSV}, None),
    "backslashes": (
        pictures("sub/{}.png") | {"metadata.jsonl": jsonl(*rows(where="sub\\{}.png"))}, None),
    "a picture without a row": (pictures() | {"metadata.jsonl": jsonl(*rows()[:2])}, None),
    "a picture without a row, and .txt beside it": (
        pictures() | {"metadata.jsonl": jsonl(*rows()[:2]), "blue.txt": b"a blue sheet"}, ONE_FILE),
    ".txt": (pictures() | beside(".txt"), NO_SIDECARS),
    ".TXT": (pictures() | beside(".TXT"), NO_SIDECARS),
    ".caption": (pictures() | beside(".caption"), NO_SIDECARS),
    ".png.txt": (pictures() | beside(".png.txt"), "imagefolder takes red.png.txt for a picture"),
    "img2dataset, files": (pictures("00000/{}.jpg", "JPEG") | beside(".txt", "00000/{}") | {
        f"00000/{colour}.json": json.dumps({"caption": caption, "status": "success"}).encode()
        for colour, caption in CAPTIONS.items()} | {"00000_stats.json": b"{}"}, NO_SIDECARS),
    "WebDataset .tar": (
        {"00000.tar": tar(dict(sorted((pictures("{}.jpg", "JPEG") | beside(".txt")).items())))}, None),
    "captions in the .json of a .tar": (
        {"00000.tar": tar(dict(sorted((pictures() | {
            f"{colour}.json": json.dumps({"caption": caption}).encode()
            for colour, caption in CAPTIONS.items()}).items())))}, None),
    "a .zip with its table": (
        {"all.zip": zipped(pictures() | {"metadata.jsonl": jsonl(*rows())})}, None),
}


@pytest.fixture(scope="module")
def imagefolder(tmp_path_factory):
    """imagefolder(folder): what `datasets` reads, as {colour: captions}; [None] where it finds no caption.

    It has two loaders: imagefolder, and webdataset for archives.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets
        datasets.disable_progress_bars()

        def read(folder):
            found = {}
            archives = [str(path) for path in folder.glob("*.tar")]
            if archives:
                sets = datasets.load_dataset("webdataset", data_files=archives, streaming=True)
            else:
                sets = datasets.load_dataset("imagefolder", data_dir=str(folder), streaming=True)
            for row in (row for split in sets.values() for row in split):
                image = next(row[key] for key in ("image", "jpg", "png") if key in row)
                # webdataset names a column after each ending.
                row |= row.get("json") or {}
                name = next((name for name in (*TEXT_COLUMNS, "txt") if name in row), None)
                texts = row[name] if name else None
                found.setdefault(colour_of(image), []).extend(texts if isinstance(texts, list) else [texts])
            return found

        yield read


def colour_of(image):
    """The name of the colour that is nearest to a picture's middle."""
    pixel = image.convert("RGB").getpixel((image.width // 2, image.height // 2))
    return COLOURS[min(COLOURS, key=lambda colour: sum((a - b) ** 2 for a, b in zip(colour, pixel)))]


def ours(folder):
    """What CaptionedFolder reads, as {colour: captions}."""
    from mini_dalle2.data.pixels import to_pil
    data = CaptionedFolder(folder, 8)
    return {colour_of(to_pil(data[i]["image"])): data.texts(i) for i in range(len(data))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_pictures_and_captions(name, tmp_path, imagefolder):
    files, reason = LAYOUTS[name]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    found = ours(tmp_path)
    try:
        theirs = imagefolder(tmp_path)
    except Exception as error:
        theirs = f"{type(error).__name__}: {error}"
    if reason is None:
        assert found == theirs
    else:
        assert found != theirs, "no longer different: the reason must go"
        right = CAPTIONS | OWN.get(name, {})
        assert found == {colour: [caption] for colour, caption in right.items()}
