"""The command `qat`: finds the verb and loads what it needs, and turns an error that a user can cause into one line.

Nothing heavy is imported here: `qat --help` answers without torch.
"""

from __future__ import annotations

import gc
import importlib
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import qat
from qat.cli.log import quiet_libraries, set_up_logging
from qat.errors import QatError, bad_input
from qat.runs.process import first_process, keep_freed_memory
from qat.runs.stop import Stopped, end_workers, stoppable


class Verb(NamedTuple):
    """What the help says of a verb, and the module whose ``run(verb, arguments)`` does it."""

    summary: str
    module: str


TRAINED, TOOLS = "qat.cli.lightning_cli", "qat.cli.tools"
VERBS = {
    "fit": Verb("train a quantized model, or a float one", TRAINED),
    "validate": Verb("evaluate a checkpoint, or calibrate a model without training and evaluate it", TRAINED),
    "calibrate": Verb("calibrate a quantized model on a few images, without training", TRAINED),
    "predict": Verb("write the most probable classes of every image in a folder", TRAINED),
    "describe": Verb("show what is quantized, and what it saves; needs no data and no weights", "qat.cli.describe"),
    "export": Verb("write a checkpoint with packed weights, for other machines and the Hugging Face hub", TOOLS),
    "make-softlabels": Verb("let a teacher label many crops of every training image", TOOLS),
    "import-fkd": Verb("make a store of soft labels from the label files of FKD", TOOLS),
    "convert-official": Verb("turn official DeiT, Swin, SReT and VVTQ files into files that qat reads", TOOLS),
}
USAGE = """usage: qat VERB [options]

Low-bit quantization of timm vision transformers.

verbs:
{verbs}

`qat VERB --help` lists the options of a verb. Start with:
  qat describe --config configs/deit_t_w4a4.yaml"""
WITH_A_MODEL = ("fit", "validate", "calibrate", "predict", "describe")  # their help is our own
HELP = {"-h", "--help", "--help-all", "--trainer.help"}
GRACE = 3.0  # seconds that another process than the first waits before it prints an error


def run(arguments: Sequence[str]) -> Any:
    """Run a command and return what its verb returns; raises what went wrong."""
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        print(USAGE.format(verbs="\n".join(f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items())))
        return None
    if verb == "--version":
        print(f"qat {qat.__version__}")
        return None
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(VERBS)}"
        raise QatError(f"no verb {verb!r}: {hint}")
    if verb in WITH_A_MODEL and (asked := HELP & set(rest)):
        return _load("qat.cli.help").print_help(verb, VERBS[verb].summary, everything=not asked <= {"-h", "--help"})
    return _load(VERBS[verb].module).run(verb, rest)


def _load(module: str) -> Any:
    """Import a module, without the garbage collector, which would find nothing and take a sixth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        quiet_libraries()
        gc.freeze()
        if collects:
            gc.enable()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it succeeded, 2 with one line on stderr when the input was bad, 143 or 130 when stopped."""
    set_up_logging()
    keep_freed_memory()
    try:
        with stoppable():
            run(sys.argv[1:] if arguments is None else arguments)
    except Stopped as stopped:
        if first_process():
            print(f"qat: {stopped}", file=sys.stderr)
        return stopped.code
    except (QatError, ArgumentError, ValueError, OSError) as error:
        if (bad := bad_input(error)) is None:
            raise
        if not first_process():
            time.sleep(GRACE)  # the first process may have the same error; it says so, and ends this one
        print(f"qat: error: {' '.join(str(bad).split())}", file=sys.stderr)
        return 2
    return 0


def console() -> None:
    """Entry point of the command `qat`."""
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: Ctrl-C while Python ends would print a traceback
    end_workers()
    sys.exit(code)
