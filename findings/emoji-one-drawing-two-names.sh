#!/usr/bin/env bash
# Emoji sets of IconifyJSON hold the same drawing twice: once as a person, once as a man or woman.
#
# Expected: each entry of "icons" is a drawing of its own. The format has a list "aliases" for
#   other names of a drawing, and these sets use it. So icon names can serve as captions.
# Seen: noto-v1 holds 188 drawings twice, equal to the last byte, 33 without counting skin tones.
#   Both names are entries of their own. In each pair just one name tells a man or a woman:
#   "person-running" is "man-running", but "person-shrugging" is "woman-shrugging".
#   Openmoji has 167 drawings under several names. Twemoji has one drawing for eight families.
#   Fluent-emoji-flat draws "cat-face" as "grinning-cat".
# Versions: @iconify-json/ noto-v1 1.2.5, openmoji 1.2.29, twemoji 1.2.5, fluent-emoji-flat 1.2.6,
#   read with Python 3.11 (its standard library alone). The script needs npm.
# For a user: captions made from these names contradict each other. A model sees one picture as
#   "man" and as "woman" or "person". A split by name puts one picture into training and test.
#   Compare the bodies, or the drawn pixels, before splitting; alias lists are not enough.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for package in noto-v1@1.2.5 openmoji@1.2.29 twemoji@1.2.5 fluent-emoji-flat@1.2.6; do
    npm pack "@iconify-json/$package" --loglevel=error --cache "$work/cache" > /dev/null
done

cat > look.py <<'PY'
import json
import platform
import re
import sys
import tarfile
from collections import defaultdict

PACKAGES = {"noto-v1": "1.2.5", "openmoji": "1.2.29", "twemoji": "1.2.5",
            "fluent-emoji-flat": "1.2.6"}


def shared(pack):
    """Groups of names, not hidden, whose drawings are equal in every byte and measure."""
    groups = defaultdict(list)
    for name, icon in pack["icons"].items():
        if not icon.get("hidden"):
            groups[json.dumps(icon, sort_keys=True)].append(name)
    return [sorted(names) for names in groups.values() if len(names) > 1]


def tells(name):
    """Whether a name says man, woman, men or women."""
    return re.search(r"\b(wo)?m[ae]n\b", name) is not None


print(f"Python {platform.python_version()}")
found = {}
for package, version in PACKAGES.items():
    with tarfile.open(f"iconify-json-{package}-{version}.tgz") as archive:
        pack = json.load(archive.extractfile("package/icons.json"))
    found[package] = shared(pack)
    print(f"{package} {version}: {len(pack['icons'])} icons, {len(pack.get('aliases', {}))} "
          f"aliases; drawings under several names: {len(found[package])}")

pairs = found["noto-v1"]
mixed = [names for names in pairs if sorted(map(tells, names)) == [False, True]]
print(f"noto-v1: in {len(mixed)} of {len(pairs)} one name tells man or woman, the other does not:")
for names in mixed:
    if not any("skin-tone" in name for name in names):
        print("   ", " = ".join(names))
families = max((names for names in found["twemoji"] if "family" in names), key=len)
print("twemoji:", " = ".join(families))
print("fluent-emoji-flat:", *(" = ".join(names) for names in found["fluent-emoji-flat"]))

still = (len(pairs) == len(mixed) == 188 and len(found["openmoji"]) == 167 and len(families) == 8
         and ["man-running", "person-running"] in pairs
         and ["person-shrugging", "woman-shrugging"] in pairs
         and ["cat-face", "grinning-cat"] in found["fluent-emoji-flat"])
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
python3 look.py
