"""Random text and random damage, by hypothesis: a valid result, or one ValueError.

Always the same examples (derandomize), so that a failure here is a failure everywhere.
"""

import functools
import gzip
import io
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
from mini_dalle2 import configs
from mini_dalle2.data.folder import CaptionedFolder
from mini_dalle2.pipeline import load_model
from mini_dalle2.prior import DiffusionPrior
from mini_dalle2.tokenizer import BPETokenizer, EOT, SOT, clean, split_words
from mini_dalle2.runtime.files import load_checkpoint, read_metrics
from mini_dalle2.training import overrides

fuzz = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TOKENIZER = BPETokenizer.train(
    ["a small red circle above a blue square", "two cyan rings, it's a cat", "ring ring"], 600
)
# Lone surrogates too, as of a command line.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=60)
PIECES = st.lists(
    st.sampled_from(
        [
            SOT,
            EOT,
            "a red circle",
            "&amp;lt;",
            "</w>",
            "it's",
            "Ⅷ",
            "ﬁ",
            "\ufeff",
            "\0",
            "🐈‍⬛",
            "ſ",
            "\u0345",
            "  ",
        ]
    )
)


@st.composite
def damage(draw, whole):
    """Bytes like `whole`: cut, overwritten, with bytes put in or taken out; or other bytes."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        data[start : start + draw(st.sampled_from([0, length]))] = draw(st.binary(max_size=length))
    data = data[: draw(st.sampled_from([len(data), draw(st.integers(0, len(data)))]))]
    return draw(st.sampled_from([bytes(data), bytes(data), draw(st.binary(max_size=200))]))


def one_sentence(function, *arguments):
    """What the function returns, or None for a ValueError of one line; others are failures."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of what it can half read.
            warnings.simplefilter("ignore")
            return function(*arguments)
    except ValueError as error:
        assert str(error) and "\n" not in str(error), error


# ------------------------------------------------------------------ the tokenizer


@fuzz(max_examples=150)
@given(ANY_TEXT | PIECES.map("".join))
def test_text_comes_back_as_its_words(text):
    """decode(encode(x)) is the words of clean(x) with one space between them."""
    ids = TOKENIZER.encode(text)
    back = TOKENIZER.decode(ids)
    assert back == " ".join(split_words(text)) and all(0 <= i < TOKENIZER.vocab_size for i in ids)
    # Nothing but spaces is lost.
    assert back.replace(" ", "") == clean(text).replace(" ", "")
    assert TOKENIZER.explain(text).ids == ids


@fuzz(max_examples=100)
@given(ANY_TEXT | PIECES.map("".join), st.integers(2, 20))
def test_rows_are_whole_or_cut_where_one_asks_for_it(text, length):
    ids = TOKENIZER.encode(text)
    row = TOKENIZER.tokenize(text, length, truncate=True)[0].tolist()
    kept = ids[: length - 2]
    assert row == [TOKENIZER.sot_id, *kept, TOKENIZER.eot_id, *[0] * (length - 2 - len(kept))]
    whole = one_sentence(TOKENIZER.tokenize, text, length)
    assert (whole is None) == (len(ids) > length - 2)
    assert whole is None or whole[0].tolist() == row


@fuzz(max_examples=60)
@given(st.lists(ANY_TEXT, max_size=5), st.integers(514, 560))
def test_any_captions_can_be_learned_from(captions, vocab_size):
    tokenizer = one_sentence(BPETokenizer.train, captions, vocab_size)
    assert (tokenizer is None) == (not any(map(split_words, captions)))
    if tokenizer:
        assert tokenizer.vocab_size <= vocab_size
        assert (
            BPETokenizer.from_state_dict(json.loads(json.dumps(tokenizer.state_dict()))).tokens
            == tokenizer.tokens
        )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["merges", "a"]), inner, max_size=2)
    ),
)


@fuzz(max_examples=150)
@given(
    JSON
    | st.lists(
        st.sampled_from(
            ["a b", "b a", "a b</w>", "ab c", "a", "", "a b c", "a  b", "</w> a", "zz a"]
        )
    ).map(lambda lines: {"merges": lines})
)
def test_any_state_is_a_tokenizer_or_refused(state):
    tokenizer = one_sentence(BPETokenizer.from_state_dict, state)
    assert tokenizer is None or tokenizer.decode(tokenizer.encode("abab cab")) == "abab cab"


MERGES = ("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in TOKENIZER.merges)).encode()


@fuzz(max_examples=60)
@given(st.data(), st.sampled_from(["merges.txt", "merges.txt.gz"]))
def test_any_merges_file_is_refused_unless_it_is_that_of_clip(tmp_path, data, name):
    whole = gzip.compress(MERGES, mtime=0) if name.endswith("gz") else MERGES
    (tmp_path / name).write_bytes(data.draw(damage(whole)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mini_dalle2.tokenizer.CLIP_MERGES",
            data.draw(st.sampled_from([0, 1, len(TOKENIZER.merges), 48894])),
        )
        tokenizer = one_sentence(BPETokenizer.from_clip_merges, tmp_path / name)
    assert tokenizer is None or isinstance(tokenizer, BPETokenizer)


# ------------------------------------------------------------------ files of a run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with two small checkpoints: one of the present format, one of torch's old one."""
    folder, cfg = tmp_path_factory.mktemp("checkpoints"), configs.preset("micro").prior.model
    value = {
        "stage": "prior",
        "model_config": vars(cfg),
        "ema": DiffusionPrior(cfg).state_dict(),
        "step": 1,
        "steps": 1,
    }
    torch.save(value, folder / "new.pt")
    torch.save(value, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder


@fuzz(max_examples=80)
@given(st.data(), st.sampled_from(["new.pt", "old.pt"]))
def test_any_checkpoint_is_read_or_refused(small, tmp_path, data, name):
    whole = (small / name).read_bytes()
    # The beginning says what the rest is: most damage goes there.
    head = data.draw(st.sampled_from([200, 3000, len(whole)]))
    (tmp_path / "prior.pt").write_bytes(
        data.draw(damage(whole[:head])) + data.draw(st.sampled_from([whole[head:], b""]))
    )
    checkpoint, loaded = (
        one_sentence(read, tmp_path / "prior.pt", "prior") for read in (load_checkpoint, load_model)
    )
    assert checkpoint is None or checkpoint["stage"] == "prior"
    assert loaded is None or (isinstance(loaded[0], DiffusionPrior) and not loaded[0].training)


CONFIG = json.dumps(overrides.to_dict(configs.preset("micro"))).encode()


@fuzz(max_examples=80)
@given(damage(CONFIG) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_config_is_read_or_refused(data):
    config = one_sentence(lambda: overrides.from_dict(json.loads(data.decode())))
    assert config is None or overrides.from_dict(overrides.to_dict(config)) == config


@fuzz(max_examples=60)
@given(
    damage(b'{"stage": "clip", "step": 20, "loss": 3.5}\n' * 4)
    | st.lists(JSON.map(json.dumps)).map(lambda lines: "\n".join(lines).encode())
)
def test_any_metrics_can_be_read(tmp_path, data):
    (tmp_path / "metrics.jsonl").write_bytes(data)
    assert all(
        "stage" in entry and isinstance(entry["step"], int) for entry in read_metrics(tmp_path)
    )


# ------------------------------------------------------------------ pictures


def encoded(format, mode):
    """A small picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert(mode).save(buffer, format=format)
    return buffer.getvalue()


WHOLE = [
    encoded("PNG", "RGB"),
    encoded("PNG", "P"),
    encoded("JPEG", "RGB"),
    encoded("GIF", "L"),
    encoded("WEBP", "RGBA"),
    encoded("BMP", "RGB"),
    encoded("TIFF", "RGB"),
    encoded("PPM", "RGB"),
]


@fuzz(max_examples=150)
@given(st.data(), st.sampled_from(WHOLE))
def test_any_picture_is_read_or_refused(tmp_path, data, whole):
    path = tmp_path / "a.png"
    path.write_bytes(data.draw(damage(whole)))
    picture = one_sentence(sample.open_picture, path)
    if picture is not None:
        shown = one_sentence(sample.given, path, 8)
        assert shown is not None and shown[1].size == (8, 8) and shown[1].mode == "RGB"


@fuzz(max_examples=40)
@given(st.data(), st.sampled_from(WHOLE))
def test_any_folder_is_read_or_refused(tmp_path_factory, data, whole):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.png").write_bytes(data.draw(damage(whole)))
    (folder / "a.txt").write_bytes(data.draw(damage(b"a cat\na tom cat\n")))
    (folder / "b.png").write_bytes(whole)
    (folder / "metadata.jsonl").write_bytes(
        data.draw(
            damage(
                b'{"file_name": "b.png", "text": "a dog"}\n{"file_name": "c.png", "text": ["x"]}\n'
            )
        )
    )
    pictures = one_sentence(CaptionedFolder, folder, 8)
    for i in range(len(pictures or ())):
        item = pictures[i]
        assert item["image"].shape == (3, 8, 8)
        assert item["image"].abs().max() <= 1
        assert item["text"].strip()
