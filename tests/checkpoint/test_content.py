"""What a run needs to resume: each part of it is checked before Lightning uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from qat.checkpoint import Card, check_run, has_older_groups
from qat.errors import QatError
from qat.models import param_groups
from tests.checkpoint.saved import make


@pytest.fixture(scope="module")
def run():
    """The content of a checkpoint of a run after a step."""
    model, content = make()
    optimizer = AdamW(param_groups(model, 0.1, 1e-3, 1e-3))
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    loops = {"fit_loop": {"epoch_progress": {"total": {"ready": 1}, "current": {"ready": 1}}}}
    return {**content, **states, "epoch": 0, "global_step": 1, "loops": loops, "callbacks": {}}


def check(content, resumes=True):
    check_run(content, Card.from_dict(content["qat"], "a.ckpt"), "a.ckpt", resumes)


def test_a_whole_run_can_resume(run):
    check(run)


@pytest.mark.parametrize("version", [None, 2, "", "new", ["2.6.0"], torch.ones(3)], ids=str)
def test_the_version_of_lightning(run, version):
    content = {**run, "pytorch-lightning_version": version}
    for resumes in (True, False):
        with pytest.raises(QatError, match=r"^a.ckpt: pytorch-lightning_version is .*, not a version such as '2.6.0'"):
            check(content, resumes)


@pytest.mark.parametrize("name", ["epoch", "global_step", "optimizer_states", "lr_schedulers", "loops", "callbacks"])
def test_a_part_that_is_missing(run, name):
    content = {key: value for key, value in run.items() if key != name}
    with pytest.raises(QatError, match=rf"^a.ckpt(: {name} is None| lacks '{name}')"):
        check(content)
    check(content, resumes=False)


def optimizer_of(content):
    return content["optimizer_states"][0]


SPOILT = {
    "two optimizers": (lambda c: c["optimizer_states"].append({}), "the state of no single optimizer"),
    "no state": (lambda c: optimizer_of(c).pop("state"), "the state of no single optimizer"),
    "a group fewer": (lambda c: optimizer_of(c)["param_groups"].pop(), r"groups of \[\d+, \d+\] parameters, not of"),
    "a parameter fewer": (lambda c: optimizer_of(c)["param_groups"][0]["params"].pop(), "parameters, not of"),
    "a parameter twice": (
        lambda c: optimizer_of(c)["param_groups"][0]["params"].__setitem__(0, 1),
        "numbers of the parameters in its optimizer are mixed up",
    ),
    "another algorithm": (lambda c: optimizer_of(c)["param_groups"][0].update(amsgrad=True), "parameters, not of"),
    "another shape": (lambda c: optimizer_of(c)["state"][0].update(exp_avg=torch.ones(2)), r"exp_avg \(2,\)"),
    "a moment fewer": (lambda c: optimizer_of(c)["state"][0].pop("exp_avg"), "not .'exp_avg', 'exp_avg_sq', 'step'."),
    "NaN": (lambda c: optimizer_of(c)["state"][1]["exp_avg_sq"].fill_(torch.nan), "exp_avg_sq that is not finite"),
    "no schedule": (lambda c: c["lr_schedulers"].clear(), "no single learning rate schedule"),
    "a schedule of another length": (lambda c: c["lr_schedulers"][0]["lr_lambdas"].pop(), "not one of 3 groups"),
    "a step before the first": (
        lambda c: c["lr_schedulers"][0].update(last_epoch=-1),
        "last_epoch of its schedule is -1",
    ),
    "no counters": (lambda c: c["loops"]["fit_loop"]["epoch_progress"].pop("total"), "epoch_progress lacks counters"),
    "counters as a list": (
        lambda c: c["loops"]["fit_loop"].update(epoch_progress=[1]),
        "epoch_progress of its loops is",
    ),
    "data as a list": (lambda c: c.update(ImageNetDataModule=[1]), r"ImageNetDataModule is \[1\], not a mapping"),
    "a pass before the first": (
        lambda c: c.update(ImageNetDataModule={"epoch": -1, "batches": 0}),
        "epoch of ImageNetDataModule is -1",
    ),
    "a pass without crops": (
        lambda c: c.update(ImageNetDataModule={"epoch": 0, "batches": 0, "passes": [2, 0]}),
        "passes of ImageNetDataModule is",
    ),
    "no loop": (lambda c: c["loops"].clear(), "loops has no 'fit_loop'"),
    "a negative count": (
        lambda c: c["loops"]["fit_loop"]["epoch_progress"]["total"].update(ready=-1),
        "epoch_progress.total.ready is -1",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_state_of_other_parameters_is_refused(run, name):
    content = copy.deepcopy(run)
    SPOILT[name][0](content)
    with pytest.raises(QatError, match=f"^a.ckpt.*{SPOILT[name][1]}"):
        check(content)


def test_a_run_without_decay_of_an_older_version_resumes_in_its_groups(run):
    model = make()[0]
    optimizer = AdamW(param_groups(model, 0.0, 1e-3, 1e-3, undivided=True))
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    content = copy.deepcopy({**run, **states})
    check(content)
    assert has_older_groups(content, model, 0.0)
    assert not has_older_groups(run, model, 0.0)
    with pytest.raises(QatError, match=r"weight_decay is 0.1, but .*: resume with 0, or start from its weights"):
        has_older_groups(content, model, 0.1)


def test_groups_do_not_depend_on_the_decay():
    model = make()[0]
    sizes = [[len(group["params"]) for group in param_groups(model, decay, 1.0, 1.0)] for decay in (0.0, 0.1)]
    assert sizes[0] == sizes[1]
    assert [group["weight_decay"] for group in param_groups(model, 0.1, 1.0, 1.0)] == [0.0, 0.1, 0.0]
