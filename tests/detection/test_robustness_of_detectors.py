"""Cells of a detector's robustness: clean is clean, only what was asked for is counted, and a kill loses nothing."""

import csv
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from detectron2.structures import Boxes, ImageList, Instances
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from torch import nn

from robust_backbones.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, image_seed
from robust_backbones.data.synthetic import CLASSES
from robust_backbones.detection.attacks import DetectorAttack, attack_image
from robust_backbones.detection.cell_images import ImageChoice, find_domains, take_images
from robust_backbones.detection.cell_jobs import CellJob, metrics_of, worst_attacks
from robust_backbones.detection.cells import AttackCell, Cell, CellMapper, CorruptionCell, attack_cell, corruption_cells
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import load_config
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.evaluators import VocEvaluator, coco_metrics, ground_truth
from robust_backbones.detection.hooks import flat_metrics
from robust_backbones.detection.predictor import Predictor, load_detector
from robust_backbones.detection.robust_evaluation import evaluate_detector, summarize
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.conftest import call_verb, global_generators, start_fork, start_forks
from tests.detection.conftest import SHAPES_CONFIG, SMALL
from tests.detection.test_evaluators import write_voc

pytest.importorskip("imagecorruptions", reason="imagecorruptions-imaug is not installed: make setup")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools under NumPy 2
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide"),  # VOC, a class without objects
]

Run = Callable[..., tuple[int, str, str]]
CATEGORIES = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
FEW = corruption_cells(("contrast", "impulse_noise"), (0, 3))
"""Cheap ones; one is random."""
CELLS = ["clean", "contrast-0", "contrast-3", "impulse_noise-0", "impulse_noise-3"]


@pytest.fixture(scope="module")
def run(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; its detector was never trained, and finds many things of every score and class."""
    folder = tmp_path_factory.mktemp("run")
    cfg = load_config(SHAPES_CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", "TEST.EXPECTED_RESULTS", []])
    torch.manual_seed(0)
    checkpointer = BackboneCheckpointer(build_model(cfg), str(folder), cfg=cfg)
    checkpointer.load(str(converted("resnet18")))
    checkpointer.model.roi_heads.box_predictor.cls_score.weight.data.mul_(6)
    checkpointer.save("model_final", categories=CATEGORIES)
    checkpointer.save("model_other", categories=[{**row, "name": f"no {row['name']}"} for row in CATEGORIES])
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture(scope="module")
def root(run: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes, but what is to be found in the test images are three things that the detector does find there."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(shapes / "shapes", root / "shapes")
    file = root / "shapes/annotations/instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"] = []
    predictor = Predictor(run, device="cpu")
    for image in content["images"]:
        found = predictor(root / "shapes/val" / image["file_name"])
        for box, number in zip(found.pred_boxes.tensor[:3].tolist(), found.pred_classes.tolist(), strict=False):
            x0, y0, x1, y1 = box
            row = {"id": len(content["annotations"]) + 1, "image_id": image["id"], "category_id": number + 1}
            row |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            content["annotations"].append({**row, "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]]})
    file.write_text(json.dumps(content))
    return root


@pytest.fixture(autouse=True)
def data(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    known = set(DatasetCatalog)
    yield root
    for name in set(DatasetCatalog) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def few(run: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cells of FEW."""
    output = tmp_path_factory.mktemp("few") / "robustness"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        evaluate(run, output, FEW)
    return output


def evaluate(run: Path, output: Path, cells: Sequence[Cell] = (), **options: Any) -> RunRecord:
    return evaluate_detector(run / "config.yaml", run / "model_final.pth", output, cells, **{"workers": 0, **options})


def metrics(output: Path, cell: str) -> dict[str, float | None]:
    return RunRecord.read(output / "cells" / cell / "record.json").metrics


def detections(output: Path, cell: str) -> bytes:
    return (output / "cells" / cell / "detections.json").read_bytes()


def assert_same_cells(one: Path, other: Path, cells: list[str]) -> None:
    for cell in cells:
        assert metrics(one, cell) == metrics(other, cell)
        assert detections(one, cell) == detections(other, cell)


def by_train_net(run: Path, *overrides: object) -> dict[str, float | None]:
    """The metrics of ``train_net.py --eval-only``."""
    cfg = load_config(run / "config.yaml", ["SOLVER.AMP.ENABLED", False, "DATALOADER.NUM_WORKERS", 0, *overrides])
    register_datasets(cfg)
    cfg.OUTPUT_DIR = str(run)
    model = load_detector(cfg, run / "model_final.pth").model
    return flat_metrics(Trainer.test(cfg, model))


def test_clean_and_severity_0_are_exactly_the_plain_evaluation(few: Path, run: Path) -> None:
    plain = by_train_net(run)
    assert plain["bbox/AP50"] > 50 > metrics(few, "contrast-3")["bbox/AP50"]
    for cell in ("clean", "contrast-0", "impulse_noise-0"):
        assert metrics(few, cell) == plain
        assert detections(few, cell) == detections(few, "clean")
    assert len({detections(few, cell) for cell in CELLS}) == 3
    assert sorted(path.name for path in (few / "cells").iterdir()) == CELLS
    assert sorted(path.name for path in (few / "cells/clean").glob("[!.]*")) == ["detections.json", "record.json"]


def test_a_detector_that_finds_nothing_on_clean_images_is_told(run: Path, tmp_path: Path) -> None:
    cfg = load_config(run / "config.yaml", ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    record = evaluate_detector(tmp_path / "config.yaml", run / "model_final.pth", tmp_path / "out", workers=0)
    (warning,) = record.config["warnings"]["clean"]
    assert "no detection above SCORE_THRESH_TEST on the 6 images of shapes_val" in warning


def test_a_record_tells_what_was_measured(few: Path) -> None:
    record, clean = RunRecord.read(few / "record.json"), RunRecord.read(few / "cells/clean/record.json")
    assert (record.task, clean.task) == ("detector_robustness", "detector_robustness")
    assert (record.backbone["arch"], record.dataset, record.config["images"]) == ("resnet18", "shapes_val", 6)
    assert record.config["cells"] == CELLS
    assert record.metrics["P/bbox/AP"] == clean.metrics["bbox/AP"]
    assert record.metrics["contrast-3/segm/AP"] == metrics(few, "contrast-3")["segm/AP"]
    # Two of the 75 corrupted cells are no mean of anything.
    assert [record.metrics[f"{name}/bbox/AP"] for name in ("mPC", "rPC", "contrast")] == [None] * 3


@pytest.mark.slow
def test_finished_cells_are_not_run_again_and_others_join_them(few: Path, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(few, output)
    before = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*")}
    drawn = global_generators()
    record = evaluate(run, output, corruption_cells(("brightness",), (1,)))
    assert global_generators() == drawn
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(record.config["cells"]) == ["brightness-1", *CELLS]
    assert record.metrics["contrast-3/bbox/AP"] == metrics(few, "contrast-3")["bbox/AP"]


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_the_file_is_corrupted_before_it_is_resized(run: Path, data: Path, image_format: str) -> None:
    cfg = load_config(run / "config.yaml", ["INPUT.FORMAT", image_format])
    path = data / "shapes/val/000002.jpg"
    found = CellMapper(cfg, CorruptionCell("x", corruption="frost", severity=2), 7)({"file_name": str(path)})["image"]
    rgb = cv2.imread(str(path))[..., ::-1]
    corrupted = corrupt(np.ascontiguousarray(rgb), "frost", 2, seed=image_seed("000002.jpg", "frost", 2, 7))
    cv2.imwrite(str(path.with_suffix(".png")), corrupted[..., ::-1])  # loses nothing
    expected = DatasetMapper(cfg, is_train=False)({"file_name": str(path.with_suffix(".png"))})["image"]
    path.with_suffix(".png").unlink()
    assert found.shape[1:] == (64, 64)
    assert torch.equal(found, expected)


# Summaries


def test_mpc_and_rpc_by_hand() -> None:
    """40 - place - 2 x severity has the means 34, 33, ..., 20 over severities and 27 over all, which is 45 % of 60."""
    cells: dict[str, Mapping[str, float | None]] = {"clean": {"bbox/AP": 60.0, "bbox/AP50": 0.0}}
    for place, name in enumerate(CORRUPTIONS):
        for severity in SEVERITIES:
            cells[f"{name}-{severity}"] = {"bbox/AP": 40.0 - place - 2 * severity, "bbox/AP50": 0.0}
    cells |= {"domain-sketch": {"bbox/AP": 12.5, "bbox/AP50": None}, "fog-0": {"bbox/AP": 99.0, "bbox/AP50": 99.0}}
    found = summarize(cells)
    assert [found[f"{name}/bbox/AP"] for name in ("P", "mPC", "rPC", "domain-sketch")] == [60, 27, 45, 12.5]
    assert [found[f"{name}/bbox/AP"] for name in CORRUPTIONS] == list(range(34, 19, -1))
    assert [found[f"{name}/bbox/AP50"] for name in ("P", "mPC", "rPC")] == [0, 0, None]  # a share of nothing
    assert found["corrupted/bbox/AP"] == 27
    assert "corrupted/bbox/AP" not in summarize({"clean": cells["clean"], "fog-0": cells["fog-0"]})
    assert "P/segm/AP" not in found
    for missing in ("gaussian_noise-1", "jpeg_compression-5"):
        less = summarize({name: cell for name, cell in cells.items() if name != missing})
        absent = [f"{missing[:-2]}/bbox/AP", "mPC/bbox/AP", "rPC/bbox/AP"]
        assert [less[name] for name in absent] == [None] * 3
        kept = {name: value for name, value in found.items() if "bbox/AP" in name and not name.startswith(missing[:-2])}
        assert less["corrupted/bbox/AP"] == pytest.approx((27 * 75 - cells[missing]["bbox/AP"]) / 74)  # type: ignore[operator]
        kept = {n: value for n, value in kept.items() if n.split("/")[0] not in ("mPC", "rPC", "corrupted")}
        assert {name: less[name] for name in kept} == kept
    assert summarize(cells | {"fog-3": {"bbox/AP": None}})["mPC/bbox/AP"] is None


# Limits


def test_a_greater_limit_contains_a_smaller_one(run: Path, data: Path, tmp_path: Path) -> None:
    """And images without an object, or with crowds alone, are never taken."""
    content = json.loads((data / "shapes/annotations/instances_val.json").read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 3)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 5]
    (tmp_path / "changed.json").write_text(json.dumps(content))
    cfg = load_config(run / "config.yaml")
    cfg.DATASETS.COCO_FORMAT = (("changed", str(tmp_path / "changed.json"), "shapes/val"),)
    register_datasets(cfg)

    def taken(limit: int, seed: int = 0) -> list[int]:
        name = take_images("changed", ImageChoice(limit, seed), tmp_path / str(limit))
        ids = [item["image_id"] for item in DatasetCatalog.get(name)]
        assert [*COCO(MetadataCatalog.get(name).json_file).imgs] == ids
        assert ids == sorted(ids)  # as in the whole set
        return ids

    nested = [set(taken(limit)) for limit in (1, 2, 3, 4, 9)]
    assert [len(ids) for ids in nested] == [1, 2, 3, 4, 4]
    assert all(small <= large for small, large in itertools.pairwise(nested))
    assert nested[-1] == {1, 2, 4, 6}
    assert len({tuple(taken(2, seed)) for seed in range(8)}) > 1


def test_a_limit_is_an_evaluation_of_these_images_alone(run: Path, data: Path, tmp_path: Path) -> None:
    record = evaluate(run, tmp_path / "out", images=ImageChoice(3))
    assert record.config["images"] == 3
    limited = json.loads((tmp_path / "out/images/shapes_val_limited.json").read_text())
    ids = {image["id"] for image in limited["images"]}
    content = json.loads((data / "shapes/annotations/instances_val.json").read_text())
    by_hand = {
        "images": [row for row in content["images"] if row["id"] in ids],
        "annotations": [row for row in content["annotations"] if row["image_id"] in ids],
        "categories": content["categories"],
    }
    (tmp_path / "by_hand.json").write_text(json.dumps(by_hand))
    rows = [["by_hand", str(tmp_path / "by_hand.json"), "shapes/val"]]
    expected = by_train_net(run, "DATASETS.COCO_FORMAT", rows, "DATASETS.TEST", ["by_hand"])
    assert metrics(tmp_path / "out", "clean") == expected
    assert expected != by_train_net(run)


# VOC


@pytest.fixture
def voc(run: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The shapes of 300 pixels as a VOC set, and a configuration for it."""
    folder = tmp_path / "voc"
    content = json.loads((data / "shapes/annotations/instances_val.json").read_text())
    objects: dict[str, Any] = {f"{image['id']:06d}": [] for image in content["images"]}
    for row in content["annotations"]:
        x, y, width, height = (side * 300 / 96 for side in row["bbox"])
        box = [round(side) for side in (x + 1, y + 1, x + width, y + height)]
        objects[f"{row['image_id']:06d}"].append((CLASSES[row["category_id"] - 1], box, 0))
    write_voc(folder, objects)
    (folder / "JPEGImages").mkdir()
    for name in objects:
        image = cv2.imread(str(data / f"shapes/val/{name}.jpg"))
        cv2.imwrite(str(folder / f"JPEGImages/{name}.jpg"), cv2.resize(image, (300, 300)))
    register_pascal_voc("voc_of_shapes", str(folder), "test", 2007, CLASSES)
    MetadataCatalog.get("voc_of_shapes").evaluator_type = "pascal_voc"
    cfg = load_config(run / "config.yaml", ["DATASETS.TEST", ["voc_of_shapes"], "MODEL.MASK_ON", False])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return folder, tmp_path / "config.yaml"


@pytest.mark.parametrize("limit", [None, 1, 3])
def test_voc(run: Path, voc: tuple[Path, Path], tmp_path: Path, limit: int | None) -> None:
    """Its own evaluator counts the images that are asked for, and the detections come back from their file exactly."""
    folder, config = voc
    output, weights = tmp_path / "out", run / "model_final.pth"
    cells = corruption_cells(("contrast",), (0,))
    record = evaluate_detector(config, weights, output, cells, images=ImageChoice(limit), workers=0)
    assert record.config["measure"] == "bbox/AP50"
    assert {"P/bbox/AP", "P/bbox/AP50"} <= record.metrics.keys()
    clean = metrics(output, "clean")
    assert metrics(output, "contrast-0") == clean
    rows = json.loads(detections(output, "clean"))
    images = sorted({row["image_id"] for row in rows})
    if limit:
        # The same images as a VOC set made by hand.
        assert images == (output / "images/voc_of_shapes_limited.txt").read_text().split()
        (folder / "ImageSets/Main/some.txt").write_text("\n".join([*images, ""]))
        register_pascal_voc("voc_by_hand", str(folder), "some", 2007, CLASSES)
        items = [item for item in DatasetCatalog.get("voc_of_shapes") if item["image_id"] in images]
        DatasetCatalog.remove("voc_by_hand")  # NumPy reads a list of one image as none
        DatasetCatalog.register("voc_by_hand", lambda: items)
        MetadataCatalog.get("voc_by_hand").evaluator_type = "pascal_voc"
    assert len(images) == (limit or 6)
    cfg = load_config(config, ["DATALOADER.NUM_WORKERS", 0, "SOLVER.AMP.ENABLED", False])
    cfg.DATASETS.TEST = ("voc_by_hand" if limit else "voc_of_shapes",)
    assert clean == flat_metrics(Trainer.test(cfg, load_detector(cfg, weights).model))
    assert metrics_of(rows, cfg.DATASETS.TEST[0], masks=False) == clean


def test_vocs_difficult_objects_do_not_decide_what_the_worst_attack_is(
    run: Path, voc: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two of three objects are: one attack leaves only them found, the other only the third, which is perfect by AP."""
    folder, config = voc
    weights, output = run / "model_final.pth", tmp_path / "out"
    for path in (folder / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 2))
    cells = [Blackened("attack-a", attack=ATTACK), Blackened("attack-b", attack=ATTACK)]
    evaluate_detector(config, weights, output, cells, workers=0)
    for name, ignored in (("attack-a", 0), ("attack-b", 1)):
        things = ground_truth("voc_of_shapes").dataset["annotations"]
        rows = [{**thing, "score": 0.9} for thing in things if thing["ignore"] == ignored]
        (output / f"cells/{name}/detections.json").write_text(json.dumps(rows))
    evaluate_detector(config, weights, output, cells, workers=0)
    worst = metrics(output, "attack-worst")
    assert (worst["images/attack-a"], worst["images/attack-b"]) == (0, 6)
    assert worst["bbox/AP"] == 0
    # Another choice of them is another data set, as for AP.
    (folder / "Annotations/000001.xml").write_text(
        (folder / "Annotations/000001.xml").read_text().replace("<difficult>1", "<difficult>0")
    )
    assert "the files of voc_of_shapes have changed" in refusal(config, weights, output)


def test_voc_in_cocos_format(voc: tuple[Path, Path]) -> None:
    """Perfect detections, from the annotations as Detectron2 reads them, are perfect by both measures.

    VOC's counts the classes that no image shows as 0.
    """
    evaluator = VocEvaluator("voc_of_shapes")
    for item in DatasetCatalog.get("voc_of_shapes"):
        found = Instances((300, 300))
        found.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in item["annotations"]]))
        found.scores = torch.ones(len(found.pred_boxes))
        found.pred_classes = torch.tensor([a["category_id"] for a in item["annotations"]])
        evaluator.process([item], [{"instances": found}])
    rows = evaluator.results
    assert coco_metrics(ground_truth("voc_of_shapes"), rows, "bbox")["AP"] == pytest.approx(100)
    shown = {row["category_id"] for row in rows}
    assert metrics_of(rows, "voc_of_shapes", masks=False)["bbox/AP50"] == pytest.approx(100 * len(shown) / len(CLASSES))


# Whatever else changes the input


ATTACK = DetectorAttack(threat_model=ThreatModel())


class Unchanged(AttackCell):
    """And the ground truth is there, at the size of the input."""

    def change(self, model: nn.Module, sample: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, float]]:
        assert not model.training
        assert sample["instances"].image_size == tuple(sample["image"].shape[1:]) == (64, 64)
        assert len(sample["instances"].gt_boxes) == len(sample["instances"].gt_masks) > 0
        return {**sample, "image": sample["image"].float()}, {"objects": float(len(sample["instances"]))}


class Blackened(AttackCell):
    def change(self, model: nn.Module, sample: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, float]]:
        return {**sample, "image": torch.zeros_like(sample["image"])}, {}


@pytest.mark.slow
def test_neither_order_nor_processes_nor_workers_nor_a_change_of_nothing_matter(
    few: Path, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random corruption first; two processes, with a worker each."""
    monkeypatch.setattr("torch.multiprocessing.start_processes", start_forks)
    output = tmp_path / "out"
    cells = corruption_cells(("impulse_noise", "contrast"), (3,))
    cells += [Unchanged("attack-none", attack=ATTACK), Blackened("attack-black", attack=ATTACK)]
    record = evaluate(run, output, cells, jobs=2, workers=1)
    assert_same_cells(output, few, ["clean", "contrast-3", "impulse_noise-3"])
    found = metrics(output, "attack-none")
    content = json.loads((data / "shapes/annotations/instances_val.json").read_text())
    assert found.pop("objects") == len(content["annotations"]) / 6
    assert found == metrics(few, "clean")
    assert detections(output, "attack-none") == detections(few, "clean")
    assert record.metrics["attack-black/bbox/AP"] == metrics(output, "attack-black")["bbox/AP"]
    # No image is found under black, so that the worst of both is black.
    worst = metrics(output, "attack-worst")
    assert (worst.pop("images/attack-none"), worst.pop("images/attack-black")) == (0, 6)
    assert worst == metrics(output, "attack-black")
    assert record.metrics["attack-worst/bbox/AP"] == worst["bbox/AP"] < found["bbox/AP"]


def test_the_worst_attack_is_of_all_commands_in_the_same_ball(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def attacks(*cells: Cell) -> tuple[list[str], list[str]]:
        record = evaluate(run, output, cells)
        found = record.config["attacks"].get("attack-worst", {"attacks": []})["attacks"]
        return found, record.config["warnings"].get("attack-worst", [])

    assert attacks(Unchanged("attack-none", attack=ATTACK)) == ([], [])
    assert attacks(Blackened("attack-black", attack=ATTACK)) == (["attack-black", "attack-none"], [])
    assert metrics(output, "attack-worst")["images/attack-black"] == 6
    other = AttackCell("attack-total", settings={"threat_model": "another"}, attack=ATTACK)
    found, (warning,) = attacks(other)
    assert found == ["attack-black", "attack-none"]
    assert "of attack-black, attack-none alone, without attack-total" in warning
    assert attacks(Blackened("attack-black", attack=ATTACK), other) == (found, [warning])  # in two balls at once


@pytest.mark.slow
def test_attacks(few: Path, run: Path, tmp_path: Path, run_tool: Run) -> None:
    """At epsilon 0 the clean metrics bit by bit; above it a higher loss, the same by the command; never another one."""
    output = tmp_path / "out"
    still = DetectorAttack(threat_model=ThreatModel("Linf", 0.0), loss="objectness", steps=1)
    evaluate(run, output, [attack_cell(still)])
    assert detections(output, "attack-objectness") == detections(few, "clean")
    found = metrics(output, "attack-objectness")
    assert found.pop("loss") == found.pop("clean_loss")
    assert found == metrics(few, "clean")
    options = ["--corruptions", "none", "--workers", "0", "--threat-model", "Linf:4/255", "--attack-steps", "4"]
    status, _, err = run_tool(*command(run, output, *options, "--attacks", "objectness"))
    assert (status, "attack-objectness was measured with other settings" in err) == (2, True)
    output = tmp_path / "limited"
    attacks = ["--limit", "2", "--attacks", "classification", "objectness"]
    status, out, _ = run_tool(*command(run, output, *options, *attacks))
    assert status == 0
    for name in attacks[3:]:
        attacked = metrics(output, f"attack-{name}")
        assert attacked["loss"] > attacked["clean_loss"]
        assert f"attack-{name} " in out
        told = RunRecord.read(output / "record.json").metrics
        assert [told[f"attack-{name}/{key}"] for key in ("clean_loss", "loss")] == [
            attacked[key] for key in ("clean_loss", "loss")
        ]
    assert sum(metrics(output, "attack-worst")[f"images/attack-{name}"] or 0 for name in attacks[3:]) == 2
    status, _, err = run_tool(*command(run, output, "--attacks", "total"))
    assert (status, "an attack needs --threat-model" in err) == (2, True)
    # Honest gradients: nothing is flagged, and the losses of the check are in order.
    assert "warning: attack" not in out
    held = metrics(output, "attack-classification")
    for weaker in ("clean", "random"):
        losses = [held[f"sanity/loss/{name}"] for name in (weaker, "attack", "attack x2", "attack x4")]
        assert (held["sanity/images"], losses) == (2, sorted(losses))
    # The errors that are drawn are of these cells.
    table = list(csv.DictReader((output / "errors.csv").read_text().splitlines()))
    cells = ["clean", "attack-classification", "attack-objectness", "attack-worst"]
    assert sorted(row["condition"] for row in table) == sorted(cells)
    for row in table:
        assert float(row["AP50"]) == pytest.approx(metrics(output, row["condition"])["bbox/AP50"])
    status, _, err = run_tool(*command(run, output, "--limit", "2", "--corruptions", "none", "--errors", "fog-3"))
    assert (status, "no cell fog-3 was evaluated" in err) == (2, True)


def test_errors_are_of_as_many_detections_as_ap_is(run: Path, tmp_path: Path, run_tool: Run) -> None:
    """Of 100 of a class they were, whatever TEST.MAX_DETS."""
    shutil.copytree(run, tmp_path / "run")
    cfg = load_config(run / "config.yaml", ["TEST.MAX_DETS", (1, 2)])
    (tmp_path / "run/config.yaml").write_text(cfg.dump())
    output = tmp_path / "out"
    words = command(tmp_path / "run", output, "--corruptions", "none", "--limit", "3", "--workers", "0")
    assert run_tool(*words)[0] == 0
    (row,) = csv.DictReader((output / "errors.csv").read_text().splitlines())
    assert float(row["AP50"]) == pytest.approx(metrics(output, "clean")["bbox/AP50"])


@pytest.mark.slow
def test_a_target_is_an_attack_of_its_own(run: Path, tmp_path: Path, run_tool: Run) -> None:
    output = tmp_path / "out"
    options = ["--corruptions", "none", "--workers", "0", "--limit", "3", "--attack-target", "1"]
    options += ["--threat-model", "Linf:8/255"]
    status, out, _ = run_tool(*command(run, output, *options, "--attack-steps", "3"))
    assert (status, "attack-target-1" in out) == (0, True)
    found = metrics(output, "attack-target-1")
    assert found["clean_loss"] < found["loss"] <= 0  # minus the loss of the targets
    clean, attacked = (json.loads(detections(output, name)) for name in ("clean", "attack-target-1"))
    taken = [sum(row["score"] for row in rows if row["category_id"] == 2) for rows in (clean, attacked)]
    assert taken[0] < taken[1]
    status, _, err = run_tool(*command(run, output, *options, "--attacks", "total"))
    assert (status, "give it without --attacks" in err) == (2, True)


@META_ARCH_REGISTRY.register()
class RoundingRCNN(GeneralizedRCNN):
    """A detector that hides its gradients: it sees few levels of each pixel, between which nothing changes."""

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        rounded = [{**sample, "image": 24 * (sample["image"] / 24).round()} for sample in batched_inputs]
        return super().preprocess_image(rounded)


@pytest.mark.slow
def test_masked_gradients_are_flagged(run: Path, tmp_path: Path, run_tool: Run) -> None:
    """In what is printed and in the record; the same detector without its mask is not (see test_attacks)."""
    masked = tmp_path / "run"
    shutil.copytree(run, masked)
    text = (run / "config.yaml").read_text()
    (masked / "config.yaml").write_text(
        text.replace("META_ARCHITECTURE: GeneralizedRCNN", "META_ARCHITECTURE: RoundingRCNN")
    )
    output = tmp_path / "out"
    options = ["--corruptions", "none", "--workers", "0", "--attacks", "total", "--threat-model", "Linf:4/255"]
    options += ["--limit", "3"]
    status, out, _ = run_tool(*command(masked, output, *options, "--attack-steps", "3"))
    assert status == 0
    assert "warning: attack-total: random noise is stronger than the white-box attack on " in out
    assert "warning: attack-total: a larger epsilon is not stronger on 3 of 3 images" in out
    (warnings,) = RunRecord.read(output / "record.json").config["warnings"].values()
    assert all(warning in out for warning in warnings)


def test_masks_cannot_be_attacked_where_there_are_none(run: Path, tmp_path: Path, run_tool: Run) -> None:
    """Refused before anything is written."""
    boxes = tmp_path / "run"
    shutil.copytree(run, boxes)
    (boxes / "config.yaml").write_text((run / "config.yaml").read_text().replace("MASK_ON: true", "MASK_ON: false"))
    options = ["--attacks", "mask", "--threat-model", "Linf:4/255"]
    content = torch.load(boxes / "model_final.pth", weights_only=True)
    content["model"] = {name: value for name, value in content["model"].items() if "mask_head" not in name}
    torch.save(content, boxes / "model_final.pth")
    status, _, err = run_tool(*command(boxes, tmp_path / "out", *options))
    assert (status, "the mask loss needs a detector with masks" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_crowds_are_no_objects_to_attack(run: Path, data: Path) -> None:
    cfg = load_config(run / "config.yaml")
    register_datasets(cfg)
    (item, *_) = (item for item in DatasetCatalog.get("shapes_val") if len(item["annotations"]) > 1)
    item["annotations"][0]["iscrowd"] = 1
    sample = CellMapper(cfg, Unchanged("x", attack=ATTACK), 0)(item)
    assert len(sample["instances"]) == len(item["annotations"]) - 1
    kept = torch.tensor(item["annotations"][1]["bbox"][:2]) * 64 / 96
    assert torch.allclose(sample["instances"].gt_boxes.tensor[0, :2], kept, atol=1e-4)


@pytest.mark.parametrize("masks", ["run lengths", "not of the first", "not of the last"])
def test_objects_with_any_mask_and_with_none_are_attacked(run: Path, data: Path, masks: str) -> None:
    """As training takes run lengths, and mask AP objects without a mask."""
    cfg = load_config(run / "config.yaml")
    register_datasets(cfg)
    item = next(item for item in DatasetCatalog.get("shapes_val") if len(item["annotations"]) > 1)
    things = item["annotations"]
    if masks == "run lengths":
        for thing in things:
            rows = mask_tools.frPyObjects(thing["segmentation"], item["height"], item["width"])
            thing["segmentation"] = mask_tools.merge(rows)
    else:
        del things[0 if masks == "not of the first" else -1]["segmentation"]
    attack = DetectorAttack(threat_model=ThreatModel("Linf", 4 / 255), loss="mask", steps=1)
    sample = CellMapper(cfg, attack_cell(attack), 0)(item)
    assert len(sample["instances"]) == len(things)
    found = attack_image(load_detector(cfg, run / "model_final.pth").model, sample, attack)
    assert found.loss >= found.clean_loss > 0


def test_the_worst_attack_for_each_image_by_hand() -> None:
    """Image 1 is hurt by b alone, image 2 by a alone, image 3 by neither, image 4 has nothing to be found."""
    truth = COCO()
    boxes = {1: [10, 10, 30, 30], 2: [20, 20, 40, 40], 3: [5, 5, 50, 50]}
    truth.dataset = {
        "images": [{"id": image, "height": 100, "width": 100} for image in (1, 2, 3, 4)],
        "categories": [{"id": 7, "name": "thing"}, {"id": 9, "name": "other"}],
        "annotations": [
            {"id": image, "image_id": image, "category_id": 7, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for image, box in boxes.items()
        ],
    }
    truth.createIndex()

    def row(image: int, box: list[int], score: float, category: int = 7) -> dict[str, Any]:
        return {"image_id": image, "category_id": category, "bbox": box, "score": score}

    shifted = [28, 20, 40, 40]  # IoU 32/48 = 0.67: found at 4 of the 10 thresholds
    right = {image: row(image, box, 0.9) for image, box in boxes.items()}
    a = [right[1], row(2, shifted, 0.9), right[3], row(3, [60, 60, 9, 9], 0.99, 9)]
    b = [row(1, [60, 60, 30, 30], 0.95), right[2], right[3], row(4, boxes[1], 0.5)]
    assert worst_attacks(truth, {"a": a, "b": b}) == {1: "b", 2: "a", 3: "a", 4: "a"}
    assert worst_attacks(truth, {"b": b, "a": a}) == {1: "b", 2: "a", 3: "b", 4: "b"}


# Domains


@pytest.fixture
def domains(data: Path, tmp_path: Path) -> Path:
    """``sketch`` in COCO-O's layout, ``rain`` with its images beside the annotations."""
    folder = tmp_path / "domains"
    shutil.copytree(data / "shapes/val", folder / "sketch/val2017")
    (folder / "sketch/annotations").mkdir()
    shutil.copy(data / "shapes/annotations/instances_val.json", folder / "sketch/annotations/instances_val2017.json")
    shutil.copytree(data / "shapes/train", folder / "rain")
    shutil.copy(data / "shapes/annotations/instances_train.json", folder / "rain/objects.json")
    (folder / ".cache").mkdir()
    return folder


@pytest.mark.slow
def test_domains(few: Path, run: Path, domains: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    record = evaluate(run, output, domains=domains)
    assert record.config["cells"] == ["clean", "domain-rain", "domain-sketch"]
    assert metrics(output, "domain-sketch") == metrics(few, "clean")
    assert metrics(output, "domain-rain") == by_train_net(run, "DATASETS.TEST", ["shapes_train"])
    assert record.metrics["domain-rain/bbox/AP"] == metrics(output, "domain-rain")["bbox/AP"]
    # Other pictures under the same name are another cell.
    content = json.loads((domains / "rain/objects.json").read_text())
    images = content["images"][1:]
    rows = [row for row in content["annotations"] if row["image_id"] in {image["id"] for image in images}]
    (domains / "rain/objects.json").write_text(json.dumps({**content, "images": images, "annotations": rows}))
    with pytest.raises(InputError, match="domain-rain was measured with other settings"):
        evaluate(run, output, domains=domains)


def spoil(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder of domains"),
        (lambda folder: [shutil.rmtree(path) for path in folder.iterdir()], "no domain in"),
        (lambda folder: (folder / "rain/objects.json").unlink(), "rain has 0 annotation files"),
        (lambda folder: shutil.copy(folder / "rain/objects.json", folder / "rain/more.json"), "has 2 annotation files"),
        (lambda folder: (folder / "rain/objects.json").write_text("{"), "names no images"),
        (lambda folder: (folder / "rain/000001.jpg").unlink(), "lacks its image 000001.jpg"),
        (lambda folder: (folder / "rain/000002.jpg").unlink(), "domain-rain lacks 1 of its 12 images"),
        (
            lambda folder: spoil(folder / "rain/objects.json", categories=[{"id": 1, "name": "x"}, *CATEGORIES[1:]]),
            "'x'",
        ),
    ],
)
def test_domains_refused(
    run: Path, domains: Path, tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    change(domains)
    with pytest.raises(InputError) as error:
        evaluate(run, tmp_path / "out", domains=domains)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_domains_are_found_by_their_first_image(domains: Path) -> None:
    assert find_domains(domains) == [
        ("domain-rain", str(domains / "rain/objects.json"), str(domains / "rain")),
        ("domain-sketch", str(domains / "sketch/annotations/instances_val2017.json"), str(domains / "sketch/val2017")),
    ]


# The command


def command(run: Path, output: Path, *arguments: object) -> list[object]:
    detector = ("detector", run / "config.yaml", run / "model_final.pth")
    return ["evaluate", *detector, "--output", output, *arguments, "--device", "cpu"]


CHOICE = ["--corruptions", "contrast", "impulse_noise", "--severities", "0", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_loses_no_finished_cell(
    few: Path, run: Path, tmp_path: Path, run_tool: Run, number: signal.Signals
) -> None:
    """All its processes, in the middle; the same command then gives what was never broken off."""
    output = tmp_path / few.name
    line = command(run, output, *CHOICE, "--jobs", 1, "--workers", 1)
    process = start_fork(lambda: call_verb(*line), tmp_path / "said")
    while not (output / "cells/contrast-0/record.json").exists() and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join(600)
    err = (tmp_path / "said/err").read_text()
    assert process.exitcode == (-signal.SIGKILL if number == signal.SIGKILL else 75), err
    finished = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/record.json")}
    assert 2 <= len(finished) < len(CELLS)
    assert not (output / "record.json").exists()
    if number == signal.SIGTERM:
        assert err.splitlines()[-1].startswith("error: asked to stop")
    status, out, _ = run_tool(*command(run, output, *CHOICE, "--workers", 0))
    assert status == 0
    assert str(output / "record.json") in out.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert_same_cells(output, few, CELLS)
    assert RunRecord.read(output / "record.json").metrics == RunRecord.read(few / "record.json").metrics


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_signal_in_the_last_cell_ends_it_with_the_stop_status(
    run: Path, tmp_path: Path, run_tool: Run, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """In this process, or while the last of several jobs, here none, ends well all the same."""
    original = CellJob._measure

    def measure(self: CellJob, *arguments: Any) -> Any:
        found = original(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    def join(timeout: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(CellJob, "_measure", measure)
    monkeypatch.setattr(torch.multiprocessing, "start_processes", lambda *_, **__: SimpleNamespace(join=join))
    options = ["--corruptions", "none", "--jobs", jobs, "--workers", 0]
    status, _, err = run_tool(*command(run, tmp_path / "out", *options))
    assert (status, err.splitlines()[-1][:22]) == (75, "error: asked to stop: ")
    assert (tmp_path / "out/cells/clean/record.json").exists() == (jobs == 1)
    assert not (tmp_path / "out/record.json").exists()


def test_the_table(few: Path, run: Path, run_tool: Run) -> None:
    status, out, err = run_tool(*command(run, few, *CHOICE))
    assert status == 0, err
    first, *lines = out.splitlines()
    assert first.startswith("shapes_val, 6 images, 5 cells in ")
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert lines[0].split() == ["bbox/AP", "bbox/AP50", "segm/AP"]
    clean = metrics(few, "clean")
    assert rows["P"] == [f"{clean[name]:.2f}" for name in ("bbox/AP", "bbox/AP50", "segm/AP")]
    assert rows["mPC"] == rows["rPC"] == ["-"] * 3
    assert rows["contrast-0"] == rows["impulse_noise-0"] == rows["P"]
    assert rows["contrast"] == ["-", "-", f"{metrics(few, 'contrast-3')['bbox/AP']:.2f}", "-", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--corruptions", "fogg"], "did you mean fog?"),
        (["--severities", "6"], "no severity 6"),
        (["--corruptions", "none", "--severities", "9"], "no severity 9"),
        (["--corruptions", "none", "--errors", "clean", "fog-3"], "no cell fog-3 was evaluated: choose --errors among"),
        (["--limit", "0"], "a limit of 0"),
        (["--jobs", "0"], "0 jobs"),
        (["--domains", "nowhere"], "no folder of domains at nowhere"),
    ],
)
def test_refuses(run: Path, tmp_path: Path, run_tool: Run, arguments: list[str], words: str) -> None:
    status, _, err = run_tool(*command(run, tmp_path / "out", *arguments))
    assert status == 2
    assert len(err.splitlines()) == 1
    assert words in err
    assert not (tmp_path / "out").exists()


def refusal(config: Path, weights: Path, output: Path, cells: Sequence[Cell] = FEW, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        evaluate_detector(config, weights, output, cells, workers=0, **options)
    return str(error.value)


def test_refuses_what_does_not_fit(few: Path, run: Path, tmp_path: Path) -> None:
    config, weights, output = run / "config.yaml", run / "model_final.pth", tmp_path / "out"
    assert "no weights at" in refusal(config, tmp_path / "none.pth", output, FEW)
    assert "no configuration file" in refusal(tmp_path / "none.yaml", weights, output, FEW)
    told = refusal(config, run / "model_other.pth", output, FEW)
    assert "shapes_val has the classes" in told
    assert "'no " in told
    cfg = load_config(config)
    for sets, words in ((["shapes_val", "shapes_train"], "has 2 sets"), (["nothing"], "unknown data set 'nothing'")):
        cfg.DATASETS.TEST = sets
        (tmp_path / "changed.yaml").write_text(cfg.dump())
        assert words in refusal(tmp_path / "changed.yaml", weights, output, FEW)
    assert not output.exists()


def test_a_folder_is_of_one_detector_configuration_and_choice_of_images(
    few: Path, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, weights = run / "config.yaml", run / "model_final.pth"
    before = sorted(few.rglob("*"))
    content = torch.load(weights, weights_only=True)
    content["model"]["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(content, tmp_path / "other.pth")
    assert "weights_sha256 is" in refusal(config, tmp_path / "other.pth", few, FEW)
    (tmp_path / "other.yaml").write_text(load_config(config, ["INPUT.MIN_SIZE_TEST", 96]).dump())
    assert "INPUT.MIN_SIZE_TEST is 64 there and 96 here" in refusal(tmp_path / "other.yaml", weights, few, FEW)
    assert "(images is 6 there and 2 here" in refusal(config, weights, few, images=ImageChoice(2))
    assert "(seed is 0 there and 1 here)" in refusal(config, weights, few, images=ImageChoice(seed=1))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    shutil.copytree(data / "shapes", tmp_path / "shapes")
    image = tmp_path / "shapes/val/000002.jpg"
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    assert "the files of shapes_val have changed" in refusal(config, weights, few, FEW)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    # Not what does not change a number.
    (tmp_path / "same.yaml").write_text(load_config(config, ["SOLVER.BASE_LR", 9.0, "OUTPUT_DIR", "elsewhere"]).dump())
    evaluate_detector(tmp_path / "same.yaml", weights, few, FEW)
    assert sorted(few.rglob("*")) == before


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_image_is_named(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """Before anything is measured, and where it is read, in one sentence."""
    shutil.copytree(data / "shapes", tmp_path / "shapes")
    path = tmp_path / "shapes/val/000004.jpg"
    path.write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(InputError, match=r"^cannot read \S*000004.jpg: [^\n]*$"):
        CellMapper(load_config(run / "config.yaml"), Cell("clean"), 0)({"file_name": str(path)})
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("torch.multiprocessing.start_processes", start_forks)
    with pytest.raises(InputError) as error:
        evaluate(run, tmp_path / "out", jobs=jobs, workers=1)
    assert "cannot be read" in str(error.value)
    assert "000004.jpg" in str(error.value)
    assert "\n" not in str(error.value)
