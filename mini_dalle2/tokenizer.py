"""The tokenizer: from a caption to a row of integers, by byte-level byte-pair encoding (BPE) exactly as CLIP does it.

    "A red  circle!"  ->  clean "a red circle!"  ->  words a · red · circle · !  ->  bytes  ->  merges  ->  ids [320, 736, 7117, 256]

A word starts as its UTF-8 bytes, so nothing is ever "unknown". Training glues together, again and again, the pair of neighbours that
the captions hold most often,

    (a*, b*) = argmax over (a, b) of  Σ_word count(word) · #{(a, b) side by side in word},

and writes each such merge down. Encoding plays the list back: of all the pairs in a word, the one learned first is merged first.
`print(tokenizer.explain("A red circle!"))` shows each step.

The vocabulary, in order of ids: 256 bytes; the same 256 where a word ends (marked `</w>`, so that "car" and the front of "carpet"
differ); one token per merge; start of text (SOT), end of text (EOT). That is 514 + merges: CLIP has 48,894 merges and 49,408 ids.
No id is set aside for padding: as in CLIP a row is filled up with 0, which is also the byte "!", and whoever reads the row stops at EOT.

Clean-up is all that a caption loses: `clean` (mojibake repaired, control characters out, lone surrogates to U+FFFD, HTML entities
decoded, white space squeezed, lower case) and where the spaces stood: decode(encode(text)) == " ".join(split_words(text)), always.
As in OpenAI's code, "<|startoftext|>" or "<|endoftext|>" written out in a caption becomes the special id; so a caption can end early.

Shapes: B captions, L context_length.
References: unCLIP (2204.06125) App. C; CLIP (2103.00020) §2.4; Sennrich et al. 2016 (1508.07909) for BPE; GPT-2 for bytes.
Read next: transformer.py.
"""

import gzip
import heapq
import html
import zlib
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex
import torch

SOT, EOT, END = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_MERGES = 49152 - 256 - 2                             # how many of the file's 262,144 merges CLIP took
# What counts as a word: a special, an English ending, a run of letters, one digit, a run of anything else but white space. IGNORECASE
# looks idle on lower-case text, but by it the long s of "it'ſ" is an s, as in OpenAI's code.
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def byte_alphabet():
    """{byte: one visible character} for all 256 bytes, in the order of CLIP's ids.

    A merges file is text, so each byte needs a character that prints. A byte whose Latin-1 character prints keeps it ("a" is "a"); these
    come first. The other 68 (controls, space, ...) take the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def require_str(caption):
    """Hand a caption on if it is a str. ValueError if not."""
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a str, not {type(caption).__name__}")
    return caption


def clean(text):
    """CLIP's clean-up of a caption: str -> str. ValueError if it is no str.

    ftfy repairs mojibake, curly quotes, ligatures, full-width letters and combining marks (NFC), and drops control characters; HTML
    entities are decoded twice, since captions from the web are often escaped twice ("&amp;lt;"); white space runs become one space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(require_str(text)))).strip()
    text = text.replace("\u0345", " ")                    # a lone iota subscript: OpenAI's pattern drops it, as it does a space
    return regex.sub(r"\s+", " ", text).strip().lower()


def split_words(text):
    """The words of a caption once it is clean: str -> list of str."""
    return WORD.findall(clean(text))


def word_symbols(word):
    """The symbols a word starts from, one per UTF-8 byte, the last one marked: "cat" -> ("c", "a", "t</w>"). A special stays whole."""
    if word in (SOT, EOT):
        return (word,)
    *front, last = (BYTE_TO_CHAR[byte] for byte in word.encode("utf-8"))
    return (*front, last + END)


def merge_pair(symbols, pair):
    """Join `pair` wherever it stands in `symbols`, from left to right: ("a", "b", "a", "b"), ("a", "b") -> ("ab", "ab")."""
    merged, i = [], 0
    while i < len(symbols):
        if symbols[i:i + 2] == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


def learn_merges(word_counts, limit):
    """At most `limit` merges, in the order learned, from {word: how often it occurs}: list of (left, right).

    The loop of Sennrich et al., Algorithm 1, but a merge recounts only the words it changes. Equally frequent pairs: the first in
    alphabetical order, so that the order of the captions plays no part. A pair that occurs once says nothing about the next caption,
    so learning ends there, if `limit` has not been reached before.
    """
    words = [[word_symbols(word), count] for word, count in word_counts.items()]
    pair_counts, found_in = Counter(), defaultdict(set)   # pair -> its count, pair -> indices of words that hold (or held) it
    for index, (symbols, count) in enumerate(words):
        for pair in zip(symbols, symbols[1:]):
            pair_counts[pair] += count
            found_in[pair].add(index)
    queue = [(-count, pair) for pair, count in pair_counts.items()]    # always holds each pair, at its count or above
    heapq.heapify(queue)

    merges = []
    while queue and len(merges) < limit:
        negative, pair = heapq.heappop(queue)             # negative, since heapq hands out the smallest first
        if -negative != pair_counts[pair]:                # the count fell since this entry was queued: queue it again where it belongs
            if pair_counts[pair] > 0:
                heapq.heappush(queue, (-pair_counts[pair], pair))
            continue
        if pair_counts[pair] < 2:
            break
        merges.append(pair)
        change = Counter()
        for index in found_in.pop(pair):
            before, count = words[index]
            words[index][0] = after = merge_pair(before, pair)
            for old in zip(before, before[1:]):
                change[old] -= count
            for new in zip(after, after[1:]):
                change[new] += count
                found_in[new].add(index)
        for other, difference in change.items():
            pair_counts[other] += difference
            if difference > 0:
                heapq.heappush(queue, (-pair_counts[other], other))
    return merges


class WordSteps(NamedTuple):
    """How one word became ids: its bytes, the symbols it starts from, each merge as (rank, left, right, symbols after it), the ids."""
    word: str
    bytes: bytes
    start: tuple
    merges: list
    ids: list


class Explanation(NamedTuple):
    """What `BPETokenizer.explain` returns; `print` shows it as text, its fields hold the same for code."""
    text: str
    clean: str
    words: list                                           # of WordSteps
    ids: list

    def __str__(self):
        lines = [f"text   {self.text!r}", f"clean  {self.clean!r}", f"words  {' · '.join(step.word for step in self.words)}"]
        for step in self.words:
            lines += ["", step.word, f"    bytes       {step.bytes.hex(' ')}", f"    start       {' '.join(step.start)}"]
            lines += [f"    merge {rank:5d} {left} + {right}  ->  {' '.join(after)}" for rank, left, right, after in step.merges]
            lines += [f"    ids         {step.ids}"]
        return "\n".join([*lines, "", f"ids    {self.ids}"])


class BPETokenizer:
    """Captions to ids and back, by an ordered list of merges [(left, right), ...]. Make one with `train` or `from_clip_merges`.

    `vocab_size` counts all ids; `sot_id` and `eot_id` are the last two. ValueError if the list is not one that BPE can have made.
    """

    cache_size = 50_000                                   # words; a bound, because a service sees new words for ever

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self.tokens = [*BYTE_TO_CHAR.values(), *(char + END for char in BYTE_TO_CHAR.values())]
        known = set(self.tokens)
        for pair in self.merges:                          # a token's string fixes how it was built: two merges never make the same one
            if len(pair) != 2 or not known.issuperset(pair) or pair[0].endswith(END) or "".join(pair) in known:
                raise ValueError(f"merge {len(self.tokens) - 512} joins {pair}, which makes no new token out of two earlier ones")
            self.tokens.append("".join(pair))
            known.add(self.tokens[-1])
        self.tokens += [SOT, EOT]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.sot_id, self.eot_id = self.ids[SOT], self.ids[EOT]
        self._cache = {}

    @property
    def vocab_size(self):
        """The number of ids, 514 + merges: what the embedding table needs. It can be less than `train` was asked for."""
        return len(self.tokens)

    @classmethod
    def train(cls, captions, vocab_size):
        """Learn merges from captions, an iterable of str, up to `vocab_size` ids or, if sooner, until no pair occurs twice.

        ValueError: vocab_size below 514, no caption at all, or something that is not a str among them.
        """
        # mini: CLIP learned 48,894 merges from the web's text; ours, from the captions at hand, are a few dozen to a few thousand.
        if vocab_size < 514:
            raise ValueError(f"vocab_size must be at least 514 (256 bytes, 256 at a word's end, 2 specials), not {vocab_size}")
        if isinstance(captions, str):
            raise ValueError("captions must be a list of str, not one str")
        words = Counter()                                 # a million captions hold few distinct ones, and those fewer distinct words:
        for caption, count in Counter(map(require_str, captions)).items():    # learning is as cheap as the words are few
            for word in split_words(caption):
                words[word] += count
        if not words:
            raise ValueError("there is nothing to train a tokenizer on: no caption has any text in it")
        return cls(learn_merges(words, vocab_size - 514))

    @classmethod
    def from_clip_merges(cls, path):
        """CLIP's own tokenizer, from its file bpe_simple_vocab_16e6.txt.gz (or that file unpacked): the ids of OpenAI's code.

        vocab_size 49408, sot_id 49406, eot_id 49407. FileNotFoundError: no such file. ValueError: it is not that file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no merges file at {path}")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
                lines = list(islice(file, 1, 1 + CLIP_MERGES))    # the first line is a version comment
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read as a merges file: {error}") from error
        if len(lines) < CLIP_MERGES:
            raise ValueError(f"{path} holds {len(lines)} merges; CLIP's file has at least {CLIP_MERGES}")
        return cls(line.split() for line in lines)

    def _merge_steps(self, symbols):
        """Play the merges back on one word: yield (pair, symbols after it) for each merge, in the order done."""
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if pair not in self.rank:
                return
            symbols = merge_pair(symbols, pair)
            yield pair, symbols

    def _encode_word(self, word):
        """One word -> tuple of ids; remembered, since captions repeat their words."""
        ids = self._cache.get(word)
        if ids is None:
            symbols = word_symbols(word)
            for _, symbols in self._merge_steps(symbols):
                pass                                      # only the last state counts here; `explain` shows the others
            ids = tuple(self.ids[symbol] for symbol in symbols)
            if len(self._cache) >= self.cache_size:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def encode(self, text):
        """Any caption (str) -> list of ids, of any length, without SOT and EOT. ValueError if it is no str."""
        return [i for word in split_words(text) for i in self._encode_word(word)]

    def decode(self, ids):
        """Ids (list or 1-D tensor) -> str: the words with one space between them; bytes that are no UTF-8 show as U+FFFD.

        SOT and EOT come out as written above, padding as "!": of a row from `tokenize`, give the part between the two.
        ValueError if an id is outside [0, vocab_size).
        """
        data = bytearray()
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside this vocabulary of {self.vocab_size}")
            token = self.tokens[i]
            data += bytes(CHAR_TO_BYTE[char] for char in token.removesuffix(END))
            if token.endswith(END) or token in (SOT, EOT):
                data += b" "
        return data.decode("utf-8", errors="replace").removesuffix(" ")

    def tokenize(self, captions, context_length, truncate=False):
        """Captions (list of str, or one str) -> LongTensor (B, L), each row SOT, ids, EOT and zeros up to L = context_length.

        ValueError: L < 2, or a caption takes more than L ids and `truncate` is off. If it is on, the front is kept, with EOT behind it.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        if context_length < 2:
            raise ValueError(f"context_length must be at least 2, for SOT and EOT, not {context_length}")
        rows = {}                                         # caption -> its row; each distinct one once, since training sets repeat theirs
        for caption in dict.fromkeys(map(require_str, captions)):
            ids = self.encode(caption)
            if len(ids) + 2 > context_length and not truncate:
                raise ValueError(f"caption {caption[:60]!r} takes {len(ids) + 2} ids with SOT and EOT, context_length is {context_length}")
            row = [self.sot_id, *ids[:context_length - 2], self.eot_id]
            rows[caption] = row + [0] * (context_length - len(row))
        return torch.tensor([rows[caption] for caption in captions], dtype=torch.long).view(-1, context_length)    # (B, L)

    def explain(self, text):
        """Show the work: the clean text, its words, and for each its bytes, every merge in order, its ids -> Explanation; print it."""
        words = []
        for word in split_words(text):
            start = word_symbols(word)
            merges = [(self.rank[pair], *pair, after) for pair, after in self._merge_steps(start)]
            words.append(WordSteps(word, word.encode("utf-8"), start, merges, list(self._encode_word(word))))
        return Explanation(text, clean(text), words, [i for step in words for i in step.ids])

    def state_dict(self):
        """All there is to know, as plain values for a checkpoint or JSON: {"merges": ["left right", ...]}."""
        return {"merges": [" ".join(pair) for pair in self.merges]}

    @classmethod
    def from_state_dict(cls, state):
        """The tokenizer that `state_dict` described. ValueError if `state` is something else."""
        merges = state.get("merges") if isinstance(state, dict) else None
        if not isinstance(merges, list) or not all(isinstance(line, str) for line in merges):
            raise ValueError('this is no tokenizer\'s state: {"merges": ["left right", ...]} was expected')
        return cls(line.split(" ") for line in merges)
