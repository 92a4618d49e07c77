"""Write tests/golden/tokenizer.json: the ids that CLIP's tokeniser gives to some captions, and those of its merges that it needs.

    python scripts/make_golden_tokenizer.py

Needs `pip install transformers open_clip_torch`: the second ships CLIP's list of merges, the first is the judge.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import transformers

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
MERGES = 49152 - 256 - 2  # of the list's lines that CLIP uses

CAPTIONS = [
    "an astronaut riding a horse",
    "A Hungry   DINOSAUR\n\tand a soaring bird",
    "it's we're I'll they'd you've I'm don't DON'T",
    "7, by hand; 1984 & 3.14",
    "naïve café — déjà vu",
    "cafe\u0301",  # decomposed
    "emoji 🦖🔥 and 日本語",
    "<|startoftext|>hello<|endoftext|> there",
    "!!! ... --- ((a)) #hash @you",
    "supercalifragilisticexpialidocious",
    "Straße ΣΊΣΥΦΟΣ ǅ İ",
    "a_b c-d e/f g\\h",
    "",
    "   ",
    "a photo of a cat, photorealistic, 8k, trending on artstation",
]


def main() -> None:
    with gzip.open(files("open_clip") / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    from tinydiff.tokenizer import BOS, BYTES, END, EOS

    alphabet = sorted(BYTES)
    merges = [tuple(line.split(" ")) for line in lines]
    symbols = [*alphabet, *(symbol + END for symbol in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab_file.write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
        merges_file.write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
        judge = transformers.CLIPTokenizer(str(vocab_file), str(merges_file))
        found = {caption: judge(caption)["input_ids"] for caption in CAPTIONS}
    # Every way in which a symbol that comes up may itself have been joined.
    parts = {"".join(pair): pair for pair in reversed(merges)}
    needed: set[str] = set()
    waiting = [symbols[number] for ids in found.values() for number in ids]
    while waiting:
        symbol = waiting.pop()
        if symbol in parts and symbol not in needed:
            needed.add(symbol)
            waiting += parts[symbol]
    kept = {rank: list(pair) for rank, pair in enumerate(merges) if "".join(pair) in needed}
    made_with = {"transformers": transformers.__version__}
    text = json.dumps({"made_with": made_with, "merges": kept, "ids": found}, ensure_ascii=False, indent=0)
    (GOLDEN / "tokenizer.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
