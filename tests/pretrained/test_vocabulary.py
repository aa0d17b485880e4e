"""vocabulary.py: the same ids from each file that CLIP's vocabulary comes in, or a reason."""

import gzip
import json

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from mini_dalle2.pretrained import load_tokenizer
from mini_dalle2.tokenizer import BPETokenizer
from public_models import MERGES

CAPTIONS = ["a corgi playing a flame throwing trumpet", "Two RINGS, please! don't 2023"]


@pytest.fixture(scope="module")
def original():
    """CLIP's own tokenizer, from OpenAI's file."""
    return BPETokenizer.from_clip_merges(MERGES)


@pytest.fixture(scope="module")
def saved_by_5(original, tmp_path_factory):
    """A folder that transformers 5 wrote, with one token added."""
    folder = tmp_path_factory.mktemp("five")
    theirs = CLIPTokenizer(original.ids, original.merges)
    theirs.add_tokens(["<cat-toy>"])
    theirs.save_pretrained(folder)
    return folder


def merges_of_4(folder, original):
    """merges.txt as transformers 4 wrote it."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in original.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def openais(folder, original):
    (folder / MERGES.name).write_bytes(MERGES.read_bytes())


def unpacked(folder, original):
    (folder / MERGES.stem).write_bytes(gzip.decompress(MERGES.read_bytes()))


@pytest.mark.parametrize("write", [merges_of_4, openais, unpacked])
def test_a_folder_with_merges_gives_clips_ids(original, tmp_path, write):
    write(tmp_path, original)
    ours = load_tokenizer(tmp_path)
    assert ours.tokens == original.tokens


def test_a_tokenizer_json_gives_the_ids_of_its_own_library(original, saved_by_5):
    """Within a folder and named as a file; the added token is told."""
    assert not (saved_by_5 / "merges.txt").exists()
    theirs = Tokenizer.from_file(str(saved_by_5 / "tokenizer.json"))
    for source in (saved_by_5, saved_by_5 / "tokenizer.json"):
        with pytest.warns(UserWarning, match="added tokens .<cat-toy>."):
            ours = load_tokenizer(source)
        assert ours.merges == original.merges and ours.eot_id == 49407
        for caption in CAPTIONS:
            found = [ours.sot_id, *ours.encode(caption), ours.eot_id]
            assert found == theirs.encode(caption).ids


def test_older_files_write_a_pair_as_one_string(original, saved_by_5, tmp_path):
    told = json.loads((saved_by_5 / "tokenizer.json").read_text())
    told["model"]["merges"] = [" ".join(pair) for pair in told["model"]["merges"]]
    told["added_tokens"].pop()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(told))
    assert load_tokenizer(tmp_path).tokens == original.tokens


@pytest.mark.parametrize("text, said", [
    ("{", "cannot be read as CLIP's tokenizer"), ("{}", "cannot be read as CLIP's tokenizer"),
    ("[1]", "cannot be read as CLIP's tokenizer"),
    ('{"model": {"merges": ["a b"], "vocab": {"a": 0}}}', "in another way than CLIP"),
    ('{"model": {"merges": [], "vocab": {"<|startoftext|>": [[1]]}}}', "is a value of the type list")])
def test_other_files_have_a_reason(tmp_path, text, said):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_vocabulary_names_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="bpe_simple_vocab_16e6.txt.gz.*tokenizer.json"):
        load_tokenizer(tmp_path)
