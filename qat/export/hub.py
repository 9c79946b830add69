"""A folder for the Hugging Face hub: the config of the model and a model card beside the packed weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from qat.checkpoint import KEY, Card
from qat.errors import UNREADABLE, QatError
from qat.models.arch import without_tag
from qat.runs.writing import replacing
from qat.sites.describe import cost, summary

RESULTS = ("top1", "top5", "images")
USE = """```python
import qat

model = qat.load("model.safetensors")  # weights are stored as integers, and computed with as their values
logits = model(images)  # (B, 3, {size}, {size}), values 0 to 1 less {mean}, over {std}
```

```bash
qat validate --ckpt model.safetensors --data.root DIR     # DIR/val/<class>/<image>
qat predict --ckpt model.safetensors --data.images PHOTOS --output predictions.csv
```
"""


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of evaluations, for a model card; QatError for a file that holds none."""
    found = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, *UNREADABLE) as error:
            raise QatError(f"--results: cannot read {file}: {error}") from None
        if not isinstance(content, dict) or not all(isinstance(content.get(key), int | float) for key in RESULTS):
            raise QatError(
                f"--results: {file} has no top1, top5 and images: give what qat validate --results_file wrote"
            )
        found.append(content)
    return found


def _how(results: Mapping[str, Any]) -> str:
    """What is to be said of an accuracy that is not the simulation's."""
    return ", computed with integers" if results.get("products") else ""


def write_config(path: Path, model: nn.Module, card: Card) -> None:
    """Write config.json as timm has it for a model on the hub, with the rules of the quantizers."""
    seen = card.preprocessing
    own: Any = model
    pretrained = {
        "input_size": [3, seen["size"], seen["size"]], "interpolation": seen["interpolation"],
        "crop_pct": seen["size"] / seen["resize"], "mean": seen["mean"], "std": seen["std"],
        "num_classes": card.num_classes,
    }  # fmt: skip
    config = {
        "architecture": card.arch, "num_classes": card.num_classes, "num_features": own.num_features,
        "model_args": card.model_args, "pretrained_cfg": pretrained,
        **({"label_names": card.classes} if card.classes else {}),
        "quantization_config": {"quant_method": "qat", "rules": card.rules},
    }  # fmt: skip
    with replacing(path) as file:
        file.write(json.dumps(config, indent=2) + "\n")


def write_model_card(
    path: Path, model: nn.Module, card: Card, content: Mapping[str, Any], report: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]], base: str | None,
) -> None:  # fmt: skip
    """Write the model card.

    Args:
        path: of README.md.
        model: quantized.
        card: of the model.
        content: of its checkpoint.
        report: of the export.
        results: of evaluations; what was not measured is not claimed.
        base: the float model on the hub; that of timm's weights when None, if the architecture names them.
    """
    if base is None and without_tag(card.arch) != card.arch:
        base = getattr(model, "pretrained_cfg", {}).get("hf_hub_id")
    front = {
        "library_name": "qat", "pipeline_tag": "image-classification", "tags": ["image-classification", "quantization"],
        **({} if base is None else {"base_model": base, "base_model_relation": "quantized"}),
    }  # fmt: skip
    calibration = content[KEY].get("calibration", {})
    costs = cost(model, card.preprocessing["size"])
    steps = content.get("global_step", 0)
    made = [f"calibrated by `{calibration['method']}` on {calibration['images']} images"] if calibration else []
    made += [f"trained for {steps} steps"] if steps else []
    lines = [
        f"| quantizers | {summary(model)} |",
        *([f"| made by | {', then '.join(made)} |"] if made else []),
        f"| file | {report['size_mb']:.2f} MB (float32: {report['float_size_mb']:.2f} MB) |",
        f"| bit operations | {costs.bit_operations / 1e9:.2f} G per image "
        f"(float32: {costs.float_bit_operations / 1e9:.2f} G) |",
        *(
            f"| top-1, top-5 | {r['top1']:.2f} %, {r['top5']:.2f} % on {r['images']} validation images{_how(r)} |"
            for r in results
        ),
    ]
    if not results:
        lines.append("| top-1 | not measured |")
    text = USE.format(**card.preprocessing)
    with replacing(path) as file:
        file.write(f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {card.arch}, quantized\n\n")
        file.write("\n".join(["| | |", "|---|---|", *lines]) + f"\n\n{text}")
