"""Near misses: the grader finds each of them wrong, and they are made of the caption's words."""

from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.metrics.grader import grade
from mini_dalle2.data.near_misses import near_misses, with_near_misses


def test_near_misses_by_example():
    assert near_misses("a red circle above an orange square") == [
        "a red circle below an orange square",
        "an orange square above a red circle",
    ]
    assert near_misses("a cyan ring left of a blue ring") == [
        "a cyan ring right of a blue ring",
        "a blue ring left of a cyan ring",
    ]
    assert near_misses("two red rings") == [
        "two red " + s for s in ("circles", "squares", "triangles", "stars", "crosses")
    ]
    assert near_misses("a small black star") == [
        "a small black " + s for s in ("circle", "square", "triangle", "cross", "ring")
    ]
    assert near_misses("a dog above a cat") == []
    assert near_misses("a red ring above a red ring") == []  # turned round it would still be true


def test_no_near_miss_fits_the_picture():
    dataset, n = CaptionedShapes("val", 64), 0
    for i in range(120):
        item = dataset[i]
        for text in near_misses(item["text"]):
            n += 1
            assert not grade(item["image"], text)["all"], (item["text"], text)
    assert n > 300


def test_each_caption_stands_before_its_near_misses():
    related, plain, other = "a red circle above a blue square", "two red rings", "a dog"
    texts = with_near_misses([plain, related, other])
    assert texts[:6] == [plain, *near_misses(plain)] and texts[12:] == [other] * 6
    assert texts[6] == related and set(texts[7:12]) == set(near_misses(related))
    assert with_near_misses([other, other]) == [other] * 4
