"""Near misses: captions that are almost, but not quite, what a picture shows.

    a red circle above a blue square  ->  a red circle below a blue square
                                          a blue square above a red circle
    two green rings                   ->  two green circles · two green squares · …

From near misses CLIP learns the difference between "left of" and "right of". The other captions
of a batch hardly ever teach this: the words alone tell them apart. So a CLIP without near misses
finds the right caption among a thousand, and still only guesses between a relation and its
opposite. What CLIP does not know, no prior can pass on to the decoder.

To make near misses, one must understand the caption. This file understands the captions of the
shapes (shapes.py). All other captions have no near misses.

Reference: NegCLIP (arXiv 2210.01936), which exchanges words of a caption.
Read next: ../clip.py, whose loss takes the near misses.
"""

from .shapes import SHAPES, parse_caption, relation_caption

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def near_misses(caption):
    """List the near misses of a caption: list of str, empty for a caption not of the shapes.

    A relation is turned round, and its two objects are exchanged. Other captions name each of
    the other shapes in turn.
    """
    try:
        kind, word, pairs = parse_caption(caption)
    except ValueError:
        return []
    if kind == "relation":
        first, second = pairs
        if first == second:
            # "a red ring above a red ring", turned round, is still true.
            return []
        turned_round = relation_caption(first, OPPOSITE[word], second)
        exchanged = relation_caption(second, word, first)
        return [turned_round, exchanged]
    _, shape = pairs[0]
    if kind == "size":
        own, names = shape, SHAPES.keys()
    else:
        own, names = SHAPES[shape], SHAPES.values()
    return [caption.removesuffix(own) + name for name in names if name != own]


def with_near_misses(captions):
    """List each of N captions followed by its K near misses: (1 + K)·N texts.

    K is the largest number of near misses of any caption. A caption with fewer repeats them in
    turn, and a caption with none repeats itself.
    """
    near = {caption: near_misses(caption) or [caption] for caption in set(captions)}
    K = max((len(texts) for texts in near.values()), default=0)
    listed = []
    for caption in captions:
        texts = near[caption]
        listed.append(caption)
        listed.extend(texts[k % len(texts)] for k in range(K))
    return listed
