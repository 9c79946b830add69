"""The cases of `ptq.py`: recipes, methods and widths; the goals, and what papers have published."""

from __future__ import annotations

from typing import Any

from case import Case, by_head
from reconstruction_cases import RECONSTRUCTIONS

from qat.ptq.apq_vit import APQViT
from qat.ptq.base import PTQMethod
from qat.ptq.choose_softmax import ChooseSoftmax
from qat.ptq.fold_norms import FoldNorms
from qat.ptq.frontier import Frontier
from qat.ptq.init_steps import InitSteps
from qat.ptq.observe import Observe
from qat.ptq.output_search import OutputSearch
from qat.ptq.ptq4vit import PTQ4ViT
from qat.ptq.repq_vit import RepQViT
from qat.ptq.rotate_heads import RotateHeads
from qat.ptq.steps import Steps
from qat.ptq.tensor_search import TensorSearch
from qat.ptq.weight_correction import GPTQ, BiasCorrection, Ridge

FORMS = ("single_16", "single_17", "half_16", "half_17")
HEADS = (by_head("*.attn.[qkv]_quant"), by_head("*.attn.probs_quant"))
REWRITES = (RotateHeads(), FoldNorms())
MILD = (RotateHeads(), FoldNorms(strength=None))  # the strength of each fold is chosen, as Frontier does it
SEARCHES = (TensorSearch(), OutputSearch(rounds=2))
CORRECTIONS = (Ridge(), GPTQ(alpha=0.0))
OURS = 0.25  # importance, as Frontier has it
ABLATION: tuple[tuple[str, str, tuple[dict[str, Any], ...], PTQMethod], ...] = (  # what is added, recipe, rules, method
    ("00 uniform", "uniform", (), Steps([TensorSearch(levels=0)])),
    ("01 fold", "uniform", (), Steps([FoldNorms(), TensorSearch(levels=0)])),
    ("02 heads", "uniform", HEADS, Steps([FoldNorms(), TensorSearch(levels=0)])),
    ("03 rotation", "uniform", HEADS, Steps([*REWRITES, TensorSearch(levels=0)])),
    ("04 search", "uniform", HEADS, Steps([*REWRITES, TensorSearch(levels=0), OutputSearch(rounds=2, levels=0)])),
    ("05 FPCS", "uniform", HEADS, Steps([*REWRITES, *SEARCHES])),
    ("06 AdaLog", "frontier", (), Steps([*REWRITES, *SEARCHES])),
    ("07 importance", "frontier", (), Steps([*REWRITES, *SEARCHES], importance=OURS)),
    ("08 strength", "frontier", (), Steps([*MILD, *SEARCHES], importance=OURS)),
    ("09 ridge", "frontier", (), Steps([*MILD, *SEARCHES, Ridge()], importance=OURS)),
    ("10 GPTQ", "frontier", (), Steps([*MILD, *SEARCHES, *CORRECTIONS], importance=OURS)),
    # the rotation of the residual stream is added last: frontier Frontier
    ("11 bias", "frontier", (), Steps([*MILD, *SEARCHES, *CORRECTIONS, BiasCorrection()], importance=OURS)),
)
VARIANTS = {  # of ablation/10, for what else could be in its list
    "choose softmax": Steps([*MILD, TensorSearch(), ChooseSoftmax(), SEARCHES[1], *CORRECTIONS], importance=OURS),
    "GPTAQ": Steps([*MILD, *SEARCHES, Ridge(), GPTQ(alpha=0.25)], importance=OURS),
}


def adalog() -> Steps:
    """The calibration of AdaLog; units see what the units before them have quantized, which is better than float."""
    return Steps([FoldNorms(), TensorSearch(), OutputSearch()])


FRONTIER = "frontier Frontier"
CASES = [
    *(Case("frontier", Frontier(), bits, bits, 32) for bits in (4, 3, 2, 5, 6, 7, 8)),
    *(Case("frontier", Frontier(), bits, bits, 128) for bits in (4, 3)),
    *(Case("deploy", Frontier(), bits, bits, 32) for bits in (4, 8)),
    *(Case("frontier", method, n, n, 32, f"ablation/10 {what}") for n in (4, 3) for what, method in VARIANTS.items()),
    *(Case(recipe, method, n, n, 32, f"ablation/{what}", rules)
      for n in (4, 3) for what, recipe, rules, method in ABLATION),
    *(Case(f"adalog{end}", adalog(), bits, bits, 32, f"adalog{end} AdaLog")
      for bits in (4, 3, 6) for end in ("", "_released")),
    *(Case(f"ptq4vit{end}", PTQ4ViT(), bits, bits, 32) for bits in (4, 6, 8) for end in ("", "_released")),
    *(Case("apq_vit", APQViT(), bits, bits, 32) for bits in (4, 6)),
    *(Case(f"repq_vit{end}", RepQViT(), bits, bits, 32) for bits in (4, 6, 3) for end in ("", "_released")),
    *(Case(f"bitlog2_{form}{end}", RepQViT(), 4, 4, 32) for end in ("", "_released") for form in FORMS),
    *(Case("uniform_full", Observe(kind), 8, 8, n) for n in (256, 1000) for kind in ("minmax", "percentile", "omse")),
    *(Case(f"fq_vit_{bits}{end}", Observe("minmax"), 8, 8, n)
      for n in (256, 1000) for end in ("", "_released") for bits in ("888", "884")),
    *(Case("uniform", Observe(kind), 4, 4, 256) for kind in ("minmax", "ema", "percentile", "omse")),
    *(Case("uniform", method, n, n, 32) for n in (4, 3) for method in (InitSteps(), RepQViT(), OutputSearch())),
    *(Case("uniform", OutputSearch(), n, n, 32) for n in (6, 8)),
    *RECONSTRUCTIONS,
]  # fmt: skip
GOALS = {4: 7.0, 3: 30.0, 6: 0.8, 8: 0.3}  # the largest drop of FRONTIER on 32 images, by width
PUBLISHED_FLOAT = 72.21
PUBLISHED = {  # top-1 of DeiT-Tiny on all of ImageNet's validation images, by name without the number of images
    "adalog_released AdaLog W4A4": 63.52, "adalog_released AdaLog W3A3": 31.56, "adalog_released AdaLog W6A6": 71.38,
    "ptq4vit_released PTQ4ViT W4A4": 36.96, "apq_vit APQViT W4A4": 47.94,
    "ptq4vit_released PTQ4ViT W6A6": 69.68, "apq_vit APQViT W6A6": 70.49,
    "repq_vit_released RepQViT W4A4": 57.43, "repq_vit_released RepQViT W6A6": 70.76,
    "repq_vit_released RepQViT W3A3": 0.97,
    "bitlog2_single_16_released RepQViT W4A4": 57.27, "bitlog2_single_17_released RepQViT W4A4": 57.10,
    "bitlog2_half_16_released RepQViT W4A4": 57.66, "bitlog2_half_17_released RepQViT W4A4": 58.35,
    "uniform_full minmax W8A8": 70.94, "uniform_full percentile W8A8": 71.47, "uniform_full omse W8A8": 71.30,
    "fq_vit_888_released minmax W8A8": 71.61, "fq_vit_884_released minmax W8A8": 71.07,
}  # fmt: skip
