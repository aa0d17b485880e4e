#!/usr/bin/env bash
# transformers' CLIPTokenizer reads curly quotes as they are; OpenAI's makes them straight.
#
# Expected: the same vocabulary and merges give the same ids, at least for plain English names.
#   OpenAI's tokenizer repairs text with ftfy first. Older versions of transformers did so too,
#   wherever ftfy was installed. Here it is installed.
# Seen: Unicode's English emoji names, 1,949 in emojibase, have curly quotes where they quote.
#   Just the 38 with such a quote get other ids. In "man’s shoe" the ’s is one token of OpenAI's
#   and three of transformers'. French has 58 such names, Italian 45.
#   None of CLIP's 49,408 tokens holds a whole curly quote; 16 hold the three dots in one (…).
#   After ftfy.fix_text all names get the same ids from both.
# Versions: transformers 5.23.0, clip-anytorch 2.6.0 (OpenAI's file), ftfy 6.3.1,
#   emojibase-data 17.0.0, Python 3.11. The script needs npm too.
# For a user: OpenAI's code never hands CLIP a curly quote, transformers does. Phones and editors
#   type such quotes. Run ftfy.fix_text on captions first: installing ftfy no longer does it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" transformers==5.23.0 ftfy==6.3.1 regex==2026.11.19
"${pip[@]}" --no-deps clip-anytorch==2.6.0
cd "$work"
npm pack emojibase-data@17.0.0 --loglevel=error --cache "$work/cache" > /dev/null
tar -xzf emojibase-data-17.0.0.tgz package/{en,fr,it}/data.json

cat > look.py <<'PY'
import gzip
import importlib.util
import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import ftfy
import transformers

print(f"transformers {transformers.__version__}, Python {platform.python_version()}, "
      + ", ".join(f"{name} {metadata.version(name)}" for name in ("clip-anytorch", "ftfy")))

# OpenAI's tokenizer, from its file: importing the whole package would need torch.
package = metadata.distribution("clip-anytorch")
spec = importlib.util.spec_from_file_location(
    "simple_tokenizer", package.locate_file("clip/simple_tokenizer.py"))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
merges_file = package.locate_file("clip/bpe_simple_vocab_16e6.txt.gz")
openai = module.SimpleTokenizer(str(merges_file))

# The same vocabulary and merges as Hugging Face's two files.
folder = Path("tokenizer")
folder.mkdir()
(folder / "vocab.json").write_text(json.dumps(openai.encoder))
merges = gzip.decompress(Path(merges_file).read_bytes()).decode().split("\n")
merges = merges[1:len(openai.encoder) - 2 * 256 - 2 + 1]
(folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
theirs = transformers.CLIPTokenizer.from_pretrained(folder)


def differ(names):
    """The names whose ids differ, start and end left aside."""
    return [name for name in names if openai.encode(name) != theirs(name).input_ids[1:-1]]


found = {}
for language in ("en", "fr", "it"):
    entries = json.loads(Path("package", language, "data.json").read_text(encoding="utf-8"))
    names = [entry["label"] for entry in entries]
    found[language] = differ(names)
    print(f"{language}: {len(names)} names, {len(found[language])} with other ids; "
          f"{len(differ(map(ftfy.fix_text, names)))} after ftfy.fix_text")
    if language == "en":
        curly = [name for name in names if set(name) & set("“”‘’")]
        repaired = differ(ftfy.fix_text(name) for name in names)
for name in ("man’s shoe", "nine o’clock", "Japanese “secret” button"):
    both = {"OpenAI": openai.encode(name), "transformers": theirs(name).input_ids[1:-1]}
    print(name)
    for who, ids in both.items():
        print(f"    {who:12} {ids}  {' '.join(openai.decoder[i] for i in ids)}")
print(f"English names with other ids are just those with a curly quote: {found['en'] == curly}")
texts = [bytes(openai.byte_decoder[char] for char in token.removesuffix("</w>"))
         for token in list(openai.encoder)[:-2]]
whole = {char: sum(char.encode() in text for text in texts) for char in "“”‘’…"}
print(f"tokens that hold a whole character: {whole}")

still = (len(found["en"]) == 38 and found["en"] == curly and not repaired
         and not any(whole[char] for char in "“”‘’"))
print("Still so." if still else "No longer so.")
sys.exit(not still)
PY
"$work/venv/bin/python" look.py
