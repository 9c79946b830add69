"""The recipe: rules, words for widths, and messages that name what is wrong."""

import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from qat.errors import QatError
from qat.quantizers import LSQ, PTF, AdaLog, IntegerNorm, Uniform
from qat.quantizers.spec import Spec
from qat.recipe import Rule, build_recipe, read_rules, resolve, spec_from_dict

LSQ4 = {"class_path": "LSQ", "init_args": {"bits": 4}}
NAMED = sorted(Path(entry.name).stem for entry in resources.files("qat.recipes").iterdir() if ".yaml" in entry.name)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(Spec, "kinds", dict(Spec.kinds))  # a quantizer defined by a test leaves with it


def recipe_file(folder: Path, rules: object) -> str:
    path = folder / "mine.yaml"
    path.write_text(rules if isinstance(rules, str) else yaml.safe_dump(rules), encoding="utf-8")
    return str(path)


def test_the_last_rule_that_matches_wins():
    rules = [Rule("*", LSQ(8)), Rule("blocks.*", LSQ(4)), Rule("head*", None), Rule("blocks.0.*", LSQ(2))]
    assert resolve(rules, "norm").spec == LSQ(8)
    assert resolve(rules, "blocks.1.attn.q_quant").spec == LSQ(4)
    assert resolve(rules, "blocks.0.attn.q_quant").spec == LSQ(2)
    assert resolve(rules, "head.input_quant").spec is None
    assert resolve(rules[1:], "norm") is None


def test_a_glob_is_case_sensitive_and_covers_the_whole_name():
    assert resolve([Rule("blocks.0", LSQ(4))], "blocks.0.attn") is None
    assert resolve([Rule("Head*", LSQ(4))], "head.input_quant") is None
    assert resolve([Rule("*.attn.[qk]_quant", LSQ(4))], "blocks.0.attn.v_quant") is None


def test_rules_are_appended_to_the_named_recipe():
    table = build_recipe("vvtq", [{"match": "head*", "spec": None}], w_bits=4, a_bits=3)
    assert resolve(table, "head.weight_quant").spec is None
    assert table[:-1] == build_recipe("vvtq", w_bits=4, a_bits=3)


def test_words_for_widths_are_replaced_and_integers_stay():
    table = build_recipe("vvtq", w_bits=2, a_bits=3)
    assert resolve(table, "blocks.0.attn.qkv.weight_quant").spec == LSQ(2, granularity="qkv", grad_scale="l1")
    assert resolve(table, "blocks.0.attn.qkv.input_quant").spec == LSQ(3)
    assert resolve(table, "blocks.0.attn.probs_quant").spec == LSQ(3, signed=False)
    assert resolve(table, "blocks.0.mlp.fc2.input_quant").spec == LSQ(3, signed=False, offset=True)
    assert resolve(table, "head.weight_quant").spec == LSQ(8, grad_scale="l1")
    assert resolve(table, "patch_embed.proj.input_quant").spec == LSQ(8)
    assert resolve(table, "blocks.0.attn_residual_quant") is None


def test_a_word_that_is_not_replaced_is_no_width():
    with pytest.raises(QatError, match="still the word 'w_bits'"):
        _ = LSQ("w_bits").width


@pytest.mark.parametrize("name", NAMED)
def test_every_named_recipe_loads(name):
    words = {rule["spec"]["init_args"]["bits"] for rule in read_rules(name) if rule["spec"]}
    table = build_recipe(name, **{word: 4 for word in words if isinstance(word, str)})
    assert all(isinstance(rule.spec.bits, int) for rule in table if rule.spec)
    assert len(table) == len(read_rules(name))


FULL = [  # of uniform_full_released: glob, and whether the rule is optional
    ("patch_embed.proj.*put_quant", False), ("*norm*.output_quant", False), ("*.attn.qkv.output_quant", True),
    ("*.attn.[qkv]_proj.output_quant", True), ("*.attn.scores_quant", False), ("*.attn.probs_quant", False),
    ("*.attn.proj.*put_quant", True), ("*.mlp.fc2.*put_quant", True), ("*.in_proj.output_quant", True),
    ("*out_proj.*put_quant", True), ("attn_pool.q.*put_quant", True), ("attn_pool.kv.output_quant", True),
    ("attn_pool.proj.*put_quant", True), ("*_residual_quant", False), ("head*.output_quant", False),
    ("tokens_quant", True), ("pos_embed_quant", True), ("embed_quant", True),
    ("*.relative_position_bias_table_quant", True), ("*.downsample.reduction.output_quant", True),
    ("head.fc.input_quant", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more"), [("adalog", 0), ("adalog_released", 1), ("frontier", 0)])
def test_adalog_has_an_extra_level_as_released_only(name: str, more: int):
    table = build_recipe(name, w_bits=4, a_bits=4)
    specs = [resolve(table, f"blocks.0.{site}").spec for site in ("attn.probs_quant", "mlp.fc2.input_quant")]
    assert [type(spec) for spec in specs] == [AdaLog, AdaLog]
    assert [spec.levels for spec in specs] == [16 + more, 16 + more]
    assert [spec.shifted for spec in specs] == [False, True]
    assert specs[0].unit == (name != "frontier")


def test_the_released_recipes_of_fq_vit_are_the_plain_ones_with_other_values():
    weight = Rule("*.weight_quant", Uniform(8, signed=True, granularity="channel", zero="none"))
    plain = [weight, *(Rule(match, Uniform(8, zero="clipped"), optional) for match, optional in FULL)]
    assert build_recipe("uniform_full_released", w_bits=8, a_bits=8) == plain
    powers = PTF(8, zero="clipped")
    more = [
        Rule("*norm*.output_quant", IntegerNorm(8, zero="clipped", arithmetic="released")),
        Rule("fc_norm.output_quant", Uniform(8, zero="clipped"), optional=True),
        Rule("*.mlp.norm.output_quant", Uniform(8, zero="clipped"), optional=True),
        Rule("*_residual_quant", powers),
        Rule("embed_quant", powers, optional=True),
        Rule("*.downsample.reduction.output_quant", powers, optional=True),
    ]
    assert build_recipe("fq_vit_888_released", w_bits=8, a_bits=8) == [*plain, *more]


def test_a_replacement_changes_the_included_rules_alone(tmp_path):
    wide = {"class_path": "LSQ", "init_args": {"bits": 8, "init": "lsq"}}
    base = recipe_file(
        tmp_path, [{"match": "*", "spec": LSQ4}, {"match": "a", "spec": wide}, {"match": "b", "spec": None}]
    )
    entry = {"recipe": base, "replace": {"bits": {8: 4, 4: 3}, "init": {"lsq": "mse"}}}
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump([entry, {"match": "c", "spec": wide}]), encoding="utf-8")
    expected = [Rule("*", LSQ(3)), Rule("a", LSQ(4)), Rule("b"), Rule("c", LSQ(8, init="lsq"))]
    assert build_recipe(str(again)) == expected, "8 becomes 4, and does not go on to 3"
    assert build_recipe(base)[0] == Rule("*", LSQ(4))


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"zero": {"cod": "clipped"}}, "no included rule has zero: cod, so leave that replacement out"),
        ({"zro": {"code": "clipped"}}, "no included rule has zro: code"),
        ({"zero": "clipped"}, "replace is .*: write {OPTION: {OLD: NEW}}"),
        (["zero"], "replace is .*: write"),
        ({"zero": {"code": "half"}}, "zero is 'half'"),
    ],
)
def test_a_replacement_in_vain_is_refused(tmp_path, replace, message):
    with pytest.raises(QatError, match=message):
        build_recipe(recipe_file(tmp_path, [{"recipe": "uniform_full", "replace": replace}]), w_bits=8, a_bits=8)


def test_a_recipe_may_be_a_file(tmp_path):
    path = recipe_file(tmp_path, [{"match": "*", "spec": LSQ4}])
    assert build_recipe(path) == [Rule("*", LSQ(4))]


@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        (Rule("head*"), {"match": "head*", "spec": None}),
        (
            Rule("*", LSQ(4, signed=False, granularity="head", offset=True, grad_scale="none", percentile=99.0)),
            {
                "match": "*",
                "spec": {
                    "class_path": "LSQ",
                    "init_args": {
                        "bits": 4,
                        "signed": False,
                        "granularity": "head",
                        "offset": True,
                        "grad_scale": "none",
                        "init": "mse",
                        "percentile": 99.0,
                        "log_step": False,
                    },
                },
            },
        ),
    ],
)
def test_rules_and_plain_data_turn_into_each_other(rule, plain):
    assert rule.to_dict() == plain
    assert Rule.from_dict(plain) == rule
    assert Rule.from_dict(yaml.safe_load(yaml.safe_dump(plain))) == rule


@pytest.mark.parametrize(
    ("recipe", "widths", "message"),
    [
        ("vvtq", {"a_bits": 4}, "recipe 'vvtq' needs w_bits: give --model.w_bits 4"),
        ("vvtq", {"w_bits": 4}, "recipe 'vvtq' needs a_bits"),
        ("float", {"w_bits": 4}, "model.w_bits is 4, but no rule of recipe 'float' uses it"),
        ("vvtq", {"w_bits": 1, "a_bits": 4}, "model.w_bits: bits is 1: give 2 to 16"),
        ("vvtq", {"w_bits": 4, "a_bits": 17}, "model.a_bits: bits is 17"),
        ("vvtq", {"w_bits": 4, "a_bits": True}, "model.a_bits: bits is True"),
        ("vvtk", {}, "no recipe 'vvtk': choose from .*float, .*lsq, .*vvtq, or give the path"),
        ("none.yaml", {}, "no recipe 'none.yaml'.*or give the path of a YAML file"),
    ],
)
def test_a_recipe_that_cannot_be_built_says_what_it_needs(recipe, widths, message):
    with pytest.raises(QatError, match=message):
        build_recipe(recipe, **widths)


@pytest.mark.parametrize("bits", [1, 17, 0, -4, True, 4.0, "4", "b_bits", None])
def test_a_width_is_an_integer_from_2_to_16_or_one_of_the_words(bits):
    with pytest.raises(QatError, match=f"bits is {bits!r}: give 2 to 16, or the word w_bits or a_bits"):
        LSQ(bits)


@pytest.mark.parametrize("bits", [2, 16, "w_bits", "a_bits"])
def test_both_ends_and_both_words_are_widths(bits):
    assert LSQ(bits).bits == bits


@pytest.mark.parametrize(("signed", "qmin", "qmax"), [(True, -8, 7), (False, 0, 15)])
def test_the_range_follows_from_width_and_sign(signed, qmin, qmax):
    spec = LSQ(4, signed=signed)
    assert (spec.qmin, spec.qmax, spec.levels) == (qmin, qmax, 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {match: '*', spec: null", "is not valid YAML"),
        ("- {match: '*', spec: null}\n\tx", "is not valid YAML"),
        ("match: '*'", "must be a YAML list of rules"),
        ("", "must be a YAML list of rules"),
        ("- '*'", r"rule '\*' is not a mapping"),
        ("- {match: '*'}", r"rule '\*' lacks 'spec'"),
        ("- {spec: null}", "lacks 'match'"),
        ("- {match: 3, spec: null}", "rule 3: match must be a glob"),
        ("- {mach: '*', spec: null}", "has no option 'mach': did you mean 'match'"),
        ("- {match: '*', spec: LSQ}", r"rule '\*': spec 'LSQ' is no mapping"),
        (
            "- {match: '*', spec: {class_pat: LSQ}}",
            r"rule '\*': spec has no option 'class_pat': did you mean 'class_path'",
        ),
        ("- {match: '*', spec: {init_args: {bits: 4}}}", r"rule '\*': spec lacks 'class_path'"),
        ("- {match: '*', spec: {class_path: LSQ}}", r"rule '\*': LSQ lacks 'bits'"),
        (
            "- {match: '*', spec: {class_path: LQS, init_args: {bits: 4}}}",
            "no quantizer is called 'LQS': choose from.* LSQ",
        ),
        ("- {match: '*', spec: {class_path: no.such.Kind}}", "quantizer 'no.such.Kind' is no part of qat.*--trust"),
        ("- {match: '*', spec: {class_path: qat.cli.Kind}}", "'qat.cli.Kind' is no quantizer of qat: choose from"),
        ("- {match: 2024-99-99, spec: null}", "is not valid YAML: month must be in 1..12"),
        ("- {match: !!float '', spec: null}", "is not valid YAML"),
        ("[" * 2000, "is not valid YAML"),
        ("- {match: '*', spec: {class_path: qat.errors.QatError}}", "'qat.errors.QatError' is no quantizer"),
        ("- {match: '*', spec: {class_path: qat.__main__.X}}", "'qat.__main__.X' is no quantizer of qat"),
        (
            "- {match: 'a.*', spec: {class_path: LSQ, init_args: {bits: 4, grain: head}}}",
            r"rule 'a.\*': LSQ has no option 'grain': choose from bits, signed",
        ),
        (
            "- {match: '*', spec: {class_path: LSQ, init_args: {bits: 4, granularty: head}}}",
            "LSQ has no option 'granularty': did you mean 'granularity'",
        ),
        (
            "- {match: '*', spec: {class_path: LSQ, init_args: {bits: 4, granularity: row}}}",
            "granularity is 'row': choose from tensor, channel, head, qkv",
        ),
        (
            "- {match: '*', spec: {class_path: LSQ, init_args: {bits: 4, init: max}}}",
            "init is 'max': choose from mse, lsq",
        ),
    ],
)
def test_a_malformed_recipe_is_refused_by_place_and_value(tmp_path, text, message):
    with pytest.raises(QatError, match=message) as error:
        build_recipe(recipe_file(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": 3},
        {"class_path": None},
        {"class_path": ".kinds.Mine"},
        {"class_path": "qat.recipe.Spec", "init_args": {"bits": 4}},
        {"class_path": "LSQ", "init_args": 4},
        {"class_path": "LSQ", "init_args": ["bits"]},
        {"class_path": "LSQ", "init_args": {"bits": 4, "percentile": "most"}},
        {"class_path": "LSQ", "init_args": {"bits": 4, "signed": "no"}},
        {"class_path": "LSQ", "init_args": {"bits": 4, "offset": "no"}},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused(spec):
    with pytest.raises(QatError):
        spec_from_dict(spec)


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QatError, match=r"mine\.yaml"):
        build_recipe(str(path))


@pytest.fixture
def outside(request, tmp_path, monkeypatch):
    """The dotted path of a quantizer that is not part of the package. Importing its module leaves a file behind."""
    module = f"outside_{abs(hash(request.node.name))}"  # a class of an earlier test may still exist
    (tmp_path / f"{module}.py").write_text(
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from qat.recipe import Spec\n\n"
        "Path(__file__).with_name('imported').touch()\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Coarse(Spec):\n"
        "    strength: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield f"{module}.Coarse"
    sys.modules.pop(module, None)


def test_a_quantizer_from_outside_is_named_by_its_dotted_path(outside):
    spec = spec_from_dict({"class_path": outside, "init_args": {"bits": 4, "strength": 2.0}}, trust=True)
    assert (type(spec).__module__, spec.width, spec.strength) == (outside.partition(".")[0], 4, 2.0)
    assert spec.to_dict()["class_path"] == outside
    assert spec_from_dict(spec.to_dict()) == spec  # it is imported by now, so reading it runs nothing


def test_a_file_imports_nothing_unless_it_is_trusted(outside, tmp_path):
    coarse = {"class_path": outside, "init_args": {"bits": 4}}
    recipe = recipe_file(tmp_path, [{"match": "*", "spec": coarse}])
    for read in (lambda: spec_from_dict(coarse), lambda: build_recipe(recipe)):
        with pytest.raises(QatError, match=rf"quantizer '{outside}' is no part of qat.*--trust"):
            read()
    assert not (tmp_path / "imported").exists()
    assert type(build_recipe(recipe, trust=True)[0].spec).__name__ == "Coarse"
    assert (tmp_path / "imported").exists()


def test_rules_of_the_users_own_may_name_any_quantizer(outside):
    rules = build_recipe("float", [{"match": "*", "spec": {"class_path": outside, "init_args": {"bits": 4}}}])
    assert rules[0].spec.to_dict()["class_path"] == outside
    typed = Namespace(match="*", spec=Namespace(class_path=outside, init_args=Namespace(bits=4)))
    assert build_recipe("float", [typed]) == rules  # what jsonargparse makes of it


def test_an_option_of_a_quantizer_from_outside_is_checked_too(outside):
    with pytest.raises(QatError, match="Coarse has no option 'strenght': did you mean 'strength'"):
        spec_from_dict({"class_path": outside, "init_args": {"bits": 4, "strenght": 2.0}}, trust=True)


def test_a_quantizer_from_outside_does_not_take_the_place_of_ours(tmp_path, monkeypatch):
    (tmp_path / "shadow.py").write_text("from qat.recipe import Spec\n\n\nclass LSQ(Spec):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec_from_dict({"class_path": "shadow.LSQ", "init_args": {"bits": 4}}, trust=True)
    sys.modules.pop("shadow")
    assert type(spec_from_dict(LSQ4)) is LSQ


def test_a_module_that_fails_when_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(QatError, match=r"cannot import the quantizer 'broken.Kind': division by zero"):
        spec_from_dict({"class_path": "broken.Kind", "init_args": {"bits": 4}}, trust=True)
