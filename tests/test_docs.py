"""Pictures in docs/ that are drawn from README's numbers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tinydiff.images import read_png_metadata

ROOT = Path(__file__).parents[1]
CURVE = ROOT / "scripts" / "make_words_curve.py"

pytestmark = pytest.mark.skipif(not CURVE.is_file(), reason="the scripts are in the repository only")


def test_a_table_is_read() -> None:
    read_table = runpy.run_path(str(CURVE))["read_table"]
    before, after = "| steps | shares |\n|---|---|\n| 1 | 2 |\n\nwords\n", "\nmore\n| 8 | 9 | 10 |"
    table = "| steps of the UNet | minutes | colour, shape |\n|---|---|---|\n| 962 | 6 | 0.01 |\n| 7,000 | 41 | **0.844** |\n"
    expected = {"steps of the UNet": [962, 7000], "minutes": [6, 41], "colour, shape": [0.01, 0.844]}
    assert read_table(before + table + after) == read_table(table) == expected
    with pytest.raises(ValueError, match="no table whose first column is 'steps of the UNet'"):
        read_table(before + after)


def test_the_curve_is_that_of_the_table() -> None:
    script = runpy.run_path(str(CURVE))
    drawn = json.loads(read_png_metadata(script["FIGURE"])["table"])
    assert drawn == script["read_table"]((ROOT / "README.md").read_text()), "draw it anew: python scripts/make_words_curve.py"
