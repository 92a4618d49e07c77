"""Draw README's table of scenes from words as curves over time, docs/words-shapes-curve.png: python scripts/make_words_curve.py

The numbers are the table's own, so run it after they have changed.
"""

from __future__ import annotations

from pathlib import Path

from tinydiff import figures

ROOT = Path(__file__).parent.parent
FIGURE = ROOT / "docs" / "words-shapes-curve.png"
FIRST = "steps of the UNet"  # column of the table that is looked for


def read_table(text: str) -> dict[str, list[float]]:
    """The columns, by their headings, of the table in `text` whose first one is FIRST. Raises ValueError if there is none."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {FIRST} |"):
            rows = []
            next(lines)  # the rule below the headings
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append([float(cell.strip(" *").replace(",", "")) for cell in row.strip("|").split("|")])
            return {name.strip(): list(column) for name, column in zip(line.strip("|").split("|"), zip(*rows))}
    raise ValueError(f"there is no table whose first column is {FIRST!r}")


def main() -> None:
    """Draw what README says."""
    table = read_table((ROOT / "README.md").read_text())
    _, (time, minutes), *shares = table.items()
    figure = figures.blank(7, 3.5)
    axes = figure.subplots()
    for index, (name, values) in enumerate(shares):
        whole = index == 0  # what the others are parts of
        axes.plot(minutes, values, marker="o", markersize=4, color="black" if whole else None, lw=2.5 if whole else 1, label=name)
    axes.set(xlabel=f"{time}, training the UNet", ylabel="share of pictures that are right", xlim=(0, None), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figures.save(figure, FIGURE, {"table": table})
    print(FIGURE)


if __name__ == "__main__":
    main()
