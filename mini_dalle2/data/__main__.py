"""The command `python -m mini_dalle2.data emoji --out FOLDER`: build the set of emoji.

Read next: emoji.py.
"""

import sys

from . import emoji


def main(argv):
    """Build the set that the command line names, and return an exit code."""
    if argv[:1] == ["emoji"]:
        return emoji.main(argv[1:])
    print("data: the one set to build is emoji: use python -m mini_dalle2.data emoji --out FOLDER",
          file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
