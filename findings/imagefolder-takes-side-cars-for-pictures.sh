#!/usr/bin/env bash
# datasets' imagefolder takes a caption file "tom.png.txt" for a picture, and cannot be read then.
#
# Expected: imagefolder looks at the end of a file's name. A caption beside its picture, whether
#   "tom.txt" or "tom.png.txt" (several labelling tools write the second), is left alone.
# Seen: the loader also looks at the ending before the last one. "tom.png.txt" counts as a picture.
#   Loading succeeds and counts two rows. Reading the second row raises UnidentifiedImageError.
#   "tom.txt" is left alone, and so is "tom.caption".
# Versions: datasets 5.2.0, Pillow 13.0.0, Python 3.11.
# For a user: rename side-car files to "tom.txt", or write a metadata.csv: then only the pictures
#   that it names are read, and the same folder loads.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    datasets==5.2.0 pillow==13.0.0

cat > "$work/look.py" <<'PY'
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(dir=sys.argv[1])
import datasets
import PIL
from PIL import Image

datasets.disable_progress_bars()
print(f"datasets {datasets.__version__}, Pillow {PIL.__version__}, "
      f"Python {platform.python_version()}")


def read(*sidecars, table=False):
    """(rows, what reading all of them gives) of a folder with tom.png and these files."""
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    Image.new("RGB", (8, 8), "red").save(folder / "tom.png")
    for name in sidecars:
        (folder / name).write_text("a red sheet")
    if table:
        (folder / "metadata.csv").write_text("file_name,text\ntom.png,a red sheet\n")
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    try:
        return len(rows), [row["image"].size for row in rows]
    except Exception as error:
        return len(rows), type(error).__name__


found = {
    "tom.txt": read("tom.txt"),
    "tom.caption": read("tom.caption"),
    "tom.png.txt": read("tom.png.txt"),
    "tom.png.txt and metadata.csv": read("tom.png.txt", table=True),
}
for name, (rows, result) in found.items():
    print(f"{name:30} {rows} rows: {result}")
good = (1, [(8, 8)])
still = (found["tom.txt"] == found["tom.caption"] == good
         and found["tom.png.txt"] == (2, "UnidentifiedImageError")
         and found["tom.png.txt and metadata.csv"] == good)
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" -W ignore "$work/look.py" "$work"
