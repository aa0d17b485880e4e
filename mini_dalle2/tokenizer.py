"""The tokenizer: from a caption to a row of integers, by CLIP's byte-pair encoding (BPE).

    "A red  circle!"  ->  clean  "a red circle!"
                      ->  words  a · red · circle · !
                      ->  bytes, then merges
                      ->  ids    [320, 736, 7117, 256]

A word starts as its UTF-8 bytes, so no word is ever "unknown". Training looks for the pair of
neighbours that the captions hold most often,

    (a*, b*) = argmax over (a, b) of  Σ_word count(word) · #{(a, b) side by side in word},

joins the pair everywhere, writes the merge down, and starts again. Encoding plays this list back:
of all the pairs in a word, the pair that was learned first is merged first.
`print(tokenizer.explain("A red circle!"))` shows each step.

The vocabulary in the order of its ids:
    0..255          the bytes
    256..511        the same bytes at the end of a word, marked `</w>`: "car" is not "carpet"
    512..           one token for each merge
    the last two    start of text (SOT) and end of text (EOT)
These are 514 + merges ids. CLIP has 48,894 merges and 49,408 ids.
No id is reserved for padding. As in CLIP, a row is filled up with 0, which is also the byte "!".
Whoever reads a row stops at EOT.

Only `clean` changes a caption. It repairs mojibake, removes control characters, turns lone
surrogates into U+FFFD, decodes HTML entities, squeezes white space and makes all letters lower
case. Encoding then forgets where the spaces stood. So for every text
decode(encode(text)) == " ".join(split_words(text)).
As in OpenAI's code, "<|startoftext|>" or "<|endoftext|>" in a caption becomes the special id. A
caption can therefore end early.

Shapes: B captions, L context_length.
References: unCLIP (2204.06125) App. C; CLIP (2103.00020) §2.4; Sennrich et al. 2016 (1508.07909)
for BPE; GPT-2 for bytes. Read next: transformer.py.
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

SOT = "<|startoftext|>"
EOT = "<|endoftext|>"
END = "</w>"
# 256 bytes, and the same 256 at the end of a word.
BYTE_TOKENS = 512
SMALLEST_VOCABULARY = BYTE_TOKENS + 2
# The file holds 262,144 merges. CLIP uses only the first ones.
CLIP_MERGES = 49152 - 256 - 2
# A longer run of letters becomes several words, because merging takes a time that grows with the
# square of a word's length. OpenAI's code has no such limit.
LONGEST = 100
# A word is a special, an English ending, a run of letters, one digit, or a run of other characters
# without white space. IGNORECASE matters even for lower-case text: with this flag the long s of
# "it'ſ" counts as an s, as in OpenAI's code.
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}{1,%d}|\p{N}|[^\s\p{L}\p{N}]{1,%d}" % (LONGEST, LONGEST), regex.IGNORECASE)


def byte_alphabet():
    """Return {byte: one visible character} for all 256 bytes, in the order of CLIP's ids.

    A merges file is text, so each byte needs a printable character. A byte whose Latin-1 character
    is printable keeps this character ("a" is "a"); these bytes come first. The other 68 bytes
    (controls, space, …) take the characters from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(others):
        alphabet[byte] = chr(256 + i)
    return alphabet


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def require_str(caption):
    """Return the caption if it is a str. Raises ValueError for anything else."""
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a str, not {type(caption).__name__}")
    return caption


def clean(text):
    """Clean up a caption as CLIP does: str -> str. Raises ValueError for anything but a str.

    ftfy repairs mojibake, curly quotes, ligatures, full-width letters and combining marks (NFC),
    and removes control characters. HTML entities are decoded twice, because captions from the web
    are often escaped twice ("&amp;lt;"). A run of white space becomes one space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(require_str(text)))).strip()
    # OpenAI's pattern drops a lone iota subscript, as it drops a space.
    text = text.replace("\u0345", " ")
    return regex.sub(r"\s+", " ", text).strip().lower()


def split_words(text):
    """Clean a caption and split it into words: str -> list of str."""
    return WORD.findall(clean(text))


def word_symbols(word):
    """Return the symbols that a word starts from: "cat" -> ("c", "a", "t</w>").

    Each UTF-8 byte is one symbol; the last one is marked. A special token stays whole.
    """
    if word in (SOT, EOT):
        return (word,)
    *front, last = (BYTE_TO_CHAR[byte] for byte in word.encode("utf-8"))
    return (*front, last + END)


def merge_pair(symbols, pair):
    """Join `pair` wherever it stands in `symbols`, from left to right.

    ("a", "b", "a", "b") with the pair ("a", "b") -> ("ab", "ab").
    """
    merged = []
    i = 0
    while i < len(symbols):
        if symbols[i:i + 2] == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


def learn_merges(word_counts, limit):
    """Learn at most `limit` merges from {word: count}: list of (left, right) in the order learned.

    This is Algorithm 1 of Sennrich et al., but a merge recounts only the words that it changes. Of
    equally frequent pairs the first in alphabetical order wins, so the order of the captions does
    not matter. Learning ends early when no pair occurs twice: a single pair says nothing about the
    next caption.
    """
    words = [[word_symbols(word), count] for word, count in word_counts.items()]
    pair_counts = Counter()
    # found_in: for each pair the indices of the words that hold it, or once held it.
    found_in = defaultdict(set)
    for index, (symbols, count) in enumerate(words):
        for pair in zip(symbols, symbols[1:]):
            pair_counts[pair] += count
            found_in[pair].add(index)
    # The queue always holds each pair, with its present count or a higher one. The counts are
    # negative, because heapq returns the smallest entry first.
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)

    merges = []
    while queue and len(merges) < limit:
        negative, pair = heapq.heappop(queue)
        if -negative != pair_counts[pair]:
            # The count fell after this entry was queued: put the pair back at its present count.
            if pair_counts[pair] > 0:
                heapq.heappush(queue, (-pair_counts[pair], pair))
            continue
        if pair_counts[pair] < 2:
            break
        merges.append(pair)
        change = merge_in_words(words, found_in, pair)
        for other, difference in change.items():
            pair_counts[other] += difference
            if difference > 0:
                heapq.heappush(queue, (-pair_counts[other], other))
    return merges


def merge_in_words(words, found_in, pair):
    """Join `pair` in all words that hold it; return {pair: change of its count}.

    words: list of [symbols, count]. found_in: {pair: indices of words}. Both are updated.
    """
    change = Counter()
    for index in found_in.pop(pair):
        before, count = words[index]
        after = merge_pair(before, pair)
        words[index][0] = after
        for old in zip(before, before[1:]):
            change[old] -= count
        for new in zip(after, after[1:]):
            change[new] += count
            found_in[new].add(index)
    return change


class WordSteps(NamedTuple):
    """How one word became ids."""
    word: str
    # The UTF-8 bytes of the word.
    bytes: bytes
    # The symbols that the word starts from.
    start: tuple
    # For each merge: (rank, left, right, symbols after the merge).
    merges: list
    ids: list


class Explanation(NamedTuple):
    """What `BPETokenizer.explain` returns. `print` shows it as text."""
    text: str
    clean: str
    # One WordSteps for each word.
    words: list
    ids: list

    def __str__(self):
        lines = [
            f"text   {self.text!r}",
            f"clean  {self.clean!r}",
            f"words  {' · '.join(step.word for step in self.words)}"]
        for step in self.words:
            lines.append("")
            lines.append(step.word)
            lines.append(f"    bytes       {step.bytes.hex(' ')}")
            lines.append(f"    start       {' '.join(step.start)}")
            for rank, left, right, after in step.merges:
                lines.append(f"    merge {rank:5d} {left} + {right}  ->  {' '.join(after)}")
            lines.append(f"    ids         {step.ids}")
        lines.append("")
        lines.append(f"ids    {self.ids}")
        return "\n".join(lines)


class BPETokenizer:
    """Captions to ids and back, by an ordered list of merges [(left, right), …].

    Make one with `train` or `from_clip_merges`. `vocab_size` counts all ids; `sot_id` and `eot_id`
    are the last two. Raises ValueError for a list that BPE cannot have made.
    """

    # Words whose ids are remembered. A bound is needed, because a service sees new words for ever.
    cache_size = 50_000

    def __init__(self, merges):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: rank for rank, pair in enumerate(self.merges)}
        bytes_inside = list(BYTE_TO_CHAR.values())
        bytes_at_end = [char + END for char in BYTE_TO_CHAR.values()]
        self.tokens = bytes_inside + bytes_at_end
        known = set(self.tokens)
        for i, pair in enumerate(self.merges):
            # A token's string says how the token was built: no two merges make the same string.
            joins_two_tokens = len(pair) == 2 and known.issuperset(pair)
            if not joins_two_tokens or pair[0].endswith(END) or "".join(pair) in known:
                raise ValueError(f"merge {i} joins {' + '.join(map(str, pair))[:40]}, which makes "
                                 f"no new token out of two earlier ones")
            token = "".join(pair)
            self.tokens.append(token)
            known.add(token)
        self.tokens += [SOT, EOT]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.sot_id = self.ids[SOT]
        self.eot_id = self.ids[EOT]
        self._cache = {}

    @property
    def vocab_size(self):
        """The number of ids, 514 + merges. It can be smaller than `train` was asked for."""
        return len(self.tokens)

    @classmethod
    def train(cls, captions, vocab_size):
        """Learn merges from captions (iterable of str) until there are `vocab_size` ids.

        Learning ends earlier when no pair occurs twice. Raises ValueError for a vocab_size below
        514, for captions without any text, and for a caption that is not a str.
        """
        # mini: CLIP learned 48,894 merges from web text. Few captions yield few merges.
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size must be at least {SMALLEST_VOCABULARY} "
                f"(256 bytes, 256 at a word's end, 2 specials), not {vocab_size}")
        if isinstance(captions, str):
            raise ValueError("captions must be a list of str, not one str")
        # A million captions hold few distinct captions, which hold even fewer distinct words.
        # Counting first makes learning cheap.
        words = Counter()
        for caption, count in Counter(map(require_str, captions)).items():
            for word in split_words(caption):
                words[word] += count
        if not words:
            raise ValueError("there is nothing to train a tokenizer on: no caption has any text")
        # The pieces of a run of letters that was cut are no words, and take long to learn from.
        whole = {word: count for word, count in words.items() if len(word) < LONGEST}
        return cls(learn_merges(whole, vocab_size - SMALLEST_VOCABULARY))

    @classmethod
    def from_clip_merges(cls, path):
        """Read CLIP's own tokenizer from bpe_simple_vocab_16e6.txt.gz, or from this file unpacked.

        The ids are those of OpenAI's code: vocab_size 49408, sot_id 49406, eot_id 49407.
        Raises FileNotFoundError for a missing file, ValueError for any other file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no merges file {path}")
        open_file = gzip.open if path.suffix == ".gz" else open
        try:
            with open_file(path, "rt", encoding="utf-8", newline="\n") as file:
                # The first line is a version comment.
                lines = list(islice(file, 1, 1 + CLIP_MERGES))
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read as a merges file: {error}") from error
        if len(lines) < CLIP_MERGES:
            raise ValueError(
                f"{path} holds {len(lines)} merges: CLIP's file has at least {CLIP_MERGES}")
        return cls(line.split() for line in lines)

    def _merge_steps(self, symbols):
        """Play the merges back on one word: yield (pair, symbols after the merge) in order."""
        never = len(self.rank)
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, never))
            if pair not in self.rank:
                return
            symbols = merge_pair(symbols, pair)
            yield pair, symbols

    def _encode_word(self, word):
        """Encode one word: tuple of ids. They are remembered, because words come again."""
        ids = self._cache.get(word)
        if ids is None:
            symbols = word_symbols(word)
            for _, after in self._merge_steps(symbols):
                symbols = after
            ids = tuple(self.ids[symbol] for symbol in symbols)
            if len(self._cache) >= self.cache_size:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def encode(self, text):
        """Encode a caption (str) of any length: list of ids, without SOT and EOT.

        Raises ValueError for anything but a str.
        """
        return [i for word in split_words(text) for i in self._encode_word(word)]

    def decode(self, ids):
        """Turn ids (list or 1-D tensor) into text: the words with one space between them.

        Bytes that are not UTF-8 become U+FFFD. SOT and EOT come out as written above, padding as
        "!". From a row of `tokenize`, pass only the part between SOT and EOT.
        Raises ValueError for an id outside [0, vocab_size).
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
        """Turn captions (list of str, or one str) into a LongTensor (B, L), L = context_length.

        Each row holds SOT, the ids, EOT, and zeros up to L. Raises ValueError for L < 2, and for a
        caption that needs more than L ids. With `truncate` such a caption keeps its front,
        followed by EOT.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        if context_length < 2:
            raise ValueError(
                f"context_length must be at least 2, for SOT and EOT, not {context_length}")
        # Training sets repeat their captions: encode each distinct one once.
        rows = {}
        for caption in dict.fromkeys(map(require_str, captions)):
            ids = self.encode(caption)
            if len(ids) + 2 > context_length and not truncate:
                raise ValueError(
                    f"caption {caption[:60]!r} is too long: it takes {len(ids) + 2} tokens with "
                    f"start and end, and the model reads {context_length}: use a shorter caption"
                    + self._hint(caption))
            row = [self.sot_id, *ids[:context_length - 2], self.eot_id]
            rows[caption] = row + [0] * (context_length - len(row))
        found = torch.tensor([rows[caption] for caption in captions], dtype=torch.long)
        return found.view(-1, context_length)  # (B, L)

    def _hint(self, caption):
        """Name the words of a caption that are cut into four tokens or more; "" without them."""
        words = {word: len(self._encode_word(word)) for word in split_words(caption)}
        long = [f"{word[:20]!r} {n}" for word, n in words.items() if n >= 4]
        return f"; unknown and rare words take many tokens: {', '.join(long[:4])}" if long else ""

    def explain(self, text):
        """Show how a caption becomes ids, word by word and merge by merge: Explanation."""
        words = []
        for word in split_words(text):
            start = word_symbols(word)
            merges = [(self.rank[pair], *pair, after) for pair, after in self._merge_steps(start)]
            ids = list(self._encode_word(word))
            words.append(WordSteps(word, word.encode("utf-8"), start, merges, ids))
        return Explanation(text, clean(text), words, [i for step in words for i in step.ids])

    def state_dict(self):
        """Return plain values for a checkpoint or JSON: {"merges": ["left right", …]}."""
        return {"merges": [" ".join(pair) for pair in self.merges]}

    @classmethod
    def from_state_dict(cls, state):
        """Make the tokenizer that `state_dict` described. Raises ValueError for any other value."""
        is_state = isinstance(state, dict) and state.keys() == {"merges"}
        merges = state["merges"] if is_state else None
        if not isinstance(merges, list) or not all(isinstance(line, str) for line in merges):
            raise ValueError(
                'this is not the state of a tokenizer: it must be {"merges": ["left right", …]}')
        return cls(line.split(" ") for line in merges)
