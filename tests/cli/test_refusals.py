"""What is wrong with a command is said in one line that names it, before any work, and nothing is written.

Each row was a traceback, came after minutes of work, or was accepted without a word.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jsonargparse import _typehints

from qat.cli.imports import Imports, checked, constructor_hints, typed_names
from qat.cli.main import main
from qat.errors import QatError, bad_input
from qat.ptq import PTQMethod
from qat.ptq.reconstruction.learned_weights import WeightRule
from qat.ptq.reconstruction.losses import ReconstructionLoss

FIT = """
--model.lr 1e300                            | model.lr is 1e+300: give a number above 0
--model.lr inf                              | model.lr is inf: give
--model.lr nan                              | model.lr is nan: give a number above 0
--model.lr x                                | model.lr is x: give a number above 0
--model.lr                                  | --model.lr stands without a value
--model.step_lr 0                           | model.step_lr is 0.0: give a number above 0
--model.min_lr -1                           | model.min_lr is -1.0: give a number of at least 0
--model.min_lr 1                            | model.min_lr is 1.0, above model.lr
--model.warmup_steps -1                     | model.warmup_steps is -1
--model.weight_decay -0.1                   | model.weight_decay is -0.1
--model.betas [1,0.9]                       | model.betas is (1.0, 0.9): give two values, each a number of at least 0
--model.betas [1]                           | model.betas is [1]: give two values
--model.eps 0                               | model.eps is 0.0
--model.drop_path .nan                      | model.drop_path is nan
--model.drop_path -0.1                      | model.drop_path is -0.1
--model.drop_path 1                         | model.drop_path is 1.0
--model.num_classes 1                       | model.num_classes is 1
--model.w_bits 1                            | model.w_bits is 1: give an integer from 2 to 16
--model.w_bits 1.5                          | model.w_bits is 1.5: give an integer from 2 to 16
--model.seed -1                             | model.seed is -1
--model.compile maybe                       | model.compile is maybe: give true or false
--model.rules 3                             | model.rules is 3: give a list, each item a mapping
--model.rules [3]                           | model.rules is 3: give a list, each item a mapping
--model.rules "[{match: 'head*', spec: {class_path: no.such.Module, init_args: {bits: 4}}}]" | no.such.Module
--model.model_args 3                        | model.model_args is 3: give a mapping
--model.model_args.drop_path_rate 0.1       | model.model_args.drop_path_rate is 0.1: set it by model.drop_path
--model.model_args.num_classes 3            | model.model_args.num_classes is 3: set it by model.num_classes
--model.model_args.checkpoint_path x.pth    | model.model_args.checkpoint_path is 'x.pth': set it by model.checkpoint
--model.model_args.pretrained true          | set it by model.checkpoint
--model.model_args.in_chans 1               | model.model_args.in_chans is 1: images have 3 channels
--model.model_args.features_only true       | it makes a model without a classifier
--model.model_args.img_size abc             | model.model_args.img_size is 'abc': give an integer
--model.model_args.depth 1000000            | model.model_args.depth is 1000000
--model.model_args.drop_rate 2              | model.model_args.drop_rate is 2
--model.model_args.norm_layer foo           | there is no 'foo'
--model.model_args.act_layer foo            | there is no 'foo'
--model.model_args.num_heads 7              | model.model_args: deit_tiny_patch16_224 does not take
--model.model_args.patch_size 64            | model.model_args.patch_size is 64, larger than img_size 32
--model.arch deit_tinny                     | similar names: deit_tiny_patch16_224
--model.arch vit_medium_patch16_reg4_256    | similar names: vit_medium_patch16_reg4_gap_256
--model.arch dinov2                         | similar names: vit_
--model.teacher deit_tinny                  | model.teacher: timm
--model.checkpoint ~/no/such.pth            | HOME/no/such.pth
--model.recipe ~/no/such.yaml               | HOME/no/such.yaml
--model.quant_checkpoint ~/no/such.ckpt     | HOME/no/such.ckpt
--model.lrr 3                               | no option --model.lrr: did you mean --model.lr?
--modle.lr 3                                | no option --modle.lr: did you mean --model.lr?
--trainer.lr 3                              | no option --trainer.lr: did you mean --model.lr?
--nothing_like_it 3                         | no option --nothing_like_it: `qat VERB --help` lists the options
--model nothing.yaml                        | --model is a group of options
--model.regularizers NoSuch                 | model.regularizers is NoSuch: give a list
--model.regularizers+ NoSuch                | choose from BinRegularizer, Dampening
--model.regularizers+ BinRegularizr         | did you mean BinRegularizer?
--model.regularizers "[{class_path: BinRegularizer, init_args: {wieght: 1}}]" | BinRegularizer has no option 'wieght': did you mean weight?
--model.regularizers "[{class_path: BinRegularizer, init_args: {weight: x}}]" | BinRegularizer.weight is x: give a number above 0
--model.regularizers "[{class_path: BinRegularizer, init_args: {start: 1}}]" | BinRegularizer: start is 1.0
--model.regularizers "[{class_path: Dampening, init_args: {max_bits: 1}}]" | Dampening: max_bits is 1
--model.regularizers "[{class_path: Dampening, init_args: {reduction: foo}}]" | Dampening.reduction is foo: give sum, mean or channel
--data.crop_epochs 1000000000000000         | data.crop_epochs is 1000000000000000
--data.crop_epochs 0                        | data.crop_epochs is 0
--data.crops_per_image 65536                | data.crops_per_image is 65536
--data.batch_size 0                         | data.batch_size is 0
--data.batch_size -8                        | data.batch_size is -8
--data.global_batch_size 0                  | data.global_batch_size is 0
--data.global_batch_size 10 --data.batch_size 4 | which cannot be split over the 1 process
--data.val_batch_size 0                     | data.val_batch_size is 0
--data.workers -1                           | data.workers is -1
--data.seed 4294967296                      | data.seed is 4294967296
--data.crop_scale [0,1]                     | data.crop_scale is (0.0, 1.0)
--data.crop_scale [1]                       | data.crop_scale is [1]: give two values
--data.crop_scale [0.5,0.1]                 | give the lowest first
--data.crop_ratio [0,1]                     | data.crop_ratio
--data.flip 2                               | data.flip is 2.0: give a number from 0 to 1
--data.train_interpolation foo              | data.train_interpolation is foo: give nearest, bilinear or bicubic
--data.on_bad_image foo                     | data.on_bad_image is foo: give error or skip
--data.root ""                              | data.root is '': give a path
--data.root ~/no/images                     | HOME/no/images
--data.preprocessing 3                      | data.preprocessing is 3: give a mapping
--data.preprocessing.size abc               | data.preprocessing.size is 'abc': give an integer
--data.preprocessing.size 40.5              | data.preprocessing.size is 40.5
--data.preprocessing.size 64                | data.preprocessing.size is 64, but deit_tiny_patch16_224 takes 32 pixels
--data.preprocessing.resize 1000000         | data.preprocessing.resize is 1000000
--data.preprocessing.resize 10              | give at most preprocessing.resize, 10
--data.preprocessing.mean [1,2]             | data.preprocessing.mean is [1, 2]: give three values
--data.preprocessing.mean [.nan,0,0]        | data.preprocessing.mean is [nan, 0, 0]
--data.preprocessing.std [0,1,1]            | data.preprocessing.std is [0, 1, 1]: give three values, each a number above 0
--data.preprocessing.std [-1,1,1]           | data.preprocessing.std is [-1, 1, 1]
--data.preprocessing.interpolation foo      | data.preprocessing.interpolation is 'foo'
--calibration.images 0                      | calibration.images is 0
--calibration.images 25                     | train has 24, choose 1..24
--calibration.batch_size 0                  | calibration.batch_size is 0
--calibration.batch_size -1                 | calibration.batch_size is -1
--calibration.seed -1                       | calibration.seed is -1
--model.features.modules [blocks.0] --model.teacher null | model.features needs a teacher that sees the same crops
--calibration.method NoSuch                 | no such class can be used here
--calibration.method os.path.join           | no such class can be used here
--calibration.method.samples 3              | calibration.method.samples is given, but calibration.method is not
--calibration.method Observe --calibration.method.observer foo | Observe.observer is foo: give minmax, ema
--calibration.method Observe --calibration.method.samples 0 | Observe: samples is 0
--calibration.method OutputSearch --calibration.method.rounds 0 | OutputSearch: rounds is 0
--calibration.method RepQViT --calibration.method.shares [0.3] | RepQViT: shares is [0.3]
--calibration.method RepQViT --calibration.method.shars [1] | RepQViT has no option 'shars': did you mean shares?
--calibration.method QDrop --calibration.method.iteration 3 | QDrop has no option 'iteration': did you mean iterations?
--calibration.method QDrop --calibration.method.lr fast | QDrop.lr is fast: give a number
--calibration.method PTQ4ViT --calibration.method.round 3 | PTQ4ViT has no option 'round': did you mean rounds?
--seed_everything -1                        | seed_everything is -1
--seed_everything 4294967296                | seed_everything is 4294967296
--save_every 0                              | save_every is 0
--model.trust true                          | model.trust is true: on a command line it is --trust true
--runs ""                                   | runs is '': give a path
--name ..                                   | name is '..': give one word
--name /tmp/elsewhere                       | name is '/tmp/elsewhere'
--name a/b                                  | name is 'a/b'
--trust maybe                               | trust is maybe: give true or false
--trainer.accelerator foo                   | accelerator='foo'
--trainer.accelerator tpu                   | trainer: Requirement 'torch_xla
--trainer.strategy foo                      | strategy='foo'
--trainer.precision foo                     | trainer.precision is foo: give 32-true, bf16-mixed, 16-mixed
--trainer.precision bf16-true               | trainer.precision is bf16-true
--trainer.precision transformer-engine      | trainer.precision is transformer-engine
--trainer.devices two                       | trainer: `devices`
--trainer.devices -1                        | trainer: `devices`
--trainer.devices 0,1                       | trainer: `devices`
--trainer.num_nodes 2                       | trainer.num_nodes is 2: start the command on each machine
--trainer.accumulate_grad_batches 0         | trainer.accumulate_grad_batches is 0
--trainer.accumulate_grad_batches -1        | trainer.accumulate_grad_batches is -1
--trainer.val_check_interval 0              | trainer.val_check_interval is 0
--trainer.val_check_interval 100            | trainer.val_check_interval is 100, and a pass over the images has 3 batches
--trainer.val_check_interval 1.5            | trainer.val_check_interval is 1.5
--trainer.check_val_every_n_epoch 0         | trainer.check_val_every_n_epoch is 0
--trainer.limit_train_batches 0             | trainer.limit_train_batches is 0
--trainer.limit_train_batches 0.01          | of 3 batches of a pass none is left
--trainer.limit_val_batches 0.01            | trainer.limit_val_batches is 0.01: of 2 batches none is left
--trainer.log_every_n_steps -1              | trainer.log_every_n_steps is -1
--trainer.gradient_clip_val -1              | trainer.gradient_clip_val is -1
--trainer.gradient_clip_val nan             | trainer.gradient_clip_val is nan
--trainer.gradient_clip_algorithm foo       | trainer.gradient_clip_algorithm is 'foo': give norm or value
--trainer.max_epochs -1                     | the schedule of the learning rate needs the length of the run
--trainer.max_epochs -1 --trainer.max_time 00:00:00:02 | the schedule of the learning rate needs the length of the run
--trainer.max_epochs -2                     | trainer.max_epochs is -2
--trainer.max_steps -2                      | trainer.max_steps is -2
--trainer.max_time foo                      | not a valid duration
--trainer.barebones true                    | trainer.barebones is True
--trainer.reload_dataloaders_every_n_epochs 0 | trainer.reload_dataloaders_every_n_epochs is 0
--trainer.use_distributed_sampler true      | trainer.use_distributed_sampler is True
--trainer.overfit_batches 2                 | trainer.overfit_batches is 2
--trainer.enable_checkpointing false        | enable_checkpointing=False
--trainer.profiler foo                      | `profiler`
--trainer.logger foo                        | trainer.logger is foo: no such class can be used here
--trainer.callbacks 3                       | trainer.callbacks is 3: no such class can be used here
--trainer.callbacks+ EarlyStopping          | EarlyStopping needs monitor
--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor nothing | EarlyStopping monitors 'nothing', which is not logged
--trainer.callbacks+ ModelCheckpoint --trainer.callbacks.monitor nothing | ModelCheckpoint monitors 'nothing'
--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor val/top1 --trainer.callbacks.mode foo | EarlyStopping: `mode`
--trainer.callbacks "[{class_path: EarlyStopping, init_args: {monitor: lr}}, {class_path: EarlyStopping, init_args: {monitor: lr}}]" | more than one stateful callback
--trainer.callbacks+ LearningRateFinder     | LearningRateFinder cannot be used
--trainer.callbacks+ BatchSizeFinder        | BatchSizeFinder cannot be used
--trainer.callbacks+ StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.1 | StochasticWeightAveraging
--trainer.callbacks+ GradientAccumulationScheduler --trainer.callbacks.scheduling "{0: 2}" | GradientAccumulationScheduler cannot be used
--trainer.callbacks+ OscillationTracker --trainer.callbacks.momentum x | OscillationTracker.momentum is x: give a number above 0
--trainer.callbacks "[{class_path: LearningRateMonitor, init_args: {logging_interval: foo}}]" | logging_interval is foo: give step or epoch
--trainer.callbacks [null]                  | trainer.callbacks is None
--trainer.callbacks+ OscillationTracker --trainer.callbacks.every 0 | OscillationTracker: every is 0
--trainer.callbacks+ IterativeFreezing --trainer.callbacks.max_bits 9 | IterativeFreezing: max_bits is 9
--trainer.callbacks+ GradientRatio --trainer.callbacks.every 0 | GradientRatio: every is 0
--trainer.callbacks+ WeightAverage --trainer.callbacks.decay 2 | WeightAverage: decay is 2.0
--trainer.callbacks+ IterativeFreezing --trainer.callbacks+ WeightAverage | IterativeFreezing and a weight average do not go together
"""  # noqa: E501
OTHERS = """
predict --config CONFIG                     | qat predict writes a table: give --output
predict --config CONFIG --output IMAGES     | cannot be written
predict --config CONFIG --output nowhere/x.csv | there is no folder nowhere
predict --config CONFIG --trainer.limit_predict_batches 0.01 --output x.csv | of 2 batches none is left
predict --config CONFIG --trainer.limit_predict_batches 0 --output x.csv | trainer.limit_predict_batches is 0
validate --config CONFIG --results_file nowhere/x.json | there is no folder nowhere
validate --config CONFIG --trainer.limit_val_batches 0 | trainer.limit_val_batches is 0: no image would be evaluated
validate --config CONFIG --model.drop_path 2 | model.drop_path is 2.0
validate --config CONFIG --calibration.images 25 | train has 24, choose 1..24
calibrate --config CONFIG --validate maybe  | validate is maybe: give true or false or null
calibrate --config CONFIG --validate        | --validate stands without a value
calibrate --config CONFIG --results_file nowhere/x.json | there is no folder nowhere
calibrate --config CONFIG --data.images ""  | data.images is '': give a path
calibrate --config CONFIG --data.images nowhere | nowhere is not a folder: expected one with images
calibrate --config CONFIG --data.root null  | data.root is not set: give the folder with train/<class>/*.JPEG, or any images
calibrate --config CONFIG --data.images IMAGES/val --data.root null --validate true | data.root is not set
calibrate --config CONFIG --data.images IMAGES/val --calibration.images 13 | val has 12, choose 1..12
calibrate --config CONFIG --calibration.images 25 | train has 24, choose 1..24
calibrate --config CONFIG --ckpt x.ckpt     | --ckpt is x.ckpt, a checkpoint of qat, and qat calibrate starts from float weights
calibrate --config CONFIG --model.quant_checkpoint x.ckpt | --model.quant_checkpoint is x.ckpt, a checkpoint of qat
calibrate --config CONFIG --model.recipe float --model.w_bits null --model.a_bits null | model.recipe is float, which quantizes nothing
calibrate --config CONFIG --trainer.limit_val_batches 0 | so leave it out and say --validate false
calibrate --config CONFIG --trainer.limit_val_batches 0.01 | of 2 batches none is left
calibrate --config CONFIG --trainer.devices 2 --trainer.strategy ddp | InitSteps runs on one device
describe --config CONFIG --data.preprocessing.std [0,1,1] | data.preprocessing.std
describe --config CONFIG --model.model_args.num_classes 3 | set it by model.num_classes
describe --model.arch deit_tinny            | similar names: deit_tiny_patch16_224
describe --model.lrr 3                      | no option --model.lrr: did you mean --model.lr?
describe                                    | model.arch is not set
describe --config                           | --config stands without a value
describe --config=                          | --config stands without a value
describe --config ~/no/such.yaml            | HOME/no/such.yaml: there is no such file
describe --config /dev/null                 | that is no regular file
make-softlabels                             | is not given, and it has no default
make-softlabels LABELS --crops 0            | crops is 0: give an integer from 1 to 65,536
make-softlabels LABELS --crops 65537        | crops is 65537
make-softlabels LABELS --topk 0             | topk is 0
make-softlabels LABELS --crop 5             | no option --crop: did you mean --crops?
make-softlabels LABELS --label_type foo     | label_type is foo: give marginal_smoothing
make-softlabels LABELS --seed 4294967296    | seed is 4294967296
make-softlabels LABELS --crop_scale [0.5,2] | crop_scale is (0.5, 2.0)
make-softlabels LABELS --crop_scale [0.9,0.1] | give the lowest first
make-softlabels LABELS --temperature nan    | temperature is nan
make-softlabels LABELS --flip -1            | flip is -1.0
make-softlabels LABELS --flush_seconds 0    | flush_seconds is 0.0
make-softlabels LABELS --num_nodes 0        | num_nodes is 0
make-softlabels LABELS --config /dev/null   | that is no regular file
import-fkd x LABELS --label_type ori --std [0,1,1] | std is (0.0, 1.0, 1.0)
import-fkd x LABELS --label_type ori --teacher_input_size 0 | teacher_input_size is 0
import-fkd x LABELS --label_type orii       | label_type is orii
convert-official x                          | output is not given
"""  # noqa: E501
CONFIGS: dict[str, tuple[bytes, str]] = {
    "latin-1": (b'model: {arch: "d\xe9it"}\n', "it is no text in UTF-8"),
    "UTF-16": ("model: {lr: 1}\n".encode("utf-16"), "it is no text in UTF-8"),
    "empty": (b"", "is empty"),
    "comments only": (b"# nothing\n", "is empty"),
    "number": (b"3\n", "is 3: write options"),
    "list": (b"[1]\n", "is a list: write options"),
    "null section": (b"model: null\n", "model is null: write the options below it"),
    "section that is a list": (b"trainer: []\n", "trainer is a list: write the options below it"),
    "section that is a file": (b"data: other.yaml\n", "data is 'other.yaml': write the options below it"),
    "key twice": (b"model: {lr: 1, lr: 2}\n", "'lr' stands twice, the second time in line 1"),
    "section twice": (b"model: {lr: 1}\nmodel: {arch: x}\n", "'model' stands twice, the second time in line 2"),
    "torn": (b"model: {lr: 1", "is not valid YAML"),
    "nested without end": (b"[" * 500, "is not valid YAML"),
    "number as key": (b"1: 2\n", "1 is no name of an option"),
    "unknown option": (b"model: {lrr: 3}\n", "no option model.lrr: did you mean model.lr?"),
    "unknown section": (b"modle: {lr: 3}\n", "no option modle.lr: did you mean model.lr?"),
    "text for a number": (b"model: {lr: x}\n", "model.lr is x: give a number above 0"),
    "list for text": (b"model: {arch: [1]}\n", "model.arch is [1]: give text or null"),
    "foreign callback": (b"trainer: {callbacks: [{class_path: my.mod.Foo}]}\n", "names my.mod.Foo"),
    "foreign function": (b"trainer: {callbacks: [{class_path: LambdaCallback, init_args: {setup: os.getcwd}}]}\n",
                         "names os.getcwd"),
    "foreign quantizer": (b"model: {rules: [{match: x, spec: {class_path: a.B, init_args: {bits: 4}}}]}\n",
                          "names a.B: a config file may name classes of qat, lightning and torch"),
    "foreign method": (b"calibration: {method: json.JSONDecoder}\n", "names json.JSONDecoder"),
    "list as a key": (b"? [a]\n: 1\n", "is not valid YAML"),
    "no number": (b'model: {lr: !!float ""}\n', "is not valid YAML"),
    "nested too deeply": (b"model: {rules: " + b"[" * 60 + b"]" * 60 + b"}\n", "is nested deeper than 50 levels"),
    "trusts itself": (b"trust: true\n", "asks to be trusted: only the command line can, with --trust true"),
}  # fmt: skip


def rows(table: str) -> Iterator[tuple[str, str]]:
    for line in table.strip().splitlines():
        words, _, fragment = line.rpartition(" | ")
        yield words.strip(), fragment


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    """Runs a command in an empty folder, where it must end with one line, before any work; returns the line."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    capsys.readouterr()

    def run(*words: str) -> str:
        assert main(list(words)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("qat: error: ")
        assert len(line) < 700
        assert not list(folder.iterdir()), "something was written"
        assert "calibrating" not in caplog.text
        return line

    return run


@pytest.mark.parametrize(("words", "fragment"), [*rows(FIT)], ids=[words for words, _ in rows(FIT)])
def test_fit(words: str, fragment: str, refused, config: Path) -> None:
    home = os.path.expanduser("~")
    line = refused("fit", "--config", str(config), *shlex.split(words))
    assert fragment.replace("HOME", home) in line


@pytest.mark.parametrize(("words", "fragment"), [*rows(OTHERS)], ids=[words for words, _ in rows(OTHERS)])
def test_other_verbs(words: str, fragment: str, refused, config: Path, images: Path) -> None:
    labels = f"--data.root {images} --teacher deit_tiny_patch16_224 --out labels.h5"
    text = words.replace("CONFIG", str(config)).replace("IMAGES", str(images)).replace("LABELS", labels)
    assert fragment.replace("HOME", os.path.expanduser("~")) in refused(*shlex.split(text))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_none(kind: str, refused, tmp_path: Path) -> None:
    content, fragment = CONFIGS[kind]
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    line = refused("validate", "--config", str(path))
    assert fragment in line
    assert "some.yaml" in line or fragment.split()[0] in ("no", "model.lr", "model.arch")


def test_files_that_are_no_configs(refused, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    torch.save({"a": torch.zeros(9)}, tmp_path / "weights.ckpt")
    assert "no regular file" in refused("fit", "--config", str(tmp_path / "fifo.yaml"))
    assert "no regular file" in refused("fit", "--config", str(tmp_path))
    assert "no text in UTF-8" in refused("fit", "--config", str(tmp_path / "weights.ckpt"))
    assert "no checkpoint" in refused("describe", "--ckpt", str(tmp_path / "fifo.yaml"))


MODULE = """
from dataclasses import dataclass
from qat.quantizers import LSQ

@dataclass(frozen=True)
class Mine(LSQ):
    pass
"""


class TestTrust:
    """A class of the user's own, in a module that nothing has imported."""

    @pytest.fixture
    def name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        module = f"own_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(MODULE)
        monkeypatch.syspath_prepend(str(tmp_path))
        yield module
        sys.modules.pop(module, None)

    def rule(self, module: str) -> str:
        return f"[{{match: 'blocks.*.weight_quant', spec: {{class_path: {module}.Mine, init_args: {{bits: 4}}}}}}]"

    def test_on_the_command_line_it_is_imported(self, name: str) -> None:
        assert main(["describe", "--model.arch", "test_vit", "--model.rules", self.rule(name)]) == 0
        assert name in sys.modules

    def test_in_a_config_only_when_the_command_line_says_so(self, name: str, tmp_path: Path, refused) -> None:
        path, base = tmp_path / "top.yaml", tmp_path / "base.yaml"
        base.write_text(f"model: {{arch: test_vit, rules: {self.rule(name)}}}\n")
        path.write_text("base: base.yaml\n")
        assert f"config {base} names {name}.Mine" in refused("describe", "--config", str(path))
        assert name not in sys.modules
        assert main(["describe", "--config", str(path), "--trust", "true"]) == 0

    def test_in_a_recipe_only_when_the_command_line_says_so(self, name: str, tmp_path: Path, refused) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(self.rule(name))
        words = ("describe", "--model.arch", "test_vit", "--model.recipe", str(path))
        assert f"{name}.Mine" in refused(*words)
        assert name not in sys.modules
        assert main([*words, "--trust", "true"]) == 0

    def test_in_a_file_that_is_the_value_of_an_option(self, name: str, tmp_path: Path, refused, config: Path) -> None:
        path = tmp_path / "callbacks.txt"
        path.write_text(f"[{{class_path: {name}.Mine}}]")
        assert f"is the file {path}" in refused("fit", "--config", str(config), "--trainer.callbacks", str(path))
        assert "--trainer is a group" in refused("fit", "--config", str(config), f"--trainer={path}")
        (tmp_path / "own.yaml").write_text("trainer: {callbacks: callbacks.txt}")
        assert "names the file callbacks.txt" in refused("fit", "--config", str(tmp_path / "own.yaml"))
        assert name not in sys.modules

    @pytest.mark.parametrize(
        "text",
        [
            'trainer: {callbacks: \'[{"class_path": "NAME.Mine"}]\'}',
            "trainer: {callbacks: ['{class_path: NAME.Mine}']}",
            'trainer: {plugins: \'{"class_path": "NAME.Mine"}\'}',
            "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, init_args: "
            '{cluster_environment: \'{"class_path": "NAME.Mine"}\'}}}',
            "trainer.callbacks: other.txt",
            "model: {regularizers: ['{class_path: NAME.Mine}']}",
            "model: {regularizers: other.txt}",
            'model: {rules: [\'{"match": "*", "spec": {"class_path": "NAME.Mine", "init_args": {"bits": 4}}}\']}',
            'calibration: {method: \'{"class_path": "NAME.Mine"}\'}',
            "trainer: {callbacks: [{class_path: éNAME.Mine}]}",
            "model.trust: true",
        ],
    )
    def test_in_no_way_that_a_config_can_say_it(
        self, text: str, name: str, tmp_path: Path, refused, config: Path
    ) -> None:
        (tmp_path / "other.txt").write_text(f"[{{class_path: {name}.Mine}}]")
        (tmp_path / f"é{name}.py").write_text(MODULE)
        (tmp_path / "own.yaml").write_text(text.replace("NAME", name))
        line = refused("validate", "--config", str(config), "--config", str(tmp_path / "own.yaml"))
        assert "--trust true" in line or "is other.txt: " in line
        assert not {name, f"é{name}"} & set(sys.modules)

    @pytest.mark.parametrize(
        ("callback", "message"),
        [
            ("{class_path: LambdaCallback, init_args: {on_fit_start: torch.os.system}}", "torch.os.system is named by"),
            ("{class_path: qat.__main__.X}", "qat.__main__.X"),
        ],
    )
    def test_a_trusted_package_is_no_way_to_others(
        self, callback: str, message: str, tmp_path: Path, refused, config: Path
    ) -> None:
        (tmp_path / "own.yaml").write_text(f"trainer: {{callbacks: [{callback}]}}")
        line = refused("fit", "--config", str(config), "--config", str(tmp_path / "own.yaml"))
        assert message in line
        assert "--trust true" in line

    def test_in_a_config_that_is_given_without_a_space(self, tmp_path: Path, refused) -> None:
        (tmp_path / "own.yaml").write_text("model: {arch: test_vit}")
        for verb in ("fit", "describe", "make-softlabels"):
            assert "write --config" in refused(verb, f"-c{tmp_path / 'own.yaml'}")

    def test_what_the_check_does_not_see_in_a_file_is_not_imported(self, name: str) -> None:
        imports = Imports(names=typed_names(["--trainer.callbacks+", "typed.Name", "--config", "some.yaml"]))
        assert imports.names == {"typed.Name"}
        with checked(imports), pytest.raises(QatError, match=f"{name}.Mine is named by a file"):
            _typehints.import_object(f"{name}.Mine")
        assert name not in sys.modules

    def test_a_name_of_a_model_is_no_class(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("model: {arch: test_vit.r160_in1k, recipe: lsq, w_bits: 4, a_bits: 4}\n")
        assert main(["describe", "--config", str(tmp_path / "config.yaml")]) == 0


def test_errors_of_the_system_that_a_user_can_change_are_one_line() -> None:
    full = bad_input(OSError(errno.ENOSPC, "No space left on device", "runs/x/last.ckpt"))
    assert str(full) == "No space left on device: runs/x/last.ckpt"
    assert str(bad_input(OSError(errno.ENOSPC, "No space left on device"))) == "No space left on device"
    assert bad_input(OSError(errno.ENOENT, "No such file or directory", "x")) is None  # a defect of ours
    assert bad_input(ValueError("a defect")) is None
    assert isinstance(bad_input(QatError("bad input")), QatError)


def test_the_options_of_every_method_and_of_its_parts_are_known_with_their_types():
    import qat.ptq  # noqa: F401  registers all of them

    waiting: list[type] = [PTQMethod, WeightRule, ReconstructionLoss]
    seen = 0
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("qat.") and dataclasses.is_dataclass(kind):
            assert {field.name for field in dataclasses.fields(kind)} == constructor_hints(kind).keys()
            seen += 1
    assert seen > 25
