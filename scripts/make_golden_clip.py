"""Write tests/golden/clip.json: the published CLIP's answers. Needs `pip install torch transformers`.

    python scripts/make_golden_clip.py

As for the UNet, weights and inputs are functions of their names, so the file holds only names, shapes and outputs.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch
import transformers

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def published(config: dict[str, Any]) -> Any:
    """The published model, in float64."""
    both = transformers.CLIPConfig(**config)
    both.text_config.bos_token_id = 38
    return transformers.CLIPModel(both).double().eval()


def filled(model: Any, weight: Any) -> dict[str, list[int]]:
    """Give the model weights that follow from their names in files; returns the shapes by these."""
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("position_ids")}
    model.load_state_dict({n: torch.from_numpy(weight(n, tuple(v.shape))).double() for n, v in state.items()}, strict=False)
    return {name: list(value.shape) for name, value in state.items()}


def main() -> None:
    weight = runpy.run_path(str(GOLDEN / "unet_cases.py"))["weight"]
    cases = runpy.run_path(str(GOLDEN / "clip_cases.py"))
    found = {}
    for name, config in cases["CONFIGS"].items():
        model = published(config)
        shapes = filled(model, weight)
        ids, pictures = cases["inputs"](config)
        with torch.no_grad():
            answer = model(torch.from_numpy(ids), torch.from_numpy(pictures).permute(0, 3, 1, 2).double())
        answers = {
            "hidden": answer.text_model_output.last_hidden_state,
            "text": answer.text_embeds,
            "image_hidden": answer.vision_model_output.last_hidden_state,
            "image": answer.image_embeds,
            "logits": answer.logits_per_image,
        }
        found[name] = {"shapes": shapes} | {k: [round(v, 7) for v in x.flatten().tolist()] for k, x in answers.items()}
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({"made_with": made_with, "cases": found}, separators=(",", ":"))
    (GOLDEN / "clip.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
