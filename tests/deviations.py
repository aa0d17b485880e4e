"""Write notebooks/differences.md from the comments `# mini:` in the package.

    python tests/deviations.py

A comment continues on the following lines that hold only a comment, up to the next `# mini:`.
A comment behind a field's default is about that field.
test_readme.py fails while the page is not up to date.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mini_dalle2.runtime.files import atomic_open          # noqa: E402

PACKAGE = ROOT / "mini_dalle2"
PAGE = ROOT / "notebooks" / "differences.md"
HEAD = """\
# Differences from the paper

This page lists every place where the code differs from the paper, or where the paper is silent and we had to choose.
`python tests/deviations.py` writes the page from the comments `# mini:` in the code.
Most differences are what a small budget needs, and a preset chooses them.
"""


def deviations(source):
    """Return what the `# mini:` comments of a Python source say, in order, as a list of str."""
    found = []
    continues = False
    for line in source.splitlines():
        before, mark, said = line.partition("# mini: ")
        if mark:
            field = re.match(r"\s*(\w+): ", before)
            found.append((f"`{field[1]}`: " if field else "") + said)
            continues = not before.strip()
        elif continues and (more := re.match(r"\s*# (.*)", line)):
            found[-1] += " " + more[1]
        else:
            continues = False
    return found


def files():
    """Return the package's Python files: the ground floor first, then the wings by name."""
    return sorted(PACKAGE.rglob("*.py"), key=lambda path: (len(path.parts), path.as_posix()))


def capital(text):
    """Return a text with a capital at its start, unless it starts with a name such as z_img."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]+[ ,:;'.]", text) else text


def page():
    """Return the text of the page: a heading for each file, and an item for each of its marks."""
    parts = [HEAD]
    for path in files():
        if found := deviations(path.read_text(encoding="utf-8")):
            name = path.relative_to(PACKAGE).as_posix()
            parts.append(f"## [{name}](../mini_dalle2/{name})\n")
            parts.append("".join(f"- {capital(text)}\n" for text in found))
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    with atomic_open(PAGE) as file:
        file.write(text.encode())
