"""How much rows matter: against gradients taken another way. Shapes: B images, n rows of a layer's output."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.ptq import InitSteps
from qat.ptq.importance import LABELS, row_importance
from qat.sites.insert import quantizers, switched_off
from tests.ptq.test_output_search import batches, tiny

NAMES = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc2", "head")


def layers(model: nn.Module, *names: str) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in names or NAMES}


def drawn_labels(model: nn.Module) -> list[Tensor]:
    """`LABELS` for each image (B, LABELS), from the softmax of the float model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), switched_off(quantizer for _, quantizer in quantizers(model)):
        return [torch.multinomial(model(x).softmax(-1), LABELS, True, generator=generator) for x in batches()]


def probed(model: nn.Module, name: str, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the loss by zeros that are added to the output of a layer."""
    probes: list[Tensor] = []

    def add(module: nn.Module, args: object, out: Tensor) -> Tensor:
        probes.append(torch.zeros_like(out, requires_grad=True))
        return out + probes[-1]

    hook = model.get_submodule(name).register_forward_hook(add)
    with switched_off(quantizer for _, quantizer in quantizers(model)):
        F.cross_entropy(model(images), labels, reduction="sum").backward()
    hook.remove()
    assert probes[0].grad is not None
    return probes[0].grad


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_mean_square_of_the_gradient_of_every_row(name):
    model = tiny()
    found = row_importance(model, batches(), layers(model))[name]
    for (visit,), images, labels in zip(found, batches(), drawn_labels(model), strict=True):
        squares = torch.stack([probed(model, name, images, label).square() for label in labels.T]).mean(0)
        rows = squares.flatten(2).mT if squares.ndim == 4 else squares.view(2, -1, squares.shape[-1])  # patches
        torch.testing.assert_close(visit, rows.mean(-1))


def test_that_of_the_head_by_hand():
    """The gradient by the logits is the probabilities less the label."""
    model = tiny()
    found = row_importance(model, batches(), layers(model, "head"))["head"]
    for (visit,), images, labels in zip(found, batches(), drawn_labels(model), strict=True):
        with torch.no_grad(), switched_off(quantizer for _, quantizer in quantizers(model)):
            errors = model(images).softmax(-1)[:, None] - F.one_hot(labels, 10)  # (B, LABELS, classes)
        torch.testing.assert_close(visit, errors.square().mean((1, 2))[:, None])


def test_tokens_that_nothing_reads_have_none():
    """After the last attention only the class token is read; keys and values of all tokens are read before."""
    model = tiny()
    found = row_importance(model, batches(), layers(model))
    for name in ("blocks.1.attn.proj", "blocks.1.mlp.fc2"):
        for (visit,) in found[name]:
            assert not visit[:, 1:].any()
            assert (visit[:, 0] > 0).all()
    assert all((visit > 0).all() for (visit,) in found["blocks.1.attn.qkv"])


@pytest.mark.parametrize("name", ["swin", "sret"])
def test_there_is_one_number_for_every_row_of_every_visit(name):
    model = tiny(name)
    names = [key for key, module in model.named_modules() if hasattr(module, "weight_quant")]
    shapes: dict[str, list[int]] = {key: [] for key in names}
    hooks = [
        module.register_forward_hook(lambda m, args, out, key=key: shapes[key].append(
            out[:, 0].numel() if isinstance(getattr(m, "options", None), dict) else out[..., 0].numel()))
        for key, module in layers(model, *names).items()
    ]  # fmt: skip
    with torch.no_grad():
        model(batches()[0])
    for hook in hooks:
        hook.remove()
    found = row_importance(model, batches()[:1], layers(model, *names))
    assert {key: [visit.numel() for visit in visits] for key, (visits,) in found.items()} == shapes
    assert max(map(len, shapes.values())) == (2 if name == "sret" else 1)


@pytest.mark.parametrize("fails", [False, True])
def test_flags_gradients_and_switches_are_put_back(fails):
    model = tiny()
    InitSteps()(model, batches())
    model.head.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones(24)
    model.head.input_quant.enabled = False
    tensors = [*batches(), torch.zeros(1, 3, 8, 8)] if fails else batches()  # an image of another size

    def run() -> None:
        with torch.no_grad():
            row_importance(model, tensors, layers(model))

    if fails:
        with pytest.raises(AssertionError):
            run()
    else:
        run()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["norm.weight"]
    assert torch.equal(model.norm.weight.grad, torch.ones(24))
    assert [name for name, quantizer in quantizers(model) if not quantizer.enabled] == ["head.input_quant"]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(not images.requires_grad for images in tensors)


def test_the_same_images_have_the_same_importance():
    model = tiny()
    first, second = (row_importance(model, batches(), layers(model)) for _ in range(2))
    assert all(torch.equal(a, b) for name in first for (a,), (b,) in zip(first[name], second[name], strict=True))
