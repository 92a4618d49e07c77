"""Pictures to train on: the shipped digits, IDX files, folders of pictures, and the order in which training sees them."""

from tinydiff.data.batches import batch_indices
from tinydiff.data.dataset import Dataset, load
from tinydiff.data.download import fetch
from tinydiff.data.idx import read_idx, write_idx
