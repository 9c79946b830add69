"""Options beside a checkpoint: which recipe is the one of its run."""

from pathlib import Path
from typing import Any

import pytest

from qat.checkpoint import Card
from qat.cli.agreement import check_agreement
from qat.errors import QatError
from qat.recipe import build_recipe

CKPT = Path("last.ckpt")


def card(leave_out: tuple[str, ...] = ()) -> Card:
    """Of a run with vvtq at 4 bits, when the recipe did not yet have some of its rules."""
    rules = [rule.to_dict() for rule in build_recipe("vvtq", w_bits=4, a_bits=4)]
    kept = [rule for rule in rules if rule["match"] not in leave_out]
    assert len(kept) == len(rules) - len(leave_out)
    return Card("deit_tiny_patch16_224", {}, 10, kept, {}, [])


def given(**options: Any) -> dict[str, Any]:
    return {"model": {"recipe": "vvtq", "w_bits": 4, "a_bits": 4, **options}}


def test_a_run_goes_on_after_its_recipe_has_got_rules_for_layers_of_other_families():
    check_agreement(card(("*.mlp_out_proj.input_quant", "pools.*.weight_quant")), CKPT, given())


def test_a_run_goes_on_after_its_quantizers_have_got_options():
    older = card()
    for rule in older.rules:
        if rule["spec"] is not None:
            del rule["spec"]["init_args"]["log_step"]
    check_agreement(older, CKPT, given())
    older.rules[0]["spec"]["init_args"]["log_step"] = True
    with pytest.raises(QatError, match=r"the recipe .* leave the option out"):
        check_agreement(older, CKPT, given())


@pytest.mark.parametrize(
    ("leave_out", "rules"),
    [
        (("*.attn.probs_quant",), []),  # every family has it
        ((), [{"match": "*.mlp.fc2.input_quant", "spec": None, "optional": True}]),
        ((), [{"match": "*.no_such_quant", "spec": None, "optional": True}]),  # given by the user, so it must be known
    ],
    ids=["lost", "overruled", "added"],
)
def test_another_recipe_is_a_contradiction(leave_out, rules):
    with pytest.raises(QatError, match=r"the recipe .* leave the option out"):
        check_agreement(card(leave_out), CKPT, given(rules=rules))
