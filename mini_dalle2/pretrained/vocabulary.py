"""CLIP's vocabulary from a folder of weights: a file of merges, or a tokenizer.json.

    bpe_simple_vocab_16e6.txt.gz    OpenAI's file
    merges.txt                      Hugging Face, until transformers 4
    tokenizer.json                  Hugging Face: from transformers 5 on the only file

Tokens that somebody added are not split by our tokenizer, which reads them letter by letter.

References: the file format of the package tokenizers. Read next: karlo_models.py.
"""

import warnings
from pathlib import Path

from ..runtime.checks import brief
from ..runtime.files import read_json
from ..tokenizer import EOT, SOT, BPETokenizer
from .beside import first_of
from .pieces import find

MERGES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "tokenizer/merges.txt",
          "merges.txt")
TOKENIZERS = ("tokenizer/tokenizer.json", "tokenizer.json")


def load_tokenizer(folder):
    """Read CLIP's tokenizer from a folder of weights, or from one file of it: BPETokenizer.

    Warns of added tokens. Raises FileNotFoundError, ValueError.
    """
    path = Path(folder)
    if path.is_dir():
        path = find(path, *MERGES, *TOKENIZERS)
    if path.suffix != ".json":
        tokenizer = BPETokenizer.from_clip_merges(path)
        added = first_of(path.parent, "added_tokens.json")
        tokens = read_vocabulary(added) if added else {}
    else:
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer {path}: nothing is downloaded, so name "
                                    f"a file or a folder of this machine")
        tokenizer, tokens = from_json(path)
    added = [token for token, i in tokens.items() if i >= tokenizer.vocab_size]
    if added:
        warnings.warn(f"{path.parent} has added tokens ({', '.join(sorted(added)[:3])}), which are "
                      f"read letter by letter here", stacklevel=2)
    return tokenizer


def read_vocabulary(path):
    """Read a file {token: id}. Raises ValueError for any other file."""
    tokens = read_json(path)
    if not isinstance(tokens, dict) or not all(isinstance(i, int) for i in tokens.values()):
        raise ValueError(f"{path} is no list of tokens: copy it again")
    return tokens


def from_json(path):
    """Read a tokenizer.json: the tokenizer, and the ids {token: id} of all its tokens."""
    try:
        told = read_json(path)
        # A pair is a list, or in older files two words with a space between.
        merges = [pair.split(" ") if isinstance(pair, str) else pair
                  for pair in told["model"]["merges"]]
        tokens = dict(told["model"]["vocab"])
        tokens |= {one["content"]: one["id"] for one in told.get("added_tokens", ())}
        tokenizer = BPETokenizer(merges)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} cannot be read as CLIP's tokenizer: copy it again") from None
    if any(tokens.get(token) != i for token, i in tokenizer.ids.items()):
        raise ValueError(f"{path} numbers its tokens in another way than CLIP ({SOT} is "
                         f"{brief(tokens.get(SOT))}, {EOT} is {brief(tokens.get(EOT))}): use "
                         f"CLIP's own")
    return tokenizer, tokens
