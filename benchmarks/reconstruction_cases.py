"""The cases of `ptq.py` that reconstruct units: every method from the same start, and the parts of AIQViT.

Published iterations are 20,000 for each unit (BRECQ, QDrop and the losses on them), 3,000 (GLF-Q), 2,000 and 6,000
(AIQViT), twice 1,000 (I&S-ViT), of 32 images. Fewer, and smaller batches, need larger learning rates. At W3A3, QDrop
with 800 iterations of 4 images is nearer to the float model on 232 held-out training images than with 200 of 16, which
take as long (KL 0.90 and 0.97). An iteration of GLF-Q goes through the whole network and takes eight times as long, so
that it has an eighth of the iterations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from case import Case

from qat.ptq import BRECQ, FIMAQ, GLFQ, AIQViT, APHQViT, ISViT, PDQuant, PTQMethod, QDrop, Reconstruct, Steps
from qat.ptq.brecq import FisherDiagonal
from qat.ptq.frontier import IMPORTANCE, start
from qat.ptq.reconstruction.curriculum import Curriculum
from qat.ptq.reconstruction.learned_weights import Nearest
from qat.ptq.reconstruction.low_rank import RankSearch

IMAGES = 768  # of the 1,000; the others are held out
ITERATIONS = 1000  # for each unit
BATCH = 4
WIDTHS = (4, 3)


def methods(iterations: int) -> Iterator[tuple[str, str, PTQMethod]]:
    """Name, recipe and method of every way to reconstruct, and of the parts of AIQViT."""
    short: dict[str, Any] = {"iterations": iterations, "batch": BATCH}
    rounding = {**short, "lr": 1e-2, "step_lr": 1e-3, "log_steps": True}
    yield "BRECQ", "frontier", BRECQ(**rounding)
    yield "BRECQ Fisher", "frontier", BRECQ(**rounding, loss=FisherDiagonal())
    yield "QDrop", "frontier", QDrop(**rounding)
    yield "APHQ", "frontier", APHQViT(**rounding)
    yield "FIMA", "frontier", FIMAQ(**rounding)
    yield "PD-Quant", "frontier", PDQuant(**rounding)
    yield "GLF", "frontier", GLFQ(**{**short, "iterations": iterations // 8})
    yield "I&S", "is_vit", ISViT(**short)
    yield "I&S, fold between", "is_vit", ISViT(**short, fold="between")
    few: dict[str, Any] = {**short, "lr": 2e-4, "search": RankSearch(iterations=max(1, iterations // 3))}
    yield "AIQViT", "aiqvit", AIQViT(**few)
    yield "AIQViT slow", "aiqvit", AIQViT(**{**few, "lr": 4e-5})
    for rank in (20, 100):
        yield f"AIQViT {rank}", "aiqvit", AIQViT(**few, rank=rank)
    yield "AIQViT 20, side", "aiqvit", AIQViT(**few, rank=20, mode="side")
    yield "AIQViT 20, requantized", "aiqvit", AIQViT(**few, rank=20, mode="requantized")
    yield "AIQViT 20, fold between", "aiqvit", AIQViT(**few, rank=20, fold="between", more=iterations)
    yield "AIQViT 20, fold after", "aiqvit", AIQViT(**few, rank=20, fold="after", more=iterations)
    yield "AIQViT 20, no CL", "aiqvit", AIQViT(**few, rank=20, curriculum=None)
    yield "AIQViT 20, no DFQ", "uniform", AIQViT(**few, rank=20)
    yield "AIQViT 20, AILoC", "uniform", AIQViT(**few, rank=20, curriculum=None)
    for what, order in (("DFQ and CL", Curriculum()), ("DFQ", None)):
        step = Reconstruct(weights=Nearest(), step_lr=0.0, curriculum=order, **short)
        yield f"AIQViT, {what}", "aiqvit", Steps([*start(), step], importance=IMPORTANCE)


def cases() -> Iterator[Case]:
    """All of them, and the start alone."""
    for bits in WIDTHS:
        for recipe in ("frontier", "aiqvit", "is_vit", "uniform"):
            alone = Steps(start(), importance=IMPORTANCE)
            yield Case(recipe, alone, bits, bits, IMAGES, f"reconstruct/start {recipe}")
        for name, recipe, method in methods(ITERATIONS):
            yield Case(recipe, method, bits, bits, IMAGES, f"reconstruct/{name}")


RECONSTRUCTIONS = list(cases())
