"""Write tests/golden/autoencoder.json: the published AutoencoderKL's answers. Needs `pip install torch diffusers`.

    python scripts/make_golden_autoencoder.py

As for the UNet, weights and inputs are functions of their names, so the file holds only names, shapes and outputs.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import diffusers
import numpy as np
import torch

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def _first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).double()


def _rounded(x: torch.Tensor) -> list[float]:
    return [round(v, 6) for v in (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten().tolist()]


def main() -> None:
    weight = runpy.run_path(str(GOLDEN / "unet_cases.py"))["weight"]
    cases = runpy.run_path(str(GOLDEN / "autoencoder_cases.py"))
    found = {}
    for name, config in cases["CONFIGS"].items():
        model = diffusers.AutoencoderKL(**config).double().eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({k: torch.from_numpy(weight(k, tuple(s))).double() for k, s in shapes.items()})
        x, z = cases["inputs"](config)
        with torch.no_grad():
            latents = model.encode(_first(x)).latent_dist
            decoded = model.decode(_first(z)).sample
        answers = {"mean": latents.mean, "logvar": latents.logvar, "kl": latents.kl(), "decoded": decoded}
        found[name] = {"shapes": shapes} | {key: _rounded(value) for key, value in answers.items()}
    made_with = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    text = json.dumps({"made_with": made_with, "cases": found}, separators=(",", ":"))
    (GOLDEN / "autoencoder.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
