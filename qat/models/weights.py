"""Files of float weights as people have them: which table is read, and the names in it without usual prefixes.

A table maps names to tensors. A training file often holds several: the weights, their running average, a teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qat.errors import QatError
from qat.models.inert import Foreign
from qat.models.torch_file import read_foreign, reason

log = logging.getLogger(__name__)
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")  # in the order in which they are taken
TRAINED = ("state_dict", "model", "module", "model_state_dict", "student")
INNER = ("state_dict", "model_state_dict", "module", "model")  # where a wrapper holds its table
DEPTH = 3  # wrappers around one table
PARALLEL = "module."  # the prefix that DataParallel and DistributedDataParallel add
PREFIXES = ("_orig_mod.", PARALLEL, "model.", "backbone.")  # also of torch.compile, a LightningModule, a larger model
COUNTERS = ("n_averaged",)  # beside the weights in a torch.optim.swa_utils.AveragedModel
ONE_TABLE = "the file itself"


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a local file, without the wrappers and prefixes of usual checkpoints.

    Args:
        path: a .safetensors file, or one that torch.save wrote.
        key: name of the table, where the file holds several; averaged weights are taken first when None.

    Raises:
        QatError: no such file or table, a damaged file, or one without weights.
    """
    path = Path(path)
    if path.is_dir():
        raise QatError(f"{path} is a folder: give a file of weights, or the folder as --model.arch local-dir:{path}")
    if not path.is_file():
        raise QatError(f"no file {path} of weights: give a .safetensors, .pth or .ckpt file, or 'pretrained'")
    try:
        content = load_file(path) if path.suffix.lower() == ".safetensors" else read_foreign(path)
    except Exception as error:  # a damaged pickle can raise anything
        raise QatError(f"cannot read the weights {path}: {reason(error)}") from None
    return without_prefixes(choose_table(content, path, key)[1], path)


def choose_table(
    content: Any, path: Path, key: str | None = None, option: str = "model.checkpoint_key"
) -> tuple[str, dict[str, Tensor]]:
    """The key and the table of weights in the content of a file; what was taken is logged where there was a choice.

    Args:
        content: what the file holds.
        path: of the file, for messages.
        key: name of the table; averaged weights are taken first when None.
        option: the name of ``key`` in messages.

    Raises:
        QatError: no such table, several of which none has a usual name, or a table that holds something else too.
    """
    found = find_tables(content)
    if not found:
        raise QatError(f"{path} holds no table of weights{_what_else(content)}")
    if key is not None and list(found) == [ONE_TABLE]:
        raise QatError(f"{option} is {key!r}, but {path} holds a single table of weights: leave it out")
    if key is not None and key not in found:
        raise QatError(f"{option} is {key!r}, but {path} holds {', '.join(found)}: choose one of them, or leave it out")
    names = [name for name in (*AVERAGED, *TRAINED) if name in found]
    if key is None and not names and len(found) > 1:
        raise QatError(f"{path} holds several tables, {', '.join(found)}: choose one with {option}")
    chosen = key if key is not None else (names or list(found))[0]
    if len(found) > 1:
        kind = "averaged weights" if chosen in AVERAGED else "weights"
        log.info("%s holds %s: took %r (%s); %s chooses", path, ", ".join(found), chosen, kind, option)
    table = found[chosen]
    for name, value in table.items():
        if not isinstance(value, Tensor):
            kind = value.name if isinstance(value, Foreign) else type(value).__name__
            where = "" if chosen == ONE_TABLE else f" in {chosen!r}"
            raise QatError(f"{path}: {name!r}{where} is a {kind}, not a tensor: keep only the weights")
    return chosen, table


def find_tables(content: Any) -> dict[str, dict[str, Any]]:
    """Every table in the content of a file by the key that holds it, in the order of the file."""
    if not isinstance(content, Mapping):
        return {}
    if _is_table(content):
        return {ONE_TABLE: dict(content)}
    inner = {key: _unwrapped(value) for key, value in content.items() if isinstance(key, str)}
    return {key: table for key, table in inner.items() if table is not None}


def without_prefixes(table: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The table with the prefixes that all of its names share removed, however they are nested.

    Raises:
        QatError: only some names have the prefix of DDP, so that the file holds more than one model.
    """
    names = {name: name.replace("_orig_mod.", "") for name in table if name not in COUNTERS}
    if len(names) < len(table):
        log.info("left out: %s", ", ".join(name for name in table if name in COUNTERS))
    while names and (prefix := next(_shared_prefixes(names.values()), None)):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    bare = [short for short in names.values() if not short.startswith(PARALLEL)]
    if bare and len(bare) < len(names):
        raise QatError(f"{path}: {bare[0]!r} lacks the prefix {PARALLEL!r} that other names have: keep one model")
    return {short: table[name] for name, short in names.items()}


def _shared_prefixes(names: Any) -> Iterator[str]:
    """The prefixes with which all names begin."""
    return (prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names))


def _unwrapped(value: Any) -> dict[str, Any] | None:
    """The table that a value is, or wraps; None for anything else."""
    for _ in range(DEPTH):
        if not isinstance(value, Mapping):
            return None
        if _is_table(value):
            return dict(value)
        value = next((value[key] for key in INNER if isinstance(value.get(key), Mapping)), None)
    return None


def _is_table(value: Mapping[Any, Any]) -> bool:
    """Whether most values are tensors with names: a single other value is an error that can then be named."""
    tensors = sum(isinstance(item, Tensor) for item in value.values())
    return 2 * tensors > len(value) and all(isinstance(key, str) for key in value)


def _what_else(content: Any) -> str:
    """What a file holds in place of weights, with the way out where it is known."""
    if isinstance(content, Foreign):
        return f", it holds a whole {content.name}: torch.save its state_dict() instead"
    if isinstance(content, Mapping):
        modules = [f"{key!r} is a {value.name}" for key, value in content.items() if isinstance(value, Foreign)]
        return f": {modules[0]}; torch.save the state_dict() of a model" if modules else ""
    return ""
