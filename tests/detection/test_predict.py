"""tools/predict.py: what a trained detector finds in image files, held against Detectron2's own predictor."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from robust_backbones.commands import predict as predict_command
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import load_config
from robust_backbones.detection.predictor import Predictor, categories_of
from robust_backbones.detection.visualize import read_rgb, write_picture
from robust_backbones.errors import InputError, PreemptedError
from tests.detection.conftest import SHAPES_CONFIG, SMALL

RunTool = Callable[..., tuple[int, str, str]]
# Ids with a gap, as COCO's have: they are no class numbers.
CATEGORIES = [{"id": number, "name": f"shape {number}"} for number in (1, 2, 4, 7)]


@pytest.fixture(scope="module")
def run(converted: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose detector was never trained: it finds many things, of every score and class."""
    folder = tmp_path_factory.mktemp("run")
    cfg = load_config(SHAPES_CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", "DATASETS.TEST", "('of_nowhere',)"])
    torch.manual_seed(0)
    checkpointer = BackboneCheckpointer(build_model(cfg), str(folder), cfg=cfg)
    checkpointer.load(str(converted("resnet18")))
    heads = checkpointer.model.roi_heads
    heads.box_predictor.cls_score.weight.data.mul_(6)
    heads.mask_head.predictor.weight.data.mul_(100)
    checkpointer.save("model_final", categories=CATEGORIES, iteration=9)
    heads.box_predictor.cls_score.weight.data.mul_(-1)
    checkpointer.save("model_other")  # as before the files held their categories
    cfg.SOLVER.AMP.DTYPE = "float16"  # as on a GPU
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def odd_images(shapes: Path, tmp_path: Path) -> list[Path]:
    """A grey image, one that lies on its side with a note to turn it, and one with transparency; none 128 px wide."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.open(shapes / "shapes/val/000001.jpg").resize((400, 300))
    image.convert("L").save(folder / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    image.save(folder / "turned.jpg", exif=exif)
    image.putalpha(100)
    image.save(folder / "transparent.png")
    return [folder / name for name in ("grey.png", "turned.jpg", "transparent.png")]


def rgb(path: Path) -> NDArray[np.uint8]:
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def detectron2_finds(run: Path, image: Path, weights: str = "model_final.pth") -> Instances:
    cfg = load_config(run / "config.yaml", ["SOLVER.AMP.ENABLED", "False", "MODEL.WEIGHTS", run / weights])
    return DefaultPredictor(cfg)(rgb(image)[:, :, ::-1])["instances"]


def assert_same(rows: list[dict], found: Instances, ids: list[int]) -> None:
    assert len(rows) == len(found) > 3
    for row, (x0, y0, x1, y1) in zip(rows, found.pred_boxes.tensor.tolist(), strict=True):
        assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)
    assert [row["score"] for row in rows] == pytest.approx(found.scores.tolist(), rel=1e-4)
    assert [row["category_id"] for row in rows] == [ids[index] for index in found.pred_classes]
    for row, mask in zip(rows, found.pred_masks.numpy(), strict=True):
        assert isinstance(row["segmentation"]["counts"], str)
        # A pixel whose probability is the threshold but for rounding may fall on either side.
        assert np.mean(mask_util.decode(row["segmentation"]) != mask) < 1e-4


def test_results_are_those_of_detectron2(
    run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run_tool("predict", *odd_images, "--weights", run, "--device", "cpu")
    assert status == 0, err
    rows = json.loads(Path("predictions/coco_results.json").read_text())
    assert out.splitlines()[-1] == (
        f"{len(rows)} detections in 3 images: pictures and coco_results.json are in predictions"
    )
    assert len({row["category_id"] for row in rows}) > 1
    for number, image in enumerate(odd_images, 1):
        of_image = [row for row in rows if row["image_id"] == number]
        assert {row["file_name"] for row in of_image} == {str(image)}
        assert_same(of_image, detectron2_finds(run, image), [1, 2, 4, 7])
        assert cv2.imread(f"predictions/{image.stem}.jpg").shape == rgb(image).shape


def test_a_picture_shows_what_scores_enough(
    run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool
) -> None:
    """Where no detection is, the picture is the image; the results hold what the picture leaves out."""
    image = odd_images[1]
    found = detectron2_finds(run, image)
    third, second = sorted(found.scores.tolist())[-3:-1]
    arguments = [image, "--weights", run, "--output", tmp_path / "out", "--min-score", (second + third) / 2]
    assert run_tool("predict", *arguments, "--device", "cpu")[0] == 0
    drawn = found[found.scores >= second]
    assert len(drawn) == 2
    plain = rgb(image)
    far = np.ones(plain.shape[:2], bool)
    for x0, y0, x1, y1 in drawn.pred_boxes.tensor.int().tolist():
        far[max(y0 - 30, 0) : y1 + 30, max(x0 - 10, 0) : x1 + 110] = False  # class names stick out to the right
    changed = np.abs(cv2.imread(str(tmp_path / "out/turned.jpg"))[:, :, ::-1].astype(int) - plain).max(axis=2)
    assert np.mean(changed[drawn.pred_masks.any(dim=0).numpy()] > 40) > 0.5
    assert far.mean() > 0.3
    assert np.percentile(changed[far], 99) < 25  # JPEG's own loss
    assert len(json.loads((tmp_path / "out/coco_results.json").read_text())) == len(found)


def test_above_every_score_nothing_is_drawn(
    run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool
) -> None:
    arguments = [odd_images[0].parent, "--weights", run, "--output", tmp_path / "out", "--min-score", 1.01]
    status, out, _ = run_tool("predict", *arguments, "--device", "cpu")
    best = max(row["score"] for row in json.loads((tmp_path / "out/coco_results.json").read_text()))
    assert (status, f"none scores 1.01 (--min-score), the best {best:.3f}: nothing is drawn" in out) == (0, True), out
    for image in odd_images:
        picture = cv2.imread(str(tmp_path / "out" / f"{image.stem}.jpg"))[:, :, ::-1]
        assert np.percentile(np.abs(picture.astype(int) - rgb(image)), 99) < 25  # JPEG's own loss
    assert len(json.loads((tmp_path / "out/coco_results.json").read_text())) > 3


def test_coco_evaluates_the_file(run: Path, shapes: Path, tmp_path: Path, run_tool: RunTool) -> None:
    """Images named by their number, as COCO's: an evaluation takes the file as it is. A second run replaces it."""
    images = sorted((shapes / "shapes/val").iterdir(), reverse=True)
    arguments = [*images, "--weights", run, "--output", tmp_path, "--device", "cpu"]
    assert run_tool("predict", *arguments, "--min-score", 2)[0] == 0
    first = (tmp_path / "000001.jpg").read_bytes()
    assert run_tool("predict", *arguments, "--min-score", 0.2)[0] == 0
    assert (tmp_path / "000001.jpg").read_bytes() != first
    rows = json.loads((tmp_path / "coco_results.json").read_text())
    assert all(row["image_id"] == int(Path(row["file_name"]).stem) for row in rows)
    truth = COCO(str(shapes / "shapes/annotations/instances_val.json"))
    found = truth.loadRes(str(tmp_path / "coco_results.json"))
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert 0 <= evaluation.stats[0] <= evaluation.stats[8] <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(path.name for path in images[::-1]),
        "coco_results.json",
    ]


def test_another_file_of_the_run(run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool) -> None:
    """One without categories: classes then count from 1, as nothing is known of the run's data set."""
    image = odd_images[1]
    arguments = [image, "--weights", run / "model_other.pth", "--output", tmp_path / "out", "--device", "cpu"]
    assert run_tool("predict", *arguments)[0] == 0
    rows = json.loads((tmp_path / "out/coco_results.json").read_text())
    assert_same(rows, detectron2_finds(run, image, "model_other.pth"), [1, 2, 3, 4])
    assert rows[0]["score"] != pytest.approx(detectron2_finds(run, image).scores[0].item(), abs=0.01)


def test_the_names_of_classes(small_cfg: CfgNode) -> None:
    def read(test_set: str, count: int, **content: object) -> list[dict]:
        small_cfg.merge_from_list(["DATASETS.TEST", (test_set,), "MODEL.ROI_HEADS.NUM_CLASSES", count])
        return categories_of(content, small_cfg, Path("a.pth"))

    assert read("coco_2017_val", 4, categories=CATEGORIES) == CATEGORIES  # the file knows best
    assert [(row["id"], row["name"]) for row in read("coco_2017_val", 80)[-2:]] == [
        (89, "hair drier"),
        (90, "toothbrush"),
    ]
    assert read("voc_2007_test", 20)[19] == {"id": 20, "name": "tvmonitor"}
    assert read("of_nowhere", 2) == [{"id": 1, "name": "class 0"}, {"id": 2, "name": "class 1"}]
    assert read("coco_2017_val", 2)[1] == {"id": 2, "name": "class 1"}  # not the detector's data set
    with pytest.raises(InputError, match="names 4 classes, but its detector tells 5"):
        read("of_nowhere", 5, categories=CATEGORIES)
    with pytest.raises(InputError, match="names 2 classes"):
        read("of_nowhere", 2, categories=[CATEGORIES[0]] * 2)
    for wrong in (None, [1], [{"id": "1", "name": "a"}], [{"id": 1, "name": 2}]):
        with pytest.raises(InputError, match="not COCO's"):
            read("of_nowhere", 1, categories=wrong)


def test_image_ids() -> None:
    def ids(*names: str) -> list[int]:
        return predict_command.image_ids([Path(name) for name in names])

    assert ids("a/000000000139.jpg", "b/000000000285.jpg") == [139, 285]
    assert ids("7.jpg") == [7]
    assert ids("12.jpg", "cat.jpg") == [1, 2]
    assert ids("12.jpg", "0012.png", "3.jpg") == [1, 2, 3]  # the same number twice
    assert ids("²³.jpg", "-4.jpg") == [1, 2]


def test_pictures_of_equal_names() -> None:
    images = [Path(name) for name in ("a/x.jpg", "b/x.jpg", "b/X.png", "x_2.jpg", "y.v2.jpeg")]
    pictures = predict_command.name_pictures(images, Path("out"))
    assert [path.name for path in pictures] == ["x.jpg", "x_2.jpg", "X_3.jpg", "x_2_2.jpg", "y.v2.jpg"]


def test_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("b.PNG", "a.jpeg", "c.jpg", "._c.jpg", "notes.txt"):
        (tmp_path / "folder" / name).touch()
    (tmp_path / "z.webp").touch()
    monkeypatch.chdir(tmp_path)
    given = [Path("z.webp"), Path("folder/c.jpg"), Path("folder"), tmp_path / "folder/a.jpeg"]
    found = predict_command.find_images(given)
    assert [str(path) for path in found] == ["z.webp", "folder/c.jpg", "folder/a.jpeg", "folder/b.PNG"]


def test_unreadable_images_are_left_out_as_if_they_were_not_there(
    run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool
) -> None:
    folder, results = odd_images[0].parent, []
    for skip in ([], ["--skip-unreadable"]):
        status, _, err = run_tool("predict", folder, "--weights", run, "--output", tmp_path / "out", *skip)
        assert status == 0, err
        results.append(json.loads((tmp_path / "out/coco_results.json").read_text()))
        (folder / "cut.jpg").write_bytes(odd_images[1].read_bytes()[:3000])
    assert results[0] == results[1]
    assert "cut.jpg" in err


def test_pictures_of_equal_names_are_all_written(
    run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool
) -> None:
    (tmp_path / "more").mkdir()
    shutil.copy(odd_images[1], tmp_path / "more/grey.jpg")
    arguments = [odd_images[0], tmp_path / "more/grey.jpg", "--weights", run, "--output", tmp_path / "out"]
    assert run_tool("predict", *arguments, "--device", "cpu")[0] == 0
    assert cv2.imread(str(tmp_path / "out/grey.jpg")).shape == (300, 400, 3)
    assert cv2.imread(str(tmp_path / "out/grey_2.jpg")).shape == (400, 300, 3)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_what_is_refused(
    run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, output: Path = tmp_path / "out") -> str:
        before = sorted(tmp_path.rglob("*"))
        contents = [path.read_bytes() for path in before if path.is_file()]
        status, out, err = run_tool("predict", "--device", "cpu", "--output", output, *arguments)
        assert status == 2
        assert out == ""
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        assert [path.read_bytes() for path in before if path.is_file()] == contents
        return err

    image, folder = odd_images[0], odd_images[0].parent
    for name in ("empty", "no_config", "no_weights", "wrong"):
        (tmp_path / name).mkdir()
    for name in ("broken", "deep"):
        (tmp_path / name).mkdir()
    whole = odd_images[1].read_bytes()
    (tmp_path / "broken/1.jpg").write_bytes(whole)
    (tmp_path / "broken/2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no_config/model_final.pth").write_bytes(b"")
    for name in ("no_weights", "wrong"):
        shutil.copy(run / "config.yaml", tmp_path / name)
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "wrong/trap.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "wrong/unknown.pth")
    (tmp_path / "wrong/text.pth").write_text("no tensors")
    (tmp_path / "file").touch()

    right = ["--weights", run]
    assert "no image and no folder at" in refused(tmp_path / "none.jpg", *right)
    assert "no image and no folder at" in refused("x" * 5000, *right)
    assert f"no image (.jpg, .png or another format of Pillow's) in {tmp_path / 'empty'}" in refused(
        image, tmp_path / "empty", *right
    )
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep/2.png")
    for broken in ("broken/2.jpg", "deep/2.png"):
        told = refused((tmp_path / broken).parent, *right)
        assert broken in told
        assert "--skip-unreadable" in told
    assert "no image can be read" in refused(tmp_path / "deep", *right, "--skip-unreadable")
    assert "config.yaml" in refused(run / "config.yaml", *right)
    assert "grey.jpg exists" in refused(image, *right, output=_with_a_picture(tmp_path / "mine"))
    assert "turned.jpg exists" in refused(folder, *right, output=folder)
    assert "is not a folder" in refused(image, *right, output=tmp_path / "file")

    assert "min_score" in refused(image, *right, "--min-score", "nan")
    assert "no run at" in refused(image, "--weights", tmp_path / "none")
    assert "no config.yaml in" in refused(image, "--weights", tmp_path / "no_config")
    assert "no config.yaml in" in refused(image, "--weights", tmp_path / "no_config/model_final.pth")
    assert "no model_final.pth in" in refused(image, "--weights", tmp_path / "no_weights")
    assert "trap.pth" in refused(image, "--weights", tmp_path / "wrong/trap.pth")
    assert not (tmp_path / "sprung").exists()
    assert "unknown.pth" in refused(image, "--weights", tmp_path / "wrong/unknown.pth")
    assert "text.pth" in refused(image, "--weights", tmp_path / "wrong/text.pth")
    (tmp_path / "wrong/config.yaml").write_text("MODEL: {MASKON: True}")
    assert "MODEL.MASK_ON" in refused(image, "--weights", tmp_path / "wrong/text.pth")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refused(image, *right, "--device", "cuda")


def _with_a_picture(folder: Path) -> Path:
    folder.mkdir()
    (folder / "grey.jpg").write_bytes(b"of somebody's")
    return folder


def test_the_same_command_goes_on_after_a_stop(
    run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_the_second(path: Path, image: np.ndarray) -> None:
        if list(tmp_path.glob("out/*.jpg")):
            raise PreemptedError("asked to stop: give the same command again")
        write_picture(path, image)

    command = ["predict", *odd_images, "--weights", run, "--output", tmp_path / "out", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("robust_backbones.detection.visualize.write_picture", stop_at_the_second)
        assert run_tool(*command)[0] == 75
    status, _, err = run_tool(*command)
    assert (status, err) == (0, "")
    assert len(list(tmp_path.glob("out/*.jpg"))) == len(odd_images)


def test_a_given_image_is_never_replaced(run: Path, odd_images: list[Path], tmp_path: Path, run_tool: RunTool) -> None:
    """Not even where the folder holds the results of an earlier run, nor by way of a link."""
    folder = odd_images[0].parent
    (folder / "coco_results.json").write_text("[]")
    (tmp_path / "link").symlink_to(folder)
    before = odd_images[1].read_bytes()
    status, _, err = run_tool("predict", tmp_path / "link/turned.jpg", "--weights", run, "--output", folder)
    assert (status, odd_images[1].read_bytes()) == (2, before)
    assert "choose another --output" in err


def test_a_detector_of_boxes_alone(
    converted: Callable[[str], Path], small_cfg: CfgNode, odd_images: list[Path], tmp_path: Path
) -> None:
    small_cfg.MODEL.MASK_ON = False
    torch.manual_seed(0)
    checkpointer = BackboneCheckpointer(build_model(small_cfg), str(tmp_path), cfg=small_cfg)
    checkpointer.load(str(converted("resnet18")))
    checkpointer.save("model_final", categories=CATEGORIES)
    (tmp_path / "config.yaml").write_text(small_cfg.dump())
    predictor = Predictor(tmp_path, device="cpu")
    found = predictor(odd_images[1])
    assert not found.has("pred_masks")
    assert found.image_size == read_rgb(odd_images[1]).shape[:2] == (400, 300)
    assert predictor.categories == CATEGORIES
