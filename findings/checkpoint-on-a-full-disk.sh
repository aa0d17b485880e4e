#!/usr/bin/env bash
# On a full disk, torch.save raises OSError or RuntimeError, and it depends on the free bytes which.
#
# Expected: the OSError of the file that has no room, as from any other write in Python.
# Seen: of 29 sizes at which a checkpoint of 1.4 MB breaks off, 26 raise RuntimeError ("unexpected
#   pos ..."). torch's writer of zip archives fails a second time while the OSError passes through
#   it. The OSError is still there, as the RuntimeError's __context__.
# Versions: torch 2.13.0, Python 3.11, Linux.
# For a user: `except OSError` around torch.save misses most full disks, and the message that is
#   left says nothing about a disk. So catch RuntimeError too, and look at its __context__.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0
"${pip[@]}" numpy==2.4.6

cat > "$work/look.py" <<'PY'
import collections
import os
import platform
import resource
import sys

import torch

print(f"torch {torch.__version__}, Python {platform.python_version()}")
weights = {f"layer{i}": torch.zeros(30_000) for i in range(12)}
path = sys.argv[1]


def save(room):
    """Save where a file may have `room` bytes, in a process of its own: what was raised."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        with open(path, "wb") as file:
            torch.save(weights, file)
            file.flush()
    except OSError:
        code = 1
    except RuntimeError as error:
        code = 2 if isinstance(error.__context__, OSError) else 3
    os._exit(code)


names = ["nothing", "OSError", "RuntimeError over an OSError", "RuntimeError alone"]
found = collections.Counter(names[save(room)] for room in range(500, 1_450_000, 50_000))
for name, count in found.most_common():
    print(f"{count:3} of {sum(found.values())} sizes: {name}")
print(f"with room for all: {names[save(10_000_000)]}")
still = (found["OSError"] > 0 and found["RuntimeError over an OSError"] > 10
         and found["nothing"] == found["RuntimeError alone"] == 0)
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" "$work/look.py" "$work/checkpoint.pt"
