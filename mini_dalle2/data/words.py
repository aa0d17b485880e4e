"""Words: those of the training captions, and those of a caption that were not among them.

A model samples a picture for any caption. A word that it never learned changes the picture at
random: "a cat" may become two black crosses. So a run keeps its words in RUN/words.txt, one a
line, and sample.py says which words of a caption are not among them.

Read next: ../tokenizer.py, which cuts any word into tokens, learned or not.
"""

import difflib
import re
import unicodedata
from pathlib import Path

from ..runtime.files import atomic_open
from .shapes import COLOURS, COUNTS, RELATIONS, SHAPES, SIZES

# A run of letters and digits.
WORD = re.compile(r"[^\W_]+")
FILE = "words.txt"
# A note names so many words, and no more.
FEW = 40


def words_in(text):
    """Return the words of a text in lower case: list of str."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def write_words(captions, folder):
    """Write the words of all captions into FOLDER/words.txt, sorted, one a line."""
    words = {word for caption in set(captions) for word in words_in(caption)}
    with atomic_open(Path(folder) / FILE) as file:
        file.write("".join(f"{word}\n" for word in sorted(words)).encode())


def read_words(folder):
    """Return the words of a run's training captions: set of str.

    None if the folder does not say them, as public weights and older runs.
    """
    path = Path(folder) / FILE
    # Only a note needs this file, so damage must not stop anything.
    return set(path.read_text("utf-8", errors="replace").split()) if path.is_file() else None


def strange_words(captions, known):
    """List the words of captions that are not known, in order, each with the closest known one.

    known: set of str. Returns list of (word, closest or None).
    """
    words = dict.fromkeys(word for caption in captions for word in words_in(caption))
    found = []
    for word in words:
        if word not in known:
            closest = difflib.get_close_matches(word[:40], sorted(known), n=1, cutoff=0.75)
            found.append((word[:40], closest[0] if closest else None))
    return found


def strange_note(captions, folder):
    """Say which words of captions a run's training captions did not have; None if there are none.

    folder: the run. None also where its words are not known.
    """
    known = read_words(folder)
    strange = strange_words(captions, known) if known is not None else []
    if not strange:
        return None
    named = [f'"{word}"' + (f' (the closest is "{closest}")' if closest else "")
             for word, closest in strange]
    had = ", ".join(sorted(known)) if len(known) <= FEW else f"see {Path(folder) / FILE}"
    return (f"the training captions did not have {', '.join(named)}, so the pictures cannot show "
            f"this; the words they had: {had}")


def count_note(captions, folder):
    """Say that a count needs a colour; None if no caption lacks one.

    "two stars" is none of the captions that captioned shapes teach: "two red stars" is.
    folder: the run. None also where the run did not learn the captioned shapes.
    """
    known = read_words(folder) or set()
    if not {*COUNTS, *COLOURS} <= known:
        return None
    for caption in captions:
        words = words_in(caption)
        if set(words) & set(COUNTS) and not set(words) & set(COLOURS):
            return (f'the training captions have a colour after each count, as in "two red stars": '
                    f'"{caption}" may give another number of objects')
    return None


def shapes_grammar():
    """Say what the captions of the captioned shapes can say, in a few lines."""
    return (
        f"  colours    {', '.join(COLOURS)}\n"
        f"  shapes     {', '.join(SHAPES)}\n"
        f"  sizes      {', '.join(SIZES)}\n"
        f"  relations  {', '.join(RELATIONS)}\n"
        f"  counts     {', '.join(COUNTS)}\n"
        '  captions   "a small red circle", "a red circle above a blue square", "two cyan rings"\n'
        "             a count needs a colour")
