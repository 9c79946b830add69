"""The recipe: which site is quantized, and how. One ordered table of rules; the last rule that matches a site wins.

A rule is written the same way in YAML, on the command line, in Python and in a checkpoint::

    {match: "blocks.*.weight_quant", spec: {class_path: LSQ, init_args: {bits: w_bits, granularity: channel}}}
    {match: "head*", spec: null}                                                  # stays in floating point

In the file of a recipe, ``{recipe: repq_vit}`` includes all rules of another one. Values of their init_args can be
replaced: ``{recipe: uniform_full, replace: {zero: {code: clipped}}}`` turns each ``zero: code`` into ``clipped``.

``bits`` is an integer or the word ``w_bits`` or ``a_bits``, filled from the options of that name.
A recipe can be read, resolved and compared without building a model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qat.errors import UNREADABLE, QatError
from qat.quantizers import Spec
from qat.quantizers.named import check_keys, plain, spec_from_dict
from qat.ranges import shown


@dataclass(frozen=True)
class Rule:
    """Sites whose name matches the glob ``match`` get ``spec``; ``None`` leaves them in floating point.

    A rule that matches no site is an error, unless it is ``optional``, for layers that only some families have.
    """

    match: str
    spec: Spec | None = None
    optional: bool = False

    @classmethod
    def from_dict(cls, rule: Any, trust: bool = False) -> Rule:
        """Read ``{match: GLOB, spec: null | {class_path, init_args}}`` and ``optional``; QatError for anything else.

        Args:
            rule: plain data.
            trust: a quantizer that it names by a dotted path may be imported.
        """
        rule = plain(rule)
        if not isinstance(rule, Mapping):
            raise QatError(f"rule {shown(rule)} is not a mapping: write {{match: GLOB, spec: ...}}")
        where = f"rule {shown(rule.get('match', rule))}"
        check_keys(rule, ("match", "spec", "optional"), required=("match", "spec"), where=where)
        if not isinstance(rule["match"], str):
            raise QatError(f"{where}: match must be a glob over site names")
        if not isinstance(optional := rule.get("optional", False), bool):
            raise QatError(f"{where}: optional is {optional!r}: give true or false")
        try:
            spec = None if rule["spec"] is None else spec_from_dict(rule["spec"], trust)
        except QatError as error:
            raise QatError(f"{where}: {error}") from None
        return cls(rule["match"], spec, optional)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        plain = {"match": self.match, "spec": self.spec and self.spec.to_dict()}
        return {**plain, "optional": True} if self.optional else plain


Recipe = Sequence[Rule]


def resolve(rules: Recipe, site: str) -> Rule | None:
    """The last rule that matches the name of a site; None where no rule does."""
    return next((rule for rule in reversed(rules) if fnmatchcase(site, rule.match)), None)


def build_recipe(
    recipe: str,
    rules: Iterable[Any] = (),
    w_bits: int | None = None,
    a_bits: int | None = None,
    trust: bool = False,
) -> list[Rule]:
    """The rules of a recipe, by its name or path, with ``rules`` appended and integers for the words of widths.

    Args:
        recipe: name of a recipe, or path of a YAML file.
        rules: rules of the user's own; a quantizer that they name by a dotted path is imported.
        w_bits, a_bits: widths for the words of these names.
        trust: quantizers that the file of the recipe names by a dotted path may be imported too.

    Raises:
        QatError: the recipe is unknown, a rule is malformed, a word has no value, or no rule uses a given width.
    """
    table = [Rule.from_dict(rule, trust) for rule in read_rules(recipe)]
    table += [Rule.from_dict(rule, trust=True) for rule in rules]
    given = {"w_bits": w_bits, "a_bits": a_bits}
    used = {rule.spec.bits for rule in table if rule.spec is not None}
    for word, value in given.items():
        if value is None and word in used:
            raise QatError(f"recipe {recipe!r} needs {word}: give --model.{word} 4, for example")
        if value is not None and word not in used:
            raise QatError(f"model.{word} is {value}, but no rule of recipe {recipe!r} uses it: leave it out")
    return [_fill(rule, given) for rule in table]


def read_rules(recipe: str, inside: tuple[str, ...] = ()) -> list[Any]:
    """The rules, as plain data, of a recipe that comes with the package or of a YAML file.

    Args:
        recipe: name or path.
        inside: the recipes that include this one, the outermost first.

    Raises:
        QatError: there is no such recipe, it is no list, includes itself, or asks for a replacement in vain.
    """
    if recipe in inside:
        raise QatError(f"recipe {recipe!r} contains itself: {' -> '.join((*inside, recipe))}")
    rules: list[Any] = []
    for entry in _read_table(recipe):
        if isinstance(entry, Mapping) and "recipe" in entry:
            where = f"recipe {recipe!r}, entry {dict(entry)}"
            check_keys(entry, ("recipe", "replace"), (), where)
            included = read_rules(str(entry["recipe"]), (*inside, recipe))
            rules += _replaced(included, entry.get("replace", {}), where)
        else:
            rules.append(entry)
    return rules


def _replaced(rules: list[Any], replace: Any, where: str) -> list[Any]:
    """Rules, as plain data, with other values of their init_args: ``replace`` is {option: {old value: new value}}."""
    if not isinstance(replace, Mapping) or not all(isinstance(values, Mapping) for values in replace.values()):
        raise QatError(f"{where}: replace is {replace!r}: write {{OPTION: {{OLD: NEW}}}}")
    rules = copy.deepcopy(rules)
    unused = {(option, old) for option, values in replace.items() for old in values}
    for options in _all_init_args(rules):
        for option, values in replace.items():
            for old in [old for old in values if option in options and options[option] == old]:
                options[option] = values[old]
                unused.discard((option, old))
    for option, old in sorted(unused, key=str):
        raise QatError(f"{where}: no included rule has {option}: {old}, so leave that replacement out")
    return rules


def _all_init_args(rules: list[Any]) -> Iterator[dict[str, Any]]:
    """The init_args of every rule that has some; what is malformed is refused when the rule is built."""
    for rule in rules:
        spec = rule.get("spec") if isinstance(rule, dict) else None
        options = spec.get("init_args") if isinstance(spec, dict) else None
        if isinstance(options, dict):
            yield options


def _read_table(recipe: str) -> list[Any]:
    named = {Path(entry.name).stem: entry for entry in resources.files("qat.recipes").iterdir()}
    named = {name: entry for name, entry in named.items() if entry.name.endswith(".yaml")}
    if recipe in named:
        text = named[recipe].read_text(encoding="utf-8")
    elif Path(recipe).suffix in (".yaml", ".yml") and Path(recipe).is_file():
        text = Path(recipe).read_text(encoding="utf-8", errors="replace")
    else:
        raise QatError(f"no recipe {recipe!r}: choose from {', '.join(sorted(named))}, or give the path of a YAML file")
    try:
        table = yaml.safe_load(text)
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise QatError(f"recipe {recipe!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(table, list):
        raise QatError(
            f"recipe {recipe!r} must be a YAML list of rules, each {{match: GLOB, spec: ...}}, or {{recipe: NAME}}"
        )
    return table


def _fill(rule: Rule, given: Mapping[str, int | None]) -> Rule:
    if rule.spec is None or isinstance(rule.spec.bits, int) or (bits := given[rule.spec.bits]) is None:
        return rule
    try:
        return replace(rule, spec=replace(rule.spec, bits=bits))
    except QatError as error:
        raise QatError(f"model.{rule.spec.bits}: {error}") from None
