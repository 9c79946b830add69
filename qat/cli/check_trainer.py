"""Settings of Lightning's Trainer that qat does not support, refused by name before anything is built."""

from __future__ import annotations

from typing import Any

from qat.errors import QatError

PRECISIONS = (None, 32, "32", "32-true", 16, "16", "16-mixed", "bf16", "bf16-mixed")
SHARDING = ("fsdp", "deepspeed", "modelparallel", "xla")  # beginnings of names of strategies


def check_trainer(trainer: Any) -> None:
    """Check the options under ``trainer``.

    Raises:
        QatError: a precision that keeps parameters in less, or more, than float32, or a strategy that shards them.
    """
    if trainer.precision not in PRECISIONS:
        raise QatError(
            f"trainer.precision is {trainer.precision}: steps of quantizers are float32 parameters, so choose 32-true, "
            "bf16-mixed or 16-mixed"
        )
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", type(strategy).__name__))
    bare = name.rpartition(".")[2].lower().replace("_", "")
    if bare.startswith(SHARDING):
        raise QatError(
            f"trainer.strategy is {name}: it cuts parameters into shards, and a quantizer needs its whole weight; "
            "choose auto or ddp"
        )
