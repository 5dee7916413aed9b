"""Configurations: every file merges, says what it changes, and nothing unknown gets in."""

from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from robust_backbones.detection.checkpoint import backbone_tensors
from robust_backbones.detection.config import CONFIG_DIR, base_config, load_config
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec

FILES = sorted(CONFIG_DIR.rglob("*.yaml"))


def leaves(node: CfgNode, prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in node.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIG_DIR)))
def test_a_file_is_the_difference_from_its_base(path: Path) -> None:
    """Every key it sets differs from its base, and a detector can be built from it with R50's 265 tensors."""
    cfg = load_config(path, ["MODEL.DEVICE", "cpu"])
    own = yaml.safe_load(path.read_text())
    base_file = own.pop("_BASE_", None)
    base = load_config(path.parent / base_file) if base_file else base_config()
    merged, before = leaves(cfg), leaves(base)
    # The root base states what Detectron2's defaults would also give: it is what every other file rests on.
    if base_file:
        for key in leaves(CfgNode(own)):
            if key != "MODEL.MASK_ON":  # stated by both leaves of COCO, so that neither hides what it trains
                assert merged[key] != before[key], f"{key} repeats its base"
    assert len(backbone_tensors(build_model(cfg))) == 265


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIG_DIR)))
def test_every_file_fits_a_torchvision_resnet50(path: Path) -> None:
    merged = leaves(load_config(path))
    for key, value in BackboneSpec().detectron2_overrides().items():
        assert merged[key] == value


@pytest.mark.parametrize(
    ("name", "iterations", "steps", "classes", "mask"),
    [
        ("PascalVOC-Detection/faster_rcnn_R_50_FPN", 18000, (12000, 16000), 20, False),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x", 90000, (60000, 80000), 80, False),
        ("COCO-Detection/faster_rcnn_R_50_FPN_3x", 270000, (210000, 250000), 80, False),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", 90000, (60000, 80000), 80, True),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x", 270000, (210000, 250000), 80, True),
    ],
)
def test_schedules_are_detectron2s(
    name: str, iterations: int, steps: tuple[int, int], classes: int, mask: bool
) -> None:
    cfg = load_config(CONFIG_DIR / f"{name}.yaml")
    assert (iterations, steps, classes) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    assert cfg.MODEL.MASK_ON is mask
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("FrozenBN", 2)


BASE = CONFIG_DIR / "Base-RCNN-FPN.yaml"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["MODEL.RESNET.DEPTH", 50], "MODEL.RESNETS.DEPTH"),
        (["SOLVER.BASE_LRR", 0.1], "SOLVER.BASE_LR"),
        (["SOLVER.MAX_ITER", "many"], "Type mismatch"),
        (["SOLVER.AMP.DTYPE", "float8"], "float8"),
        (["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True], "bfloat16"),
    ],
)
def test_wrong_overrides_are_refused(overrides: list[object], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        load_config(BASE, overrides)
    assert "\n" not in str(error.value)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(InputError, match="no configuration file"):
        load_config(path)
    for text in ("MODEL: [", "MODEL:\n  RESNET_DEPTH: 50\n", "_BASE_: none.yaml\n", "just text"):
        path.write_text(text)
        with pytest.raises(InputError) as error:
            load_config(path)
        assert "\n" not in str(error.value)


def test_a_yaml_file_cannot_run_code(tmp_path: Path) -> None:
    marker, path = tmp_path / "was-run", tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(InputError):
        load_config(path)
    assert not marker.exists()
