"""Near misses: they say something else than the caption does, by the grader's own reading, and are made of the same words."""

import torch

from mini_dalle2.data import CaptionedShapes
from mini_dalle2.metrics import grade
from mini_dalle2.near_misses import near_misses, one_word_changed, wrong_captions
from mini_dalle2.tokenizer import BPETokenizer


def test_near_misses_by_example():
    assert near_misses("a red circle above an orange square") == [
        "a red circle below an orange square", "an orange circle above a red square", "a red square above an orange circle"]
    assert near_misses("a cyan ring left of a blue ring") == ["a cyan ring right of a blue ring", "a blue ring left of a cyan ring"]
    assert near_misses("two red rings") == near_misses("a small black star") == near_misses("a dog above a cat") == []


def test_no_near_miss_fits_the_picture():
    dataset, n = CaptionedShapes("val", 64), 0
    for i in range(120):
        item = dataset[i]
        for text in near_misses(item["text"]):
            n += 1
            assert not grade(item["image"], text)["all"], (item["text"], text)
    assert n > 100


def test_one_word_changed():
    tokens = torch.tensor([[1, 5, 6, 7, 2, 0], [1, 5, 8, 9, 2, 0], [1, 4, 6, 2, 0, 0], [1, 5, 6, 7, 2, 0]])
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        changed = one_word_changed(tokens, 2, generator)
        differs = changed != tokens
        assert (differs.sum(1) <= 1).all() and torch.equal(changed == 2, tokens == 2)     # one token at most; the end stays the end
        for row, place in differs.nonzero().tolist():
            assert changed[row, place] in tokens[:, place]                 # a token that stands there in some other caption
            seen.add((row, place, changed[row, place].item()))
    # Each word of the first caption that another one disagrees with has been exchanged. The third's end (place 3) is nobody's word.
    assert {s for s in seen if s[0] == 0} == {(0, 1, 4), (0, 2, 8), (0, 3, 9)}
    assert {s for s in seen if s[0] == 2} == {(2, 1, 5), (2, 2, 8)}


def test_wrong_captions_are_one_near_miss_and_one_changed_caption_each():
    captions = ["a red circle above a blue square", "two red rings", "a green ring left of a green ring", "a small blue star"] * 3
    tokenizer = BPETokenizer.train(captions, 600)
    tokenize = lambda texts: tokenizer.tokenize(texts, 40)
    tokens = tokenize(captions)[:, :36]
    wrong, i = wrong_captions(captions, tokenize, tokens, tokenizer.eot_id), torch.tensor([0, 1, 4, 7])
    seen = set()
    for seed in range(30):
        near, changed = wrong(i, torch.Generator().manual_seed(seed)).split(4)
        assert near.shape == changed.shape == (4, 36) and ((changed != tokens[i]).sum(1) <= 1).all()
        assert torch.equal(near[1], tokens[1]) and torch.equal(near[3], tokens[3])         # no relation: their own caption
        seen |= set(map(tuple, near[[0, 2]].tolist()))
    assert seen == set(map(tuple, tokenize(near_misses(captions[0]))[:, :36].tolist()))
