#!/usr/bin/env bash
# Pillow scales the pixels of a PNG to 8 bits, but not the value that the file calls transparent.
#
# Expected: a PNG of 2, 4 or 16 bits without an alpha channel may name one value as transparent
#   (chunk tRNS). convert("RGBA") makes the pixels of this value transparent, as browsers do.
# Seen: with 1 and 8 bits it does. Grey of 2 and 4 bits is scaled to 0..255, and the transparent
#   value stays 0..15: other pixels, or none, become transparent. RGB of 16 bits is cut to 8 bits,
#   and only the low half of each value is compared. Grey of 16 bits stays opaque.
# Versions: Pillow 13.0.0, Python 3.11.
# For a user: small icons and scanned drawings get a background that should not be there. Scale
#   image.info["transparency"] before the picture is read: image.tile says how many bits it has.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0

cat > "$work/look.py" <<'PY'
import io
import platform
import struct
import sys
import zlib

import PIL
from PIL import Image

print(f"Pillow {PIL.__version__}, Python {platform.python_version()}")


def png(depth, colour, row, transparent):
    """A PNG of one row; colour: 0 grey, 2 RGB."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))
    width = len(row) * 8 // (depth * (3 if colour else 1))
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", transparent)
            + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


# In each, the second of the pixels has the transparent value.
pictures = {
    "grey, 1 bit": png(1, 0, bytes([0b01000000]), struct.pack(">H", 1)),
    "grey, 2 bits": png(2, 0, bytes([0b00011011]), struct.pack(">H", 1)),
    "grey, 4 bits": png(4, 0, bytes([0x12, 0x3F]), struct.pack(">H", 2)),
    "grey, 8 bits": png(8, 0, bytes([1, 2, 3, 4]), struct.pack(">H", 2)),
    "grey, 16 bits": png(16, 0, struct.pack(">4H", 1, 1000, 3, 4), struct.pack(">H", 1000)),
    "RGB, 8 bits": png(8, 2, bytes([1, 1, 1, 2, 3, 4]), struct.pack(">3H", 2, 3, 4)),
    "RGB, 16 bits": png(16, 2, struct.pack(">6H", 1, 1, 1, 1000, 2000, 3000),
                        struct.pack(">3H", 1000, 2000, 3000)),
}
right = {}
for name, content in pictures.items():
    with Image.open(io.BytesIO(content)) as image:
        alpha = list(image.convert("RGBA").getchannel("A").tobytes())
    right[name] = alpha == [255, 0] + [255] * (len(alpha) - 2)
    print(f"{name:14} alpha {alpha}: {'right' if right[name] else 'wrong'}")
wrong = [name for name, is_right in right.items() if not is_right]
still = wrong == ["grey, 2 bits", "grey, 4 bits", "grey, 16 bits", "RGB, 16 bits"]
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" -W ignore "$work/look.py"
