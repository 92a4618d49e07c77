"""Captions to numbers: the byte-pair tokeniser of CLIP, trained on any captions or read from CLIP's own files.

A caption is brought to composed characters (NFC), single spaces and lower case, and split into words, single digits and runs of
other signs. A word begins as its UTF-8 bytes, each written as one printable character, the last with "</w>" behind it; then the
pair of neighbours that comes first in the list of merges becomes one symbol, again and again (Sennrich et al. 2016). So no text
is unknown, and frequent words are one token each.
"""

from __future__ import annotations

import heapq
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex

from tinydiff import io

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"  # of a word
HEADER = "#version: 0.2"
LENGTH = 77  # tokens of a caption in the published models, with BOS and EOS
MAX_MERGES_BYTES = 16 * 2**20

_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
Pair = tuple[str, str]


class Truncation(UserWarning):
    """A caption has more tokens than fit, and its end is dropped."""


def _byte_symbols() -> list[str]:
    """One printable character for each byte, as GPT-2 has them: its own where it is printable, else the next from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTES = _byte_symbols()
# The order of CLIP's vocabulary: printable bytes first, then the others; these again as ends of words; merges; BOS and EOS.
_ALPHABET = sorted(BYTES)
_BYTE_OF = {symbol: byte for byte, symbol in enumerate(BYTES)}


def normalise(text: str) -> str:
    """NFC, every run of white space one space, none at the ends, lower case."""
    text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()
    return "".join(map(str.lower, text))  # letter by letter: as the published tokeniser, which knows no final sigma


def split(text: str) -> list[str]:
    """The normalised text's words, single digits and runs of other signs; white space is dropped."""
    return _PIECES.findall(normalise(text))


class Tokenizer:
    """Captions to integers and back.

    Args:
        vocab: every symbol with its number, 0 up to their count, each once; BOS and EOS among them.
        merges: pairs of symbols in the order in which they are joined.
        length: numbers in a caption's row, BOS and EOS included.
    Raises ValueError for a vocabulary that lacks something or has gaps.

    Attributes:
        bos, eos: the numbers that begin a caption, and end and pad it.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Pair], length: int = LENGTH) -> None:
        if length < 3:
            raise ValueError(f"a tokeniser's length must be at least 3, to hold more than BOS and EOS; got {length}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"a vocabulary of {len(vocab)} symbols numbers them 0 to {len(vocab) - 1}, each once")
        needed = [BOS, EOS, *BYTES, *(symbol + END for symbol in BYTES), *(a + b for a, b in merges)]
        missing = [symbol for symbol in needed if symbol not in vocab]
        if missing:
            raise ValueError(f"the vocabulary lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
        self.vocab, self.merges, self.length = dict(vocab), list(merges), length
        self.bos, self.eos = vocab[BOS], vocab[EOS]
        self._symbols = {number: symbol for symbol, number in vocab.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._numbers = lru_cache(1 << 16)(self._word_numbers)

    def __len__(self) -> int:
        """How many symbols there are."""
        return len(self.vocab)

    # ------------------------------------------------------------------------------------------------------------- training

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 1024, length: int = LENGTH) -> Tokenizer:
        """Learn merges from captions, until the vocabulary has `vocab_size` symbols or no pair is met twice.

        The same captions, in any order, give the same tokeniser: of equally frequent pairs the alphabetically first is joined.
        Raises ValueError when `vocab_size` doesn't hold the 514 symbols that are always there.
        """
        always = 2 * len(BYTES) + 2
        if vocab_size < always:
            raise ValueError(f"vocab_size = {vocab_size} is too small: bytes, ends of words, BOS and EOS take {always}")
        counts = Counter(word for caption in captions for word in split(caption) if word not in (BOS, EOS))
        merges = _learn(counts, vocab_size - always)
        symbols = [*_ALPHABET, *(symbol + END for symbol in _ALPHABET), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
        return cls({symbol: number for number, symbol in enumerate(symbols)}, merges, length)

    # ---------------------------------------------------------------------------------------------------------------- files

    @classmethod
    def load(cls, folder: str | Path, length: int = LENGTH) -> Tokenizer:
        """Read `vocab.json` and `merges.txt`. Raises FileNotFoundError, or ValueError naming the file and what is wrong."""
        vocab_path, merges_path = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab = io.read_json(vocab_path)
        for symbol, number in vocab.items():
            if type(number) is not int:
                raise ValueError(f"{vocab_path}: {symbol!r} has the number {number!r}; expected an integer")
        merges = _read_merges(merges_path)
        try:
            return cls(vocab, merges, length)
        except ValueError as error:
            raise ValueError(f"{folder} holds no tokeniser: {error}") from None

    def save(self, folder: str | Path) -> None:
        """Write `vocab.json` and `merges.txt` into a folder, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        io.write_json(Path(folder) / "vocab.json", self.vocab)
        lines = [HEADER, *(f"{a} {b}" for a, b in self.merges), ""]
        io.write_atomic(Path(folder) / "merges.txt", "\n".join(lines).encode())

    # ------------------------------------------------------------------------------------------------------ there and back

    def encode(self, text: str) -> list[int]:
        """The numbers of a text, without BOS, EOS or a limit. Raises ValueError for text that UTF-8 can't hold."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} is no text: it holds half a character ({error.reason})") from None
        return [number for word in split(text) for number in self._numbers(word)]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text again, normalised, with a space between words; BOS and EOS are left out.

        Bytes that make no character (of a text that was cut) become "\N{REPLACEMENT CHARACTER}". Raises ValueError for numbers
        that stand for nothing.
        """
        data = bytearray()
        for number in map(int, numbers):
            if number not in self._symbols:
                raise ValueError(f"{number} is no token: there are {len(self)}, from 0")
            if number in (self.bos, self.eos):
                continue
            symbol = self._symbols[number]
            data += bytes(_BYTE_OF[character] for character in symbol.removesuffix(END))
            data += b" " * symbol.endswith(END)
        return data.decode(errors="replace").rstrip(" ")

    def __call__(self, captions: str | Iterable[str]) -> np.ndarray:
        """Captions to int64 (N, length): BOS, tokens, EOS, and EOS to fill the row. Warns (`Truncation`) of what doesn't fit."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        rows = np.full((len(captions), self.length), self.eos, np.int64)
        for row, caption in zip(rows, captions):
            numbers = self.encode(caption)
            kept = numbers[: self.length - 2]
            row[0], row[1 : 1 + len(kept)] = self.bos, kept
            if len(kept) < len(numbers):
                what = f"{caption!r} has {len(numbers)} tokens and {len(kept)} fit; dropped: {self.dropped(caption)!r}"
                warnings.warn(what, Truncation, stacklevel=2)
        return rows

    def dropped(self, caption: str) -> str:
        """The end of a caption that a row has no room for; "" if all of it fits."""
        return self.decode(self.encode(caption)[self.length - 2 :])

    def _word_numbers(self, word: str) -> tuple[int, ...]:
        if word in (BOS, EOS):
            return (self.vocab[word],)
        symbols = _spell(word)
        while len(symbols) > 1:
            first = min(pairwise(symbols), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if first not in self._ranks:
                break
            symbols = _join(symbols, first)
        return tuple(self.vocab[symbol] for symbol in symbols)


def _spell(word: str) -> list[str]:
    """A word as its bytes' symbols, the last one ending it."""
    symbols = [BYTES[byte] for byte in word.encode()]
    symbols[-1] += END
    return symbols


def _join(symbols: Sequence[str], pair: Pair) -> list[str]:
    """Every `pair` among the symbols, from the left, made one."""
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            joined.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return joined


def _learn(counts: Mapping[str, int], most: int) -> list[Pair]:
    """Up to `most` merges: each time the pair that is met most often in words counted so, as long as it is met twice."""
    words = [(_spell(word), count) for word, count in counts.items()]
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, (symbols, count) in enumerate(words):
        for pair in pairwise(symbols):
            pairs[pair] += count
            where[pair].add(index)
    # Entries whose count has changed since stay in the heap and are passed over: each change adds one with the new count.
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < most:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            continue
        if -count < 2:
            break
        merges.append(best)
        changed: set[Pair] = set()
        for index in where.pop(best):
            symbols, times = words[index]
            joined = _join(symbols, best)
            for pair in pairwise(symbols):
                pairs[pair] -= times
                changed.add(pair)
            for pair in pairwise(joined):
                pairs[pair] += times
                where[pair].add(index)
                changed.add(pair)
            words[index] = joined, times
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return merges


def _read_merges(path: Path) -> list[Pair]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size > MAX_MERGES_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than merges ever need ({MAX_MERGES_BYTES})")
    try:
        lines = path.read_bytes().decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    merges: dict[Pair, None] = {}
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not (left and right) or " " in right:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is no merge; expected two symbols with a space between")
        if (left, right) in merges:
            raise ValueError(f"{path}, line {number}: {line[:60]!r} comes a second time")
        merges[left, right] = None
    return list(merges)
