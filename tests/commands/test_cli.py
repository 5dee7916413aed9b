"""Command lines: every bad input is one sentence, status 2, no traceback, nothing half-written."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust_backbones.__main__ import VERBS, main, unsupported, usage
from robust_backbones.checkpoint.zoo import published, published_robust
from robust_backbones.classification.engine import Learner
from robust_backbones.commands import cli
from robust_backbones.errors import InputError, PreemptedError
from robust_backbones.runs.record import RunRecord
from tests.conftest import ROOT, disk_of, start_fork

Run = Callable[..., tuple[int, str, str]]
SMALL = ["--arch", "resnet18", "--image-size", "32", "--val-resize", "32", "--batch-size", "8", "--epochs", "1"]
FAST = [*SMALL, "--attack.steps", "1", "--eval-attack.steps", "1", "--workers", "0", "--device", "cpu"]
FAST += ["--no-tensorboard"]


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    status, _, err = result
    assert status == 2
    message = err.strip().splitlines()
    assert len(message) == 1, err
    assert message[0].startswith("error: ")
    for word in words:
        assert word in message[0]


def test_on_windows_one_sentence_says_what_works() -> None:
    assert unsupported("linux") == unsupported("darwin") == ""
    assert "WSL 2" in unsupported("win32")
    # What it says is missing there is what the package imports: where that ends, so has this sentence to.
    sources = [path.read_text() for path in (ROOT / "robust_backbones").rglob("*.py")]
    assert any("import fcntl" in source for source in sources)
    assert any("signal.SIGUSR1" in source for source in sources)


def test_pretrain_then_convert(run_tool: Run, shapes: Path, tmp_path: Path) -> None:
    output, converted = tmp_path / "run", tmp_path / "backbone.pkl"
    data = shapes / "shapes_classification"
    status, out, _ = run_tool("pretrain", "--data", data, "--output", output, "--threat-model", "Linf:4/255", *FAST)
    assert status == 0
    assert "% (Linf:4/255)" in out.splitlines()[-2]  # measured against the training adversary when no other is given
    assert str(output) in out.splitlines()[-1]
    status, out, _ = run_tool("convert", output / "checkpoint.pt", converted, "--no-verify")
    assert status == 0
    assert "Linf:4/255" in out
    assert str(converted) in out.splitlines()[-1]
    assert converted.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threat-model", "L2:-1"], ["epsilon"]),
        (["--threat-model", "L3:1"], ["L3"]),
        (["--threat-model", "0.5"], ["NORM:EPSILON"]),
        (["--arch", "resnet9"], ["resnet9"]),
        (["--precision", "fp4"], ["fp4"]),
        (["--epochs", "0"], ["epochs"]),
        (["--attack.steps", "0"], ["steps"]),
        (["--attack.relative-step-size", "nan"], ["relative_step_size"]),
        (["--weight-decay", "nan"], ["weight_decay"]),
        (["--momentum", "-1"], ["momentum"]),
        (["--interpolation", "lanczos"], ["lanczos"]),
        (["--workers", "-1"], ["workers"]),
        (["--micro-batch-size", "-1"], ["micro_batch_size"]),
        (["--device", "gpu"], ["gpu"]),
        (["--cluster.nodes", "2"], ["--cluster.executor"]),
    ],
)
def test_pretrain_refuses(run_tool: Run, shapes: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    data = shapes / "shapes_classification"
    result = run_tool("pretrain", "--data", data, "--output", tmp_path / "run", *FAST, *arguments)
    assert_refused(result, *words)
    assert not (tmp_path / "run").exists()


def test_pretrain_refuses_data(run_tool: Run, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert_refused(run_tool("pretrain", "--data", tmp_path / "none", "--output", output, *FAST), "no data folder")
    for part in ("train", "val"):
        (tmp_path / "data" / part / "a").mkdir(parents=True)
    assert_refused(run_tool("pretrain", "--data", tmp_path / "data", "--output", output, *FAST), "classes a")
    assert not output.exists()


def test_an_unreadable_image_stops_with_its_name(run_tool: Run, tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for index in range(4):
            (tmp_path / "data" / folder / f"{index}.jpg").write_bytes(b"\xff\xd8 not a picture")
    output = tmp_path / "run"
    assert_refused(run_tool("pretrain", "--data", tmp_path / "data", "--output", output, *FAST), "cannot read", ".jpg")
    assert [path.name for path in output.iterdir()] == ["config.json"]  # a claim, so that the mended data resumes


def test_recipes_are_listed_and_overridden(run_tool: Run, shapes: Path, tmp_path: Path) -> None:
    status, out, _ = run_tool("pretrain", "--list-recipes")
    assert status == 0
    known = published() | published_robust()
    assert known.keys() <= {line.partition(" ")[0] for line in out.splitlines()}
    assert [line.split() for line in out.splitlines() if line.startswith("resnet50_l2_eps3 ")] == [
        ["resnet50_l2_eps3", "resnet50", "L2:3", "62.83"]
    ]
    data, output = shapes / "shapes_classification", tmp_path / "run"
    size = [*FAST[2:], "--lr", "0.01"]
    status, _, _ = run_tool("pretrain", "--recipe=resnet18_linf_eps4.0", "--data", data, "--output", output, *size)
    assert status == 0
    config = RunRecord.read(output / "record.json").config
    assert (config["arch"], config["threat_model"], config["eval_threat_model"]) == ("resnet18", *["Linf:4/255"] * 2)
    assert (config["lr"], config["momentum"], config["batch_size"]) == (0.01, 0.9, 8)
    # An option that fits the recipe's values alone.
    warmups = ["--warmup-epochs", "0.5", "--epsilon-warmup-epochs", "0.5"]
    tuned = ["--recipe", "robust_fine_tuning", "--arch", "test_convnext", *warmups, "--epochs", "1"]
    small = [
        "--batch-size",
        "8",
        "--image-size",
        "64",
        "--val-resize",
        "64",
        "--eval-attack.steps",
        "1",
        "--workers",
        "0",
    ]
    status, _, _ = run_tool(
        "pretrain", *tuned, *small, "--device", "cpu", "--data", data, "--output", tmp_path / "tuned"
    )
    assert status == 0
    config = RunRecord.read(tmp_path / "tuned/record.json").config
    assert (config["optimizer"], config["schedule"], config["warmup_epochs"]) == ("adamw", "cosine", 0.5)
    assert_refused(run_tool("pretrain", "--recipe", "resnet50_l2_eps4", "--data", data, "--output", output), "nearest")


def test_a_failed_training_has_its_own_status(run_tool: Run, shapes: Path, tmp_path: Path) -> None:
    data = shapes / "shapes_classification"
    status, _, err = run_tool("pretrain", "--data", data, "--output", tmp_path / "run", *FAST, "--lr", "1e30")
    assert status == 1
    assert "not finite" in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_asked_to_stop_has_its_own_status(
    run_tool: Run, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Learner.step

    def step(self: Learner, batch: Any) -> None:
        original(self, batch)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Learner, "step", step)
    data = shapes / "shapes_classification"
    status, _, err = run_tool("pretrain", "--data", data, "--output", tmp_path / "run", *FAST)
    assert status == 75
    assert "same command" in err


def test_a_run_is_submitted(run_tool: Run, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    data, output = shapes / "shapes_classification", tmp_path / "run"
    options = ["--cluster.executor", "debug", "--cluster.processes", "1"]
    status, out, _ = run_tool("pretrain", "--data", data, "--output", output, *FAST, *options)
    assert status == 0
    assert "submitted as job" in out
    assert str(output) in out.splitlines()[-1]


def test_an_unknown_option_is_refused(run_tool: Run) -> None:
    status, _, err = run_tool("pretrain", "--data", "x", "--output", "y", "--epsilon", "3")
    assert status == 2
    assert "epsilon" in err


@pytest.mark.parametrize("content", [b"", b"noise", None])
def test_convert_refuses_what_is_no_checkpoint(run_tool: Run, tmp_path: Path, content: bytes | None) -> None:
    source, target = tmp_path / "file.pth", tmp_path / "out.pkl"
    if content is not None:
        source.write_bytes(content)
    assert_refused(run_tool("convert", source, target), "file.pth")
    assert not list(tmp_path.glob("*out.pkl*"))


def test_convert_refuses_another_network_and_another_suffix(run_tool: Run, tmp_path: Path) -> None:
    source = tmp_path / "vit.pth"
    torch.save({"cls_token": torch.ones(1)}, source)
    assert_refused(run_tool("convert", source, tmp_path / "out.pkl"), "cls_token")
    assert_refused(run_tool("convert", source, tmp_path / "out.onnx"), ".pkl")


def test_options_that_would_be_ignored_are_refused(run_tool: Run, tmp_path: Path) -> None:
    output = ["--output", tmp_path / "out"]
    detector = ["evaluate", "detector", "config.yaml", "model_final.pth", *output]
    assert_refused(run_tool(*detector, "--threat-model", "Linf:4/255"), "--attacks")
    assert_refused(run_tool("doctor", "--install-detectron2", "--json"), "--json")
    made = ["inheritance", "make-sets", tmp_path, *output]
    assert_refused(run_tool(*made, "--kinds"), "--kinds")
    assert_refused(run_tool(*made, "--kinds", "fog-1", "--images-per-class", "-3"), "images_per_class")
    protocol = ["inheritance", "run", "x.pt", "--pretraining", tmp_path, "--sets", "a", "b", *output]
    assert_refused(run_tool(*protocol, "--methods"), "one or more")
    assert_refused(run_tool("transfer", "table"), "one or more folders")
    classifier = ["evaluate", "classifier", "x.pt", "--data", tmp_path, "--threat-model", "L2:1", *output]
    for wrong in ("nan", "101"):
        assert_refused(run_tool(*classifier, "--expected", wrong), "in percent")
    assert_refused(run_tool("sweep", "launch", "studies/small.yaml", "--jobs", "-1", *output), "jobs")
    same = [f"{tmp_path}/{part}/all.json:{part}" for part in ("train", "val")]
    assert_refused(run_tool("check-data", *same, "--fix", tmp_path / "out"), "one folder")
    assert_refused(run_tool("check-data", *same, "--workers", "0"), "workers")
    assert not list(tmp_path.iterdir())


def test_convert_replaces_nothing_that_it_reads_or_writes(
    run_tool: Run, tmp_path: Path, torchvision_file: Callable[[str], Path]
) -> None:
    source = tmp_path / "net.pth"
    source.write_bytes(torchvision_file("resnet18").read_bytes())
    base = tmp_path / "base.yaml"
    base.write_text("MODEL: {MASK_ON: True}")
    unproven = ["--no-verify", "--write-config"]
    for arguments in (
        [source],
        [tmp_path / "out.pkl", *unproven, tmp_path / "out.pkl"],
        [tmp_path / "out.pkl", *unproven, base, "--base-config", base],
    ):
        assert_refused(run_tool("convert", source, *arguments), "would be overwritten")
    assert_refused(run_tool("convert", source, tmp_path / "out.pkl", "--base-config", base), "--write-config")
    assert_refused(run_tool("convert", source, tmp_path / "out", "--to", "timm", "--private"), "--push")
    assert source.read_bytes() == torchvision_file("resnet18").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"net.pth", "base.yaml"}


def test_a_file_where_a_folder_is_to_be_is_named(
    run_tool: Run, shapes: Path, tmp_path: Path, torchvision_file: Callable[[str], Path]
) -> None:
    file = tmp_path / "file"
    file.write_text("somebody's")
    converted = run_tool("convert", torchvision_file("resnet18"), file / "robust.pkl", "--no-verify")
    assert_refused(converted, f"{file}: file exists")
    data = shapes / "shapes_classification"
    assert_refused(run_tool("pretrain", "--data", data, "--output", file, *FAST), f"{file}: file exists")
    made = run_tool("inheritance", "make-sets", data / "val", "--output", file, "--kinds", "photograph")
    assert_refused(made, "not a directory")
    assert file.read_text() == "somebody's"


def test_a_failed_proof_leaves_no_file(
    run_tool: Run, tmp_path: Path, torchvision_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("detectron2")
    import robust_backbones.detection.verify as verify

    wrong = [verify.StageError("random", "eval", "res5", 0.3, 0.3)]
    monkeypatch.setattr(verify, "feature_errors", lambda *_, **__: wrong)
    status, _, err = run_tool("convert", torchvision_file("resnet18"), tmp_path / "out.pkl")
    assert status == 1
    assert "the features of resnet18.pth, by , and of what was made from it differ (res5 by 3.0e-01)" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tool", ["train", "convert", "demo", "predict", "evaluate"])
def test_without_detectron2_it_says_how_to_install_it(
    run_tool: Run,
    tool: str,
    tmp_path: Path,
    torchvision_file: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("robust_backbones.detection")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.setenv("DETECTRON2_DATASETS", "")  # the demo sets it: to be put back afterwards
    arguments = {
        "train": ["--config-file", "x.yaml"],
        "convert": [torchvision_file("resnet18"), tmp_path / "out.pkl"],
        "demo": ["--output", tmp_path / "demo"],
        "evaluate": ["detector", "config.yaml", "model_final.pth", "--output", tmp_path / "robustness"],
        "predict": [ROOT / "README.md", "--weights", tmp_path, "--output", tmp_path / "predictions"],
    }
    assert_refused(run_tool(tool, *arguments[tool]), "robust-backbones doctor --install-detectron2")
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback_and_keeps_the_status(run_tool: Run, tmp_path: Path) -> None:
    status, _, err = run_tool("convert", tmp_path / "none", "x.pkl", "--debug")
    assert status == 2
    assert err.startswith("Traceback")
    assert "no file at" in err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["robust-backbones", verb, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    out = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert out.startswith(f"usage: robust-backbones {verb} ")
    assert "Example" in out
    assert f"robust-backbones {verb} " in out.split("Example", 1)[1]
    assert "\n\n\n" not in out
    assert max(len(line) for line in out.splitlines() if not line.startswith(" " * 16)) <= 120


SUBCOMMANDS = {
    "evaluate": ["classifier", "detector"],
    "inheritance": ["run", "table", "make-sets", "corruptions", "detector"],
    "sweep": ["setup", "launch", "status", "collect", "pack", "unpack"],
    "transfer": ["datasets", "probe", "finetune", "table"],
    "visualize": ["activation", "inversion", "saliency"],
}


@pytest.mark.parametrize(
    "command", [*VERBS, *(f"{verb} {name}" for verb, names in SUBCOMMANDS.items() for name in names)]
)
def test_help_has_examples_of_its_own_options_and_breaks_no_sentence(
    command: str, run_tool: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = run_tool(*command.split(), "--help")[1]
    assert [*SUBCOMMANDS.get(command, ())] == re.findall(r"^│   • (\S+)", out, re.MULTILINE)
    examples = re.findall(rf"^    .*robust.backbones {command}\b.*(?:\n {{5,}}\S.*)*", out, re.MULTILINE)
    assert examples
    if command not in SUBCOMMANDS:
        for option in re.findall(r" (--[a-z0-9-]+)", re.sub(r"\S+ .*-m robust", "robust", " ".join(examples))):
            assert re.search(rf"^[ │]+(--\S+ )?{option}\b", out, re.MULTILINE), option
    shown = [line.strip("│").rstrip() for line in out.splitlines() if line.startswith("│")]
    for line, following in pairwise(shown):
        begins = re.match(r" {15,}([A-Za-z]\S*)", following)
        if begins and len(line) + 1 + len(begins[1]) <= 116:  # it would fit into the line before
            assert not line.strip() or line.startswith((" -", " [")) or line[-1] in ".:;", f"{line}\n{following}"


def test_every_verb_is_listed() -> None:
    assert all(f"\n  {verb} " in usage() for verb in VERBS)


@pytest.mark.parametrize(("verb", "meant"), [("trian", "train"), ("convert_backbone", "convert"), ("x", "")])
def test_an_unknown_verb_names_the_nearest(
    verb: str, meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["robust-backbones", verb])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert_refused((int(exit_info.value.code or 0), "", capsys.readouterr().err), f"robust-backbones {meant}")


def test_table_of_records() -> None:
    from robust_backbones.analysis.record_tables import transfer_table

    classifier = RunRecord("c", "pretrain", {}, "L2:3", "d", {"clean_accuracy": 60, "robust_accuracy": 31.44}, 0, {}, 1)
    classifier = RunRecord(**{**classifier.__dict__, "config": {"eval_threat_model": "L2:1"}})
    detector = RunRecord("v", "detection", {}, "L2:3", "v", {"bbox/AP": 50.06, "bbox/AP50": None}, 0, {}, 1)
    table = transfer_table([(classifier, detector)]).to_markdown().splitlines()
    assert "robust acc (L2:1)" in table[0]
    assert table[2] == "| L2:3 | 60.0 | 31.4 | 50.1 | - | - | - |"
    assert np.unique([line.count("|") for line in table]).size == 1


def trial(seed: int, accuracy: float, *, on: str = "held_out", label: str = "robust", **change: Any) -> RunRecord:
    """Of the paper's recipe, but for ``change``."""
    selection = {"selected": "lr0.01_wd0.0005", "on": on, "scores": {}}
    config = {
        "mode": "full_network",
        "metric": "mean_per_class",
        "selection": selection,
        "threat_model": "L2:0",
        "eval_threat_model": "L2:0",
        "augmentation": "resized_crop",
        "normalize": True,
        "num_outputs": 0,
        "images_per_class": 0,
        "freeze": 0,
        "layer_decay": 1.0,
        "epochs": 150,
    } | change
    metrics = {"clean_accuracy": accuracy, "robust_accuracy": accuracy / 2}
    run_id = f"{label}/seed_{seed}"
    return RunRecord(run_id, "transfer", {"label": label}, "L2:3", "pets", metrics, seed, config, 1)


def classification_rows(records: list[RunRecord]) -> list[dict[str, str]]:
    """The rows of the table by column."""
    from robust_backbones.analysis.record_tables import classification_table

    table = classification_table(records)
    return [dict(zip(table.columns, row, strict=True)) for row in table.cells]


def test_trials_of_a_row_are_of_one_backbone_and_count_once() -> None:
    """Each seed with a run and a pre-training of its own is one row; another network of the same name another."""
    own = [trial(seed, 80.0 + seed, seeds=[seed]) for seed in range(3)]
    for one in own:
        one.backbone["source_sha256"] = f"weights of seed {one.seed}"
    other = trial(0, 50.0)
    other.backbone["arch"] = "resnet18"
    again = replace(own[0], config=dict(reversed(own[0].config.items())))
    rows = classification_rows([*own, other, again])
    assert sorted((row["accuracy"], row["trials"]) for row in rows) == [("50.0", "1"), ("81.0", "3")]


def test_a_trial_without_an_accuracy_counts_nowhere() -> None:
    """It is not one of 0 %."""
    lost = trial(1, 0.0)
    lost.metrics.update(clean_accuracy=None, robust_accuracy=None)
    (row,) = classification_rows([trial(0, 80.0), lost])
    assert (row["accuracy"], row["trials"], row["min to max"]) == ("80.0", "1", "80.0 to 80.0")
    assert [row["accuracy"] for row in classification_rows([lost])] == ["-"]


def test_table_of_classification_counts_its_trials() -> None:
    """By hand: of 81, 84, 88.5 the mean is 84.5 and, around it, 3.5² + 0.5² + 4² = 28.5, half of which is 3.775²."""
    one, two = [trial(2, 88.5), trial(0, 81.0), trial(1, 84.0)], [trial(0, 70.25, on="test", label="standard")]
    assert classification_rows([*one, *two]) == [
        {
            "data set": "pets (mean_per_class)",
            "mode": "full_network",
            "backbone": "robust",
            "trained at": "L2:3",
            "accuracy": "84.5",
            "trials": "3",
            "min to max": "81.0 to 88.5",
            "std": "3.77",
            "robust acc": "-",
            "setting": "lr0.01_wd0.0005",
            "selected on": "held_out",
            "epochs": "150",
            "otherwise": "-",
        },
        {
            "data set": "pets (mean_per_class)",
            "mode": "full_network",
            "backbone": "standard",
            "trained at": "L2:3",
            "accuracy": "70.2",
            "trials": "1",
            "min to max": "70.2 to 70.2",
            "std": "-",
            "robust acc": "-",
            "setting": "lr0.01_wd0.0005",
            "selected on": "test",
            "epochs": "150",
            "otherwise": "-",
        },
    ]


def test_table_of_classification_keeps_what_differs_apart() -> None:
    """Every deviation from the paper's recipe is a row of its own and says so; of the order of records nothing."""
    ways = {
        "-": {},
        "L-BFGS": {"solver": "lbfgs", "augmentation": "none"},
        "no augmentation": {"augmentation": "none", "solver": "sgd"},
        "3 cached views": {"views": 3},
        "trained batch statistics": {"batch_norm": "train"},
        "images not normalised": {"normalize": False},
        "57 outputs": {"num_outputs": 57},
        "5 training images a class": {"images_per_class": 5},
        "first 2 groups frozen": {"freeze": 2},
        "layer-wise rates x0.5": {"layer_decay": 0.5},
        "fine-tuned at L2:0.25": {"threat_model": "L2:0.25", "eval_threat_model": "L2:0.25"},
        "57 outputs, first 2 groups frozen": {"freeze": 2, "num_outputs": 57},
    }
    records = [trial(0, 10.0 + place, **change) for place, change in enumerate(ways.values())]
    rows = classification_rows(records)
    assert {row["otherwise"]: row["accuracy"] for row in rows} == {
        way: f"{10 + place:.1f}" for place, way in enumerate(ways)
    }
    robust = {row["otherwise"]: row["robust acc"] for row in rows}
    assert robust.pop("fine-tuned at L2:0.25") == "10.0 (L2:0.25)"  # half of 20
    assert set(robust.values()) == {"-"}
    assert classification_rows(records[::-1]) == rows


def test_table_of_classification_averages_no_two_experiments() -> None:
    unlike = [trial(0, 80.0), trial(1, 90.0, on="test"), trial(2, 20.0, epochs=1), trial(3, 60.0, held_out=0.5)]
    rows = classification_rows(unlike)
    assert sorted(row["accuracy"] for row in rows) == ["20.0", "60.0", "80.0", "90.0"]
    assert {row["trials"] for row in rows} == {"1"}
    # A trial's own numbers make no experiment of it.
    alike = [trial(0, 80.0, run="a", lr=0.01), trial(1, 90.0, run="b", lr=0.001)]
    assert [row["accuracy"] for row in classification_rows(alike)] == ["85.0"]


def test_table_and_curves_of_robustness(tmp_path: Path) -> None:
    from benchmarks.robustness_gain import accuracy_curves, robustness_table

    training = RunRecord("t", "pretrain", {}, "L2:1", "d", {}, 0, {"epochs": 4, "eval_threat_model": "L2:2"}, 90)
    metrics = {f"{stage}_accuracy{end}": 50.0 for stage in ("clean", "pgd") for end in ("", "_low", "_high")}
    metrics |= {"pgd_accuracy": 12.34, "pgd_accuracy_low": 10.0}
    adversary = {"threat_model": "L2:2", "attack": {"steps": 20}}
    evaluation = RunRecord("e", "robustness", {}, "L2:1", "d", metrics, 0, adversary, 1)
    table = robustness_table({"robust": (training, evaluation)}).to_markdown().splitlines()
    assert "robust acc (L2:2, PGD-20)" in table[0]
    assert table[2] == "| robust | L2:1 | 4 | 2 | 50.0 (50.0 to 50.0) | 12.3 (10.0 to 50.0) |"

    training.write(tmp_path / "record.json")
    rows = [{"step": 5, "epoch": 1, "clean_accuracy": 60, "robust_accuracy": 20}, {"step": 9, "epoch": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy_curves({"robust": tmp_path}, tmp_path / "curves")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def refuse(arguments: list[str]) -> int:
    raise InputError("no")


@pytest.mark.parametrize(
    ("main", "status"), [(lambda _: 1, 1), (refuse, 2), (lambda _: sys.exit(PreemptedError.exit_status), 75)]
)
def test_one_of_several_processes_leaves_with_every_status(
    main: Callable[[list[str]], int], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it ends: what would take the interpreter down is gone past. A process that is alone exits as any."""
    left = []
    monkeypatch.setattr("robust_backbones.runs.distributed.end_process", left.append)
    monkeypatch.setattr("sys.argv", ["tool"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):  # as `leave` comes back here
        cli.run(main)
    assert left == [status]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert (left, ended.value.code) == ([status], status)


@pytest.mark.parametrize(("size", "how"), [(1, "closed"), (2, "closed"), (2, "reset")])
def test_a_process_whose_peer_has_ended_says_so(size: int, how: str, tmp_path: Path) -> None:
    def lose(arguments: list[str]) -> int:
        raise RuntimeError(f"[gloo/pair.cc:547] Connection {how} by peer [127.0.0.1]:8404")

    def run() -> None:
        os.environ["WORLD_SIZE"], sys.argv = str(size), ["tool"]
        cli.run(lose)

    process = start_fork(run, tmp_path / "said")
    process.join(60)
    err = (tmp_path / "said/err").read_text()
    assert process.exitcode == 1
    assert ("Traceback" in err) == (size == 1)
    assert ("error: another process of this run has ended" in err) == (size == 2)


def test_ctrl_c_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["tool"])
    with pytest.raises(SystemExit) as ended:
        cli.run(interrupt)
    assert ended.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_whoever_reads_the_output_may_leave(tmp_path: Path) -> None:
    command = f"{sys.executable} -m robust_backbones pretrain --list-recipes | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stderr, done.returncode) in [("", 0), ("", 1)]  # 0 where all was written before it left


@pytest.mark.parametrize("options", ["size=64k", "size=1m,ro"])
def test_a_disk_that_is_full_or_read_only_is_one_sentence(
    options: str, torchvision_file: Callable[[str], Path], tmp_path: Path, run_tool: Callable[..., tuple[int, str, str]]
) -> None:
    with disk_of(options, tmp_path / "disk") as disk:
        status, _, err = run_tool("convert", torchvision_file("resnet18"), disk / "robust.pkl", "--no-verify")
        left = [*disk.iterdir()]
    reason = "read-only file system: choose" if "ro" in options else "no space left on device: make room"
    assert err.splitlines()[-1].startswith(f"error: {disk / 'robust.pkl'}: {reason}"), err
    assert (status, left) == (2 if "ro" in options else 1, [])
