"""Words: those of the training captions, and those of a caption that were not among them.

A model samples a picture for any caption. A word that it never learned changes the picture at
random: "a cat" may become two black crosses. So a run keeps its words in RUN/words.txt, one a
line, and sample.py says which words of a caption are not among them.

Read next: ../tokenizer.py, which cuts any word into tokens, learned or not.
"""

import contextlib
import difflib
import re
import unicodedata
from pathlib import Path

from ..runtime.files import atomic_open, check_card
from .shapes import COLOURS, COUNTS, RELATIONS, SHAPES, SIZES

# A run of letters and digits.
WORD = re.compile(r"[^\W_]+")
FILE = "words.txt"
# A note names so many words or characters, and no more.
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

    None if the folder does not say them, as public weights and older runs, or if the file is
    damaged. Only a note needs this file, so damage must not stop anything.
    """
    path = Path(folder) / FILE
    with contextlib.suppress(FileNotFoundError, ValueError):
        check_card(path)
        return set(path.read_text("utf-8", errors="replace").split())
    return None


def strange_words(caption, known):
    """List the words of a caption that are not known, in order, each with the closest known one.

    known: set of str. Returns list of (word, closest or None).
    """
    # Short words such as "an" look like too many others.
    candidates = sorted(word for word in known if len(word) > 2)
    found = []
    for word in dict.fromkeys(words_in(caption)):
        if word not in known:
            closest = difflib.get_close_matches(word[:40], candidates, n=1, cutoff=0.75)
            found.append((word[:40], closest[0] if closest else None))
    return found


def word_notes(captions, folder):
    """Say what a run cannot know about captions: list of sentences, one or none for each caption.

    If a caption has a strange word, the last sentence says which words the run knows.
    folder: the run. The list is empty where its words are not known.
    """
    known = read_words(folder)
    if known is None:
        return []
    notes = []
    for caption in captions:
        strange = strange_words(caption, known)
        named = [f'"{word}"' + (f' (the closest is "{closest}")' if closest else "")
                 for word, closest in strange]
        if named:
            notes.append(f'"{shorter(caption)}": no training caption had {", ".join(named)}, so '
                         f'the pictures cannot show this')
    if notes:
        notes.append(f"the training captions had these words: {known_words(known, folder)}")
    return notes + count_notes(captions, known)


def known_words(known, folder):
    """Say which words a run knows: by kind for captioned shapes, else a list or its file."""
    if knows_shapes(known):
        return f"\n{shapes_grammar()}"
    return ", ".join(sorted(known)) if len(known) <= FEW else f"see {Path(folder) / FILE}"


def knows_shapes(known):
    """Whether a run learned the captioned shapes."""
    return {*COUNTS, *COLOURS, *SHAPES} <= known


def count_notes(captions, known):
    """Say that a count needs a colour, for each caption that lacks one: list of str.

    "two stars" is none of the captions that captioned shapes teach: "two red stars" is.
    """
    if not knows_shapes(known):
        return []
    counting = [caption for caption in captions
                if set(words_in(caption)) & set(COUNTS)
                and not set(words_in(caption)) & set(COLOURS)]
    return [f'"{shorter(caption)}" may give another number of objects: the training captions have '
            f'a colour after each count, as in "two red stars"' for caption in counting]


def shorter(caption):
    """A caption of at most FEW characters, for a note."""
    return caption if len(caption) <= FEW else f"{caption[:FEW - 1]}…"


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
