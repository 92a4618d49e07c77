"""Pictures to train on, with what is said of them, and the order in which training sees them."""

from tinydiff.data import shapes
from tinydiff.data.batches import batch_indices
from tinydiff.data.captions import Captions
from tinydiff.data.dataset import Dataset
from tinydiff.data.download import fetch
from tinydiff.data.idx import read_idx, write_idx
from tinydiff.data.pairs import Pairs, read_pairs
from tinydiff.data.sources import SHIPPED, SPECS, load
