"""Whether the options of a command contradict the checkpoint that it names, and what they change about its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qat.checkpoint import REPLACED_BY_A_CARD, Card
from qat.errors import QatError
from qat.models.arch import find_architecture, without_tag
from qat.recipe import Rule, read_rules

TRAINER_KEYS = ("accumulate_grad_batches", "callbacks", "check_val_every_n_epoch", "devices", "gradient_clip_val",
                "limit_train_batches", "max_epochs", "max_steps", "num_nodes", "precision", "strategy",
                "val_check_interval")  # fmt: skip
PLACES = frozenset({"root", "images", "val_labels", "workers", "val_batch_size", "teacher_checkpoint", "trust"})
RECIPE_KEYS = ("recipe", "rules", "w_bits", "a_bits")


def check_agreement(card: Card, path: Path, given: Mapping[str, Any], chosen: int = 0) -> None:
    """Raise QatError when an option that was given contradicts the card of the checkpoint ``path``.

    Of the rules of the card, the last ``chosen`` are not of the recipe: its calibration has added them.
    """
    options = dict((given.get("model", None) or {}).items())
    if ":" in str(options.get("arch")):  # a folder or a repository of the hub, which a card describes by timm's name
        named = find_architecture(options["arch"])
        options |= {"arch": named.name, "model_args": {**named.model_args, **(options.get("model_args") or {})}}
    for key in ("arch", "model_args", "num_classes"):
        wanted, stored = options.get(key, None), getattr(card, key)
        if key == "arch" and wanted is not None:  # its tag names weights, and the checkpoint has them
            wanted, stored = without_tag(wanted), without_tag(stored)
        if wanted is not None and wanted != stored:
            raise _contradiction(path, f"model.{key}", options[key], getattr(card, key))
    recipe = {key: options[key] for key in RECIPE_KEYS if options.get(key, None) is not None}
    tables = (card.rules, card.rules[: max(len(card.rules) - chosen, 0)])  # options may repeat what was added
    if recipe and not any(_same_recipe(recipe, table) for table in tables):
        raise _contradiction(path, f"the recipe ({recipe})", "given", "another (`qat describe --ckpt` shows it)")
    for group in ("data", "model"):
        for key, value in ((given.get(group, None) or {}).get("preprocessing", None) or {}).items():
            if value != card.preprocessing.get(key):
                raise _contradiction(path, f"{group}.preprocessing.{key}", value, card.preprocessing.get(key))


def run_options(config: Mapping[str, Any]) -> dict[str, str]:
    """The options of a run that its checkpoints keep, as text by dotted name.

    Places on a machine are left out, and so is what the card of the checkpoint holds already.
    """
    found = {"seed_everything": str(config["seed_everything"])}
    for part in ("model", "data"):
        kept = {key: value for key, value in config[part].items() if key not in PLACES | REPLACED_BY_A_CARD}
        found |= {f"{part}.{key}": _text(value) for key, value in kept.items()}
    return found | {f"trainer.{key}": _text(config["trainer"][key]) for key in TRAINER_KEYS}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """One phrase for every option that differs from those of the checkpoint."""
    for key, value in now.items():
        if key in before and before[key] != value:
            yield f"{key} {before[key]} -> {value}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_text(item) for item in value)}]"
    return str(value.as_dict() if hasattr(value, "as_dict") else value)


def _same_recipe(given: dict[str, Any], rules: list[dict[str, Any]]) -> bool:
    """Whether the options, as far as they are given, lead to the resolved rules of a checkpoint."""
    widths = {rule["spec"]["init_args"]["bits"] for rule in rules if rule["spec"] is not None}
    if not {given.get("w_bits"), given.get("a_bits")} - {None} <= widths:
        return False
    if "recipe" not in given:
        return "rules" not in given
    try:
        named = [Rule.from_dict(rule) for rule in read_rules(given["recipe"])]
        more = [Rule.from_dict(rule) for rule in given.get("rules", [])]
    except QatError:
        return False
    rules = [
        Rule.from_dict(rule, trust=True).to_dict() for rule in rules
    ]  # with options that came after the checkpoint
    known = {rule["match"] for rule in rules}  # a later version may have got rules for layers of other families
    table = [*(rule for rule in named if not rule.optional or rule.match in known), *more]
    return len(table) == len(rules) and all(
        (theirs := rule.to_dict())["match"] == stored["match"] and _fits(theirs["spec"], stored["spec"], given)
        for rule, stored in zip(table, rules, strict=True)
    )


def _fits(spec: dict[str, Any] | None, stored: dict[str, Any] | None, given: dict[str, Any]) -> bool:
    """Equal, where a width word stands for the width that is given, or for any when none is."""
    if spec is None or stored is None:
        return spec is stored
    bits = spec["init_args"]["bits"]
    meant = given.get(bits, stored["init_args"]["bits"]) if isinstance(bits, str) else bits
    return {**spec, "init_args": {**spec["init_args"], "bits": meant}} == stored


def _contradiction(path: Path, key: str, given: Any, stored: Any) -> QatError:
    return QatError(f"{key} is {given}, but the checkpoint {path} has {stored}: leave the option out")
