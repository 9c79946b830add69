"""Reconstruction of whole models: what is left behind, that it is repeated exactly, and that it does not make worse."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from qat.errors import QatError
from qat.ptq import FoldNorms, Reconstruct, Steps, TensorSearch
from qat.ptq.aphq_vit import PerturbationHessian
from qat.ptq.fima_q import FisherLowRank
from qat.ptq.reconstruction.adaround import AdaRound
from qat.ptq.reconstruction.curriculum import Curriculum
from qat.ptq.reconstruction.learned_weights import Nearest, WeightRule
from qat.ptq.reconstruction.low_rank import LowRank, RankSearch
from qat.ptq.reconstruction.straight_through import StraightThrough
from qat.ptq.reconstruction.training import Training
from qat.quantizers import DFQ, LSQ, Uniform
from qat.recipe import Rule, build_recipe
from qat.sites.insert import quantizers, switched_off, weights
from tests.ptq.test_output_search import MODELS, batches, state, tiny

SEARCHED = LowRank(lr=1e-3, search=RankSearch(candidates=[1, 3], iterations=2))
RULES = [Nearest(), AdaRound(), StraightThrough(lr=1e-3), LowRank(rank=3, lr=1e-3), SEARCHED]


def short(rule: WeightRule | None = None, **options) -> Reconstruct:
    return Reconstruct(**{"weights": rule, "iterations": 4, "batch": 3, "step_lr": 1e-3, **options})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.cat(batches()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__ + str(getattr(rule, "rank", "")))
def test_only_values_change(name, rule):
    model = tiny(name)
    before, kinds = state(model), [type(module) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    requires = [parameter.requires_grad for parameter in model.parameters()]
    Steps([TensorSearch(), short(rule, keep=0.5, input="mixed")])(model, batches())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert [type(module) for module in model.modules()] == kinds
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [parameter.requires_grad for parameter in model.parameters()] == requires
    assert all(parameter.grad is None for parameter in model.parameters())
    quantized = {name.removesuffix("_quant") for name, _, _ in weights(model) if name.endswith("weight_quant")}
    changed = {name for name, value in after.items() if name in before and not torch.equal(before[name], value)}
    left = {name for name in changed if not name.endswith((".step", ".zero_point"))}
    assert left <= quantized
    assert bool(left) == (not isinstance(rule, Nearest))


def test_it_is_repeated_exactly_and_a_seed_changes_it():
    found = []
    for seed in (0, 0, 1):
        model = tiny()
        Steps([TensorSearch(), short(StraightThrough(lr=1e-2), keep=0.5, input="mixed", seed=seed)])(model, batches())
        found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class Watched(Training):
    errors: ClassVar[list[tuple[float, float]]] = []

    def run(self, *args, **options) -> None:
        self.compared(self.images[: self.batch])
        before = self.error()
        super().run(*args, **options)
        self.errors.append((before, self.error()))


@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_the_loss_of_held_images_never_grows(lr, monkeypatch):
    """With a learning rate that destroys everything, the unit goes back to its start."""
    monkeypatch.setattr("qat.ptq.reconstruction.reconstruct.Training", Watched)
    monkeypatch.setattr(Watched, "errors", [])
    model, plain = tiny(), tiny()
    rule = StraightThrough(lr=lr)
    Steps([TensorSearch(), short(rule, iterations=20, step_lr=0, held=0.5)])(model, batches())
    Steps([TensorSearch()])(plain, batches())
    assert len(Watched.errors) == 4
    assert all(after <= before for before, after in Watched.errors)
    if lr == 1:
        assert torch.equal(logits(model), logits(plain))
    else:
        assert any(after < before for before, after in Watched.errors)


@pytest.mark.parametrize("rule", [AdaRound(), StraightThrough(lr=1e-3), LowRank(rank=3, lr=1e-3)], ids=str)
def test_the_model_computes_what_the_training_ended_with(rule, monkeypatch):
    """The output of every unit before and after its weights become plain ones, bit for bit."""
    ends: list[Tensor] = []

    class Ended(Training):
        def run(self, *args, **options) -> None:
            super().run(*args, **options)
            for module in self.modules:
                module.eval()
            ends.append(self.data.here.unit.run(self.data.inputs[:]))

    monkeypatch.setattr("qat.ptq.reconstruction.reconstruct.Training", Ended)
    model = tiny()
    Steps([TensorSearch(), short(rule)])(model, batches())
    assert torch.equal(ends[-1], logits(model))


def test_steps_as_logarithms_stay_positive():
    model = tiny()
    short(Nearest(), log_steps=True, step_lr=1.0, held=0, iterations=6)(model, batches())
    assert all(bool((quantizer.step > 0).all()) for _, quantizer in quantizers(model))


def test_intervals_of_probabilities_are_learned():
    rules = [*build_recipe("uniform", w_bits=4, a_bits=3), Rule("*.attn.probs_quant", DFQ(3))]
    plain, model = tiny("deit", *rules), tiny("deit", *rules)
    TensorSearch()(plain, batches())
    Steps([TensorSearch(), short(Nearest(), step_lr=0, interval_lr=1e-3, iterations=30, held=0)])(model, batches())
    sites = [name for name, quantizer in quantizers(model) if isinstance(quantizer.spec, DFQ)]
    assert any(not torch.equal(plain.get_submodule(s).high, model.get_submodule(s).high) for s in sites)
    others = [name for name, quantizer in quantizers(model) if isinstance(quantizer.spec, Uniform)]
    first = [name for name in others if name.startswith(("patch_embed", "blocks.0"))]
    assert all(torch.equal(plain.get_submodule(s).step, model.get_submodule(s).step) for s in first)


def test_the_rank_search_finds_the_rank_that_helps():
    """Images whose correction has rank 4: the logits leave the uniform mixture."""
    from qat.ptq.reconstruction import low_rank

    chosen = []
    real = low_rank.MixedRanks.rank

    def rank(self) -> int:
        chosen.append(self.alpha.detach().softmax(0))
        return real.fget(self)

    rule = LowRank(lr=1e-2, search=RankSearch(candidates=[1, 4, 16], iterations=150, alpha_lr=3e-2))
    try:
        low_rank.MixedRanks.rank = property(rank)
        short(rule, step_lr=0)(tiny("deit", *build_recipe("uniform", w_bits=2, a_bits=8)), batches(4))
    finally:
        low_rank.MixedRanks.rank = real
    assert len(chosen) == 10
    assert max(float(shares.max()) for shares in chosen) > 0.5


def test_hard_images_have_no_turn_before_their_time(monkeypatch):
    turns: list[Tensor] = []

    class Turns(Training):
        def iterate(self, adam, picks, progress) -> None:
            turns.append(picks)
            super().iterate(adam, picks, progress)

    monkeypatch.setattr("qat.ptq.reconstruction.reconstruct.Training", Turns)
    step = short(StraightThrough(), curriculum=Curriculum(refresh=0), iterations=8, batch=4, held=0)
    step(tiny(), batches(4))
    for t, _picks in enumerate(turns[:8]):
        allowed = Curriculum().count(t, 8, 8)
        assert len({int(i) for part in turns[: t + 1] for i in part}) <= allowed
    assert len({int(i) for part in turns[:8] for i in part}) >= 7


def test_a_model_without_quantizers_and_one_that_is_calibrated_stay_as_they_are():
    model = tiny("deit")
    TensorSearch()(model, batches())
    before = state(model)
    short(AdaRound())(model, batches())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_norms_are_folded_first():
    """What the other steps do comes before, also the rewrites; the float targets are those of the original weights."""
    model = tiny("deit", *build_recipe("repq_vit", w_bits=4, a_bits=4))
    Steps([FoldNorms(), TensorSearch(), short(AdaRound(), iterations=20)])(model, batches())
    plain = tiny("deit")
    with switched_off(quantizer for _, quantizer in quantizers(plain)):
        target = logits(plain)
    assert float((logits(model) - target).square().mean() / target.square().mean()) < 0.2


def test_a_weight_that_a_rule_cannot_learn_is_refused_before_any_work():
    rules = [*build_recipe("uniform", w_bits=4, a_bits=4), Rule("head.weight_quant", LSQ(4, offset=True))]
    with pytest.raises(QatError, match=r"AdaRound rounds to evenly spaced values, and 'head.weight_quant' has LSQ"):
        short(AdaRound())(tiny("deit", *rules), [])


def test_units_that_see_the_float_model_are_refused():
    with pytest.raises(QatError, match="Reconstruct reads what quantized units give"):
        Steps([TensorSearch(), short()], prefix="float")


@pytest.mark.parametrize("name", MODELS)
def test_models_without_quantized_attention_and_heads(name):
    """Fused attention has no forward derivative of its own, and a unit may have activations alone."""
    weight, image = Uniform(4, granularity="channel"), Uniform(8)
    hessian = short(StraightThrough(), loss=PerturbationHessian())
    for step, rule in ((hessian, Rule("*.weight_quant", weight)), (short(SEARCHED), Rule("*.input_quant", image))):
        model = tiny(name, rule)
        Steps([TensorSearch(), step])(model, batches())
        assert all(quantizer.calibrated for _, quantizer in quantizers(model))
        assert bool(logits(model).isfinite().all())


def test_products_are_computed_in_half_precision_where_that_is_wanted():
    for autocast in (False, True):
        model, seen = tiny(), set()
        hook = model.get_submodule("blocks.0.mlp.fc1").register_forward_hook(
            lambda m, x, out, seen=seen: seen.add(out.dtype)
        )
        Steps([TensorSearch(), short(LowRank(rank=2, lr=1e-2), autocast=autocast)])(model, batches())
        hook.remove()
        assert seen == ({torch.float32, torch.bfloat16} if autocast else {torch.float32})
        assert bool(logits(model).isfinite().all())
        assert all(value.dtype == torch.float32 for value in model.state_dict().values() if value.is_floating_point())


def test_what_is_trained_at_the_side_of_a_weight_leaves_its_layers_in_floating_point():
    model, merged = tiny(), tiny()
    step = short(LowRank(rank=2, lr=1e-2, mode="side"), iterations=20)
    method = Steps([TensorSearch(), step])
    method(model, batches())
    Steps([TensorSearch(), short(LowRank(rank=2, lr=1e-2), iterations=20)])(merged, batches())
    layers = {site.name for site in weights(merged) if site.name.endswith("weight_quant")}
    assert set(method.chosen) == set(method.report["bits_per_weight"]) == layers
    assert set(method.chosen.values()) == {None}
    assert not [site.name for site in weights(model) if site.name.endswith("weight_quant")]
    assert not torch.equal(logits(model), logits(merged))


def test_a_search_of_ranks_leaves_steps_where_they_were(monkeypatch):
    starts: list[list[Tensor]] = []

    class Started(Training):
        def run(self, *args, **options) -> None:
            starts.append(self.state())
            super().run(*args, **options)

    monkeypatch.setattr("qat.ptq.reconstruction.reconstruct.Training", Started)
    for rule in (SEARCHED, LowRank(rank=1)):
        short(rule, step_lr=0.3, iterations=1, held=0)(tiny(), batches())
    first, second = starts[0], starts[len(starts) // 2]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.ndim == 1)


def test_states_are_compared_by_one_measurement(monkeypatch):
    """FIMA-Q measures anew several times: then the error of the best state is computed again."""
    seen: list[list[Tensor]] = []
    real = Training._error_of

    def error_of(self, values):
        seen.append(values)
        return real(self, values)

    monkeypatch.setattr(Training, "_error_of", error_of)
    rule = StraightThrough(lr=1e-3)
    Steps([TensorSearch(), short(rule, loss=FisherLowRank(), iterations=10, checks=5)])(tiny(), batches())
    assert len(seen) == 3 * 4, "of three units, after each of the measurements but the first"


@pytest.mark.parametrize(("iterations", "checks", "compared"), [(10, 4, 4), (7, 4, 4), (5, 4, 3), (3, 4, 3)])
def test_how_many_states_are_compared(iterations, checks, compared, monkeypatch):
    counts: list[int] = []

    class Counted(Training):
        def error(self) -> float:
            counts[-1] += 1
            return super().error()

        def run(self, *args, **options) -> None:
            counts.append(0)
            super().run(*args, **options)

    monkeypatch.setattr("qat.ptq.reconstruction.reconstruct.Training", Counted)
    short(StraightThrough(), iterations=iterations, checks=checks)(tiny(), batches())
    assert set(counts) == {compared + 1}, "and the first one"
