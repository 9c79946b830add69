"""What a command says when it ends."""

from __future__ import annotations

from pathlib import Path

from qat.cli.summary import Best, after_calibration, after_training, after_validation, command, show

METRICS = {"val/top1": 71.25, "val/top5": 90.0, "val/loss": 1.0}
RESULTS = {
    "top1": 66.7, "top5": 88.0, "loss": 1.5, "images": 1000, "seconds": 12.34, "recipe": "weights 8 at 4 bit",
    "size_mb": 3.27, "float_size_mb": 22.9, "calibration": {"snr_db": {f"site{i}": 10.0 + i for i in range(7)}},
}  # fmt: skip


def test_training_ends_with_its_accuracy_its_checkpoints_and_the_next_command() -> None:
    best = Best(Path("r/best.ckpt"), "val/top1", 72.0)
    lines = list(after_training(90, METRICS, Path("r/last.ckpt"), best, Path("my images")))
    assert str(Best(Path("b.ckpt"), "held_out/kl", 0.25)) == "best on held_out/kl 0.2500: b.ckpt"
    assert lines == [
        "trained to step 90; top-1 71.25 %, top-5 90.00 %",
        "checkpoint: r/last.ckpt",
        "best on the validation images, top-1 72.00 %: r/best.ckpt",
        "next: qat validate --ckpt r/last.ckpt --data.root 'my images'",
    ]


def test_a_run_without_validation_has_no_accuracy() -> None:
    assert next(after_training(3, {}, Path("last.ckpt"), None, None)) == "trained to step 3"


def test_a_calibration_names_its_worst_sites_and_its_checkpoint() -> None:
    top1, size, worst, saved, following = after_validation(RESULTS, None, Path("r/ptq.ckpt"))
    assert top1 == "top-1 66.70 %, top-5 88.00 %, loss 1.5000 on 1000 images in 12.3 s"
    assert size.startswith("weights 8 at 4 bit; 3.27 MB")
    assert worst.count("dB") == 5
    assert worst.startswith("most error (signal to noise): site0 10.0 dB")
    assert saved == "checkpoint: r/ptq.ckpt"
    assert following == "next: qat predict --ckpt r/ptq.ckpt --data.images FOLDER --output predictions.csv"


def test_a_calibration_without_evaluation_says_what_was_chosen_and_how_to_go_on() -> None:
    spec = {"class_path": "Log2", "init_args": {"bits": 4}}
    how = {"method": "Frontier(rounds=2)", "images": 32, "seconds": 61.25, "peak_memory_mb": 812}
    chosen = {"chosen": {"a.probs_quant": spec, "b.probs_quant": spec}}
    results = {name: RESULTS[name] for name in ("recipe", "size_mb", "float_size_mb")}
    results |= {"calibration": RESULTS["calibration"] | how | chosen}
    model = ["--config", "my ptq.yaml", "--model.w_bits", "3"]
    first, _, replaced, worst, *rest = after_calibration(results, Path("ptq.ckpt"), Path("images"), False, model, True)
    assert first == "calibrated by Frontier on 32 images in 61.2 s, peak memory 812 MB"
    assert replaced == "chosen: Log2(bits=4) at a.probs_quant, b.probs_quant"
    assert worst.count("dB") == 3
    assert rest == [
        "checkpoint: ptq.ckpt",
        "next: qat validate --ckpt ptq.ckpt --data.root DIR",
        "next: qat fit --config 'my ptq.yaml' --model.w_bits 3 --model.quant_checkpoint ptq.ckpt --data.root DIR",
        "next: qat export --ckpt ptq.ckpt --format onnx --output ptq.onnx",
    ]
    *_, fit, _ = after_calibration(results, Path("ptq.ckpt"), Path("images"), False, model, False)
    assert fit.endswith("--data.root DIR --trainer.max_steps 800 --model.lr 2e-05 --model.step_lr 1e-05")


def test_a_float_model_that_was_not_read_from_a_checkpoint_has_its_accuracy_only() -> None:
    assert len(list(after_validation(RESULTS | {"recipe": "float", "calibration": {}}, None, None))) == 1


def test_lines_are_neither_wrapped_nor_coloured(capsys) -> None:
    line = command("validate", ckpt="a/" * 100 + "[1].ckpt")
    show(line)
    assert capsys.readouterr().out == f"{line}\n"
