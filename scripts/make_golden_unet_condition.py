"""Write tests/golden/unet_condition.json: the published UNet2DConditionModel's answers. Needs `pip install torch diffusers`.

    python scripts/make_golden_unet_condition.py

As for the UNet, weights and inputs are functions of their names, so the file holds only names, shapes and outputs.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import diffusers
import torch

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def main() -> None:
    weight = runpy.run_path(str(GOLDEN / "unet_cases.py"))["weight"]
    cases = runpy.run_path(str(GOLDEN / "unet_condition_cases.py"))
    found = {}
    for name, config in cases["CONFIGS"].items():
        model = diffusers.UNet2DConditionModel(**config).double().eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({k: torch.from_numpy(weight(k, tuple(s))).double() for k, s in shapes.items()})
        x, t, context, labels = cases["inputs"](config)
        with torch.no_grad():
            answer = model(
                torch.from_numpy(x).permute(0, 3, 1, 2).double(),
                torch.from_numpy(t),
                torch.from_numpy(context).double(),
                None if labels is None else torch.from_numpy(labels),
            ).sample
        output = answer.permute(0, 2, 3, 1)
        found[name] = {"shapes": shapes, "output": [round(v, 7) for v in output.flatten().tolist()]}
    made_with = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    text = json.dumps({"made_with": made_with, "cases": found}, separators=(",", ":"))
    (GOLDEN / "unet_condition.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
