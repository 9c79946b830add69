"""Steps of channels that become one after a unit has been trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qat.errors import QatError
from qat.ptq import AIQViT, Steps, TensorSearch
from qat.ptq.channel_steps import FoldChannels, SplitChannels
from qat.ptq.fold_norms import FoldNorms
from qat.ptq.is_vit import FitWeights
from qat.ptq.step import Stage, Step
from qat.ptq.unit_work import UnitWork
from qat.quantizers import LSQ, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.hooks import watching
from qat.sites.insert import quantizers, switched_off
from tests.ptq.test_output_search import MODELS, batches, tiny

AIQ = build_recipe("aiqvit", w_bits=3, a_bits=3)


class Codes(Step):
    """Keeps, by site, the groups and the codes of what the float model gives to layers behind norms."""

    stage = Stage.RECONSTRUCT

    def __init__(self) -> None:
        self.groups: dict[str, int] = {}
        self.codes: dict[str, Tensor] = {}

    def finish(self, here: UnitWork) -> None:
        sites = {name: q for name, q in quantizers(here.model) if name.endswith(("qkv.input_quant", "fc1.input_quant"))}
        seen: dict[str, Tensor] = {}
        with watching(sites, before=lambda name, args: seen.update({name: args[0]})), switched_off(here.off):
            here.unit.run(here.inputs[0])
        self.groups |= {name: sites[name].layout.groups for name in seen}
        self.codes |= {name: sites[name].encode(x) for name, x in seen.items()}


def test_codes_stay_what_they_were_when_channels_get_one_step():
    before, after = Codes(), Codes()
    Steps([SplitChannels(), TensorSearch(), before, FoldChannels(), FitWeights(), after])(tiny("deit", *AIQ), batches())
    assert before.groups == dict.fromkeys(after.codes, 24)
    assert after.groups == dict.fromkeys(after.codes, 1)
    assert len(after.codes) == 4
    for name, codes in before.codes.items():
        assert float((codes != after.codes[name]).float().mean()) < 1e-3, "values that lie between two codes"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fold", ["between", "after"])
def test_the_recipe_is_what_it_was(name, fold):
    model = tiny(name, *AIQ)
    kinds = {site: q.spec for site, q in quantizers(model)}
    method = AIQViT(iterations=2, batch=4, rank=2, fold=fold, more=2)
    method(model, batches())
    assert method.chosen == {}
    assert {site: q.spec for site, q in quantizers(model)} == kinds
    assert all(q.calibrated for _, q in quantizers(model))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([SplitChannels(), TensorSearch()], "SplitChannels needs FoldChannels after it in the list of steps"),
        ([TensorSearch(), FoldChannels()], "FoldChannels needs SplitChannels before it in the list of steps"),
    ],
)
def test_one_without_the_other_is_refused(steps, message):
    with pytest.raises(QatError, match=message):
        Steps(steps)
    with pytest.raises(QatError, match=r"FoldChannels needs SplitChannels before it"):
        FoldChannels()(tiny("deit", *AIQ), batches())


def test_channels_of_the_recipe_stay():
    rules = [*AIQ, Rule("blocks.0.attn.proj.input_quant", Uniform(3, granularity="channel"))]
    model = tiny("deit", *rules)
    Steps([SplitChannels(), TensorSearch(), FoldChannels()])(model, batches())
    assert model.get_submodule("blocks.0.attn.proj.input_quant").layout.groups == 24
    assert model.get_submodule("blocks.0.attn.qkv.input_quant").layout.groups == 1


def test_folded_weights_get_new_ranges():
    """Those that they have after a fold at once."""
    model, other = tiny("deit", *AIQ), tiny("deit", *AIQ)
    Steps([SplitChannels(), TensorSearch(), FoldChannels()])(model, batches())
    Steps([FoldNorms(), TensorSearch()])(other, batches())
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1"):
        step, expected = (m.get_submodule(f"{name}.weight_quant").step for m in (model, other))
        torch.testing.assert_close(step, expected, rtol=1e-3, atol=0)


def test_a_layer_at_the_side_is_not_rounded_again():
    with pytest.raises(QatError, match="AIQViT: with mode side, "):
        AIQViT(mode="side", fold="after")


def test_readers_without_uniform_are_refused():
    rules = [*AIQ, Rule("*.attn.qkv.input_quant", LSQ(3))]
    with pytest.raises(QatError, match=r"SplitChannels needs Uniform, granularity tensor, at .*qkv.input_quant"):
        Steps([SplitChannels(), TensorSearch(), FoldChannels()])(tiny("deit", *rules), batches())
