"""The README's list of what differs from the paper, made of the comments `# mini:` beside the code.

    python tests/deviations.py          writes it into the README, between its two marks; test_readme.py fails where it is not up to date

A comment goes on over the following lines that are comments and nothing else, up to the next `# mini:`. One behind a field's default is about that field.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from mini_dalle2.evaluate.report import README, split_readme          # noqa: E402
from mini_dalle2.runtime.files import atomic_open          # noqa: E402


def deviations(source):
    """What the `# mini:` comments of a Python file say, in order: list of str."""
    found, going = [], False
    for line in source.splitlines():
        before, mark, said = line.partition("# mini: ")
        if mark:
            field = re.match(r"\s*(\w+): ", before)
            found.append((f"`{field[1]}`: " if field else "") + said)
            going = not before.strip()
        elif going and (more := re.match(r"\s*# (.*)", line)):
            found[-1] += " " + more[1]
        else:
            going = False
    return found


def listed():
    """The list, as markdown: one item a file of the package, and beneath it one for each of its marks."""
    lines = []
    for path in sorted((ROOT / "mini_dalle2").glob("*.py")):
        found = deviations(path.read_text(encoding="utf-8"))
        if found:
            lines += [f"- [{path.name}](mini_dalle2/{path.name})", *(f"  - {text}" for text in found)]
    return "\n".join(lines) + "\n"


def updated():
    """The README's text with the list in its place."""
    before, behind = split_readme(README, "deviations")
    return f"{before}\n\n{listed()}\n{behind}"


if __name__ == "__main__":
    text = updated()
    with atomic_open(README) as file:
        file.write(text.encode())
