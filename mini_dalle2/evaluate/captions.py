"""Which captions an evaluation asks for: some of the shapes' validation set, pairs, and edits.

An edit is a change of a caption: "a red circle above a blue square" → "… below a blue square".
`EDITS` lists ten of them. They were chosen before any was tried.

References: unCLIP (2204.06125) §3.3 (text diffs), §7 (attribute binding). Read next: lab.py.
"""

from itertools import islice

from ..data.shapes import parse_caption

# Pairs (what a caption says, what it is to say instead).
EDITS = [
    ("red circle", "blue circle"), ("yellow star", "cyan star"), ("black cross", "orange cross"),
    ("green triangle", "purple triangle"), ("blue circle", "blue square"),
    ("red triangle", "red ring"), ("orange square", "orange star"),
    ("above", "below"), ("left of", "right of"), ("small", "large")]
ARTICLES = (
    ("a orange", "an orange"), ("an blue", "a blue"),
    ("an cyan", "a cyan"), ("an purple", "a purple"))
# Edits are looked for among so many captions.
SEARCHED = 6000


def edited(caption, old, new):
    """Return the caption with the edit made.

    Return None if the caption does not contain `old`, or if the data set has no such new caption.
    """
    if f" {old} " not in f" {caption} ":
        return None
    text = f" {caption} ".replace(f" {old} ", f" {new} ", 1).strip()
    for wrong, better in ARTICLES:
        text = text.replace(wrong, better)
    try:
        kind, _, things = parse_caption(text)
    except ValueError:
        return None
    one_colour = kind == "relation" and things[0][0] == things[1][0]
    return None if one_colour else text


def with_edits(texts, each):
    """Of texts (i, caption) return the first `each` that allow each of the EDITS, as (i, caption
    with the edit made)."""
    first = list(islice(texts, SEARCHED))
    found = []
    for old, new in EDITS:
        made = ((i, edited(text, old, new)) for i, text in first)
        found += islice(((i, text) for i, text in made if text is not None), each)
    return found


def pairs(texts):
    """Of texts (i, caption) yield those of two objects of different shapes.

    The grader can tell such a picture from one with exchanged colours.
    """
    for i, text in texts:
        kind, _, things = parse_caption(text)
        if kind == "relation" and things[0][1] != things[1][1]:
            yield i, text


def choose_scenes(texts, of, count):
    """Choose scenes by their captions: a list of (i, the caption asked for).

    texts: (i, caption) of all scenes; of: "edits", "pairs", or any other name for the first ones;
    count: how many, in case of "edits" of each edit.
    """
    if of == "edits":
        return with_edits(texts, count)
    if of == "pairs":
        return list(islice(pairs(texts), count))
    return list(islice(texts, count))
