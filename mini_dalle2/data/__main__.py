"""python -m mini_dalle2.data emoji --out FOLDER: build the set of emoji."""

import sys


def main(argv):
    """python -m mini_dalle2.data emoji --out FOLDER: builds the set of emoji. Returns an exit code."""
    from . import emoji
    if argv[:1] == ["emoji"]:
        return emoji.main(argv[1:])
    print("data: there is one set to build: python -m mini_dalle2.data emoji --out FOLDER", file=sys.stderr)
    return 2
