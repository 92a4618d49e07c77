"""Make the two shipped models from the MNIST files: python scripts/make_shipped.py MNIST_FOLDER

The frozen classifier that judges drawn pictures (FID and accuracy compare across runs only under the same one), and a small
denoiser, so that `tinydiff sample digits` draws with nothing trained. Some 20 minutes on two cores. The denoiser is stored in
half precision to stay under 2 MB. With --classifier or --denoiser, a run that is there already is taken instead of training.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from tinydiff import io, tasks
from tinydiff.pipeline import SHIPPED, model_folder
from tinydiff.run import Run
from tinydiff.train import train

RECIPES = {
    "classifier": {"steps": 8000},
    "denoiser": {"minutes": 10.0, "class_drop": 0.1, "model.block_out_channels": [32, 48, 64]},
}


def ship(run: Path, name: str, half: bool) -> None:
    """Copy a run's model, with the shipped digits as the data it belongs to."""
    source, target = model_folder(run), SHIPPED / name
    weights = io.load_weights(source / "model.safetensors")
    if half:
        weights = {key: array.astype(np.float16) for key, array in weights.items()}
    target.mkdir(parents=True, exist_ok=True)
    io.save_weights(target / "model.safetensors", weights)
    io.write_json(target / "config.json", io.read_json(source / "config.json") | {"data": "digits"})
    print(f"{target}: {(target / 'model.safetensors').stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the folder with the four MNIST IDX files")
    for name in RECIPES:
        parser.add_argument(f"--{name}", type=Path, help=f"the run folder of a {name} trained before")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, shipped, half in (("classifier", "classifier", False), ("denoiser", "digits", True)):
            run = getattr(arguments, name)
            if run is None:
                run = Path(folder) / name
                config = tasks.configure(name, options=RECIPES[name] | {"data": f"mnist:{arguments.folder}"})
                train(Run.create(run, config))
            ship(run, shipped, half)


if __name__ == "__main__":
    main()
