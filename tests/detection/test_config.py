"""Configurations: every file merges, says what it changes, and nothing unknown gets in."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import detectron2
import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from torch import nn

from robust_backbones.detection.checkpoint import backbone_tensors
from robust_backbones.detection.config import CONFIG_DIR, check_config, load_config
from robust_backbones.errors import InputError
from robust_backbones.models import ARCHITECTURES, BackboneSpec, ResNetShape
from tests.detection.conftest import base_config

DEMO = "mask_rcnn_R_18_FPN_shapes_instant"
# Files that a run starts from; the others are merged after one of them.
TASKS = [
    path
    for path in sorted(CONFIG_DIR.rglob("*.yaml"))
    if path.parent.name not in ("architectures", "protocols")
    and path.stem not in ("Base-VOC", "Base-shapes", DEMO)
    and "LSJ" not in path.stem  # a protocol of its own, in mixed precision, tested in test_data_stream.py
]
OTHERS = [path for path in TASKS if "retinanet" in path.stem.lower() or "DC5" in path.stem]
FAMILIES = {
    family: [
        path
        for path in TASKS
        if path not in OTHERS and (family in path.stem or (family == "FPN" and path.stem == "Base-instant"))
    ]
    for family in ("FPN", "C4")
}
ARCHITECTURE_FILES = sorted((CONFIG_DIR / "architectures").glob("*res*.yaml"))
"""Of ResNets; those of timm's networks, for FPN alone, are tested with their backbone."""
ADVERSARIAL = ("adversarial_free", "adversarial_pgd")
PROTOCOLS = {
    "FPN": [CONFIG_DIR / f"protocols/{name}.yaml" for name in ("syncbn", "frozen", "scratch", *ADVERSARIAL)],
    "C4": [CONFIG_DIR / f"protocols/{name}.yaml" for name in ("syncbn_C4", "frozen", "scratch", *ADVERSARIAL)],
}
OF_ONE_BACKBONE = {CONFIG_DIR / f"protocols/{name}.yaml" for name in ("vitdet", "swin", "swin_lsj", "convnext")}
"""Protocols that are tested with it."""
DETECTORS = {family: CONFIG_DIR / f"COCO-InstanceSegmentation/mask_rcnn_R_50_{family}_1x.yaml" for family in FAMILIES}
FAMILY = pytest.mark.parametrize("family", ["FPN", "C4"])

DETECTRON2_CONFIGS = Path(detectron2.__file__).parent / "model_zoo/configs"

# Keys that a file states although its base has the same value.
RESTATED = {
    "MODEL.MASK_ON",  # neither leaf of COCO hides what it trains
    "MODEL.WEIGHTS",  # scratch.yaml, for a base that somebody wrote with weights
    # adversarial_*.yaml, for bases that do not clip
    "SOLVER.CLIP_GRADIENTS.ENABLED",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
}


load_task = functools.cache(load_config)


def leaves(node: CfgNode, prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in node.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIG_DIR))


def bases_of(path: Path) -> list[Path]:
    bases = yaml.safe_load(path.read_text()).get("_BASE_", [])
    return [path.parent / base for base in ([bases] if isinstance(bases, str) else bases)]


def declared_by(path: Path) -> dict[str, object]:
    own = yaml.safe_load(path.read_text())
    return leaves(CfgNode({key: value for key, value in own.items() if key not in ("_BASE_", "VERSION")}))


def changed(before: CfgNode, after: CfgNode) -> set[str]:
    old, new = leaves(before), leaves(after)
    assert old.keys() == new.keys()
    return {key for key, value in new.items() if value != old[key]} - {"MODEL.DEVICE"}  # that is the machine's


def build(files: Path | Sequence[Path]) -> nn.Module:
    """A detector without memory or values: all of the structure in 50 ms, whatever its width."""
    with torch.device("meta"):
        return build_model(load_config(files, ["MODEL.DEVICE", "meta"]))


def test_there_are_files_of_every_kind() -> None:
    assert {family: len(files) for family, files in FAMILIES.items()} == {"FPN": 18, "C4": 12}
    assert len(OTHERS) == 8
    assert set(TASKS) == {*FAMILIES["FPN"], *FAMILIES["C4"], *OTHERS, CONFIG_DIR / "Base-RCNN.yaml"}
    resnets = {arch for arch, shape in ARCHITECTURES.items() if isinstance(shape, ResNetShape)}
    assert {path.stem for path in ARCHITECTURE_FILES} == resnets - {"resnet50"}
    assert set((CONFIG_DIR / "protocols").iterdir()) == {*PROTOCOLS["FPN"], *PROTOCOLS["C4"], *OF_ONE_BACKBONE}


@pytest.mark.parametrize("path", TASKS, ids=name_of)
def test_a_task_is_the_difference_from_its_base(path: Path) -> None:
    """Every key it sets differs from its base, no other does, and a detector with R50's 265 tensors can be built."""
    bases = bases_of(path)
    changes = changed(load_config(bases) if bases else base_config(), load_config(path))
    assert changes <= (declared := declared_by(path).keys())
    # The detectors state what Detectron2's defaults would also give: it is what every other file rests on.
    if not path.stem.startswith(("Base-RCNN", "Base-RetinaNet")):
        assert declared - changes <= RESTATED
    assert len(backbone_tensors(build(path))) == 265


@pytest.mark.parametrize(
    ("family", "overlay"),
    [(family, overlay) for family in FAMILIES for overlay in [*ARCHITECTURE_FILES, *PROTOCOLS[family]]],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_an_overlay_is_the_difference_from_every_task_of_its_family(family: str, overlay: Path) -> None:
    assert yaml.safe_load(overlay.read_text())["VERSION"] == 2
    declared = declared_by(overlay).keys()
    for task in FAMILIES[family]:
        changes = changed(load_task(task), load_config([task, overlay]))
        assert changes <= declared
        assert declared - changes <= RESTATED


@FAMILY
@pytest.mark.parametrize("overlay", ["PascalVOC-Detection/Base-VOC.yaml", "quick/Base-shapes.yaml"])
def test_the_shared_part_of_tasks_fits_both_families(overlay: str, family: str) -> None:
    """Also where no task has a detector and this part in that way, as Mask R-CNN on VOC."""
    changes = changed(load_config(DETECTORS[family]), load_config([DETECTORS[family], CONFIG_DIR / overlay]))
    assert changes == declared_by(CONFIG_DIR / overlay).keys()


def test_overlays_that_can_be_combined_do_not_contradict() -> None:
    """So that their order does not matter: an architecture with any protocol, and scratch with the one it bottoms."""
    protocols = {path.stem: declared_by(path) for path in (CONFIG_DIR / "protocols").glob("*.yaml")}
    pairs = [(declared_by(path), protocol) for path in ARCHITECTURE_FILES for protocol in protocols.values()]
    pairs += [(protocols["scratch"], protocols[name]) for name in ("syncbn", "syncbn_C4")]
    for first, second in pairs:
        assert all(first[key] == second[key] for key in first.keys() & second.keys())


@FAMILY
def test_every_architecture_merges_with_every_protocol(family: str) -> None:
    """Each pair on one of the tasks in turn: no overlay depends on what the tasks differ in, see above."""
    pairs = itertools.product(PROTOCOLS[family], ARCHITECTURE_FILES)
    for task, (protocol, architecture) in zip(itertools.cycle(FAMILIES[family]), pairs, strict=False):
        wanted = leaves(load_task(task))
        for path in (protocol, architecture):
            wanted |= leaves(CfgNode(yaml.safe_load(path.read_text())))
        assert leaves(load_config([task, protocol, architecture])) == wanted


@pytest.mark.parametrize("path", TASKS, ids=name_of)
def test_every_task_fits_a_torchvision_resnet50(path: Path) -> None:
    merged = leaves(load_task(path))
    for key, value in BackboneSpec().detectron2_overrides().items():
        assert merged[key] == value


TENSORS = {
    "resnet18": 100, "resnet34": 180, "resnet101": 520, "resnet152": 775, "wide_resnet50_2": 265,
    "wide_resnet50_4": 265, "resnext50_32x4d": 265, "resnext101_32x8d": 520,
    "wide_resnet101_2": 520, "resnext101_64x4d": 520,
}  # fmt: skip


@pytest.mark.slow
@FAMILY
@pytest.mark.parametrize("path", ARCHITECTURE_FILES, ids=lambda path: path.stem)
def test_an_architecture_is_what_the_backbone_needs(path: Path, family: str) -> None:
    """All of its keys and no more than R50's do not give already; the tensors are those of a converted file.

    A convolution without bias has one tensor and its batch norm four: 5 for each convolution of the architecture.
    """
    needed = BackboneSpec(path.stem).detectron2_overrides()
    of_r50 = BackboneSpec().detectron2_overrides()
    assert declared_by(path) == {key: value for key, value in needed.items() if value != of_r50[key]}
    merged = leaves(load_config([DETECTORS[family], path]))
    assert {key: merged[key] for key in needed} == needed
    for protocol in (None, *PROTOCOLS[family]):
        detector = build([DETECTORS[family], path, *([protocol] if protocol else [])])
        assert len(backbone_tensors(detector)) == TENSORS[path.stem]


def test_the_demos_detector_is_that_of_resnet50_on_resnet18() -> None:
    demo, of_r50 = (CONFIG_DIR / f"quick/{name}.yaml" for name in (DEMO, DEMO.replace("18", "50")))
    merged = load_config([of_r50, CONFIG_DIR / "architectures/resnet18.yaml"])
    schedule = {f"SOLVER.{name}" for name in ("IMS_PER_BATCH", "MAX_ITER", "STEPS")}
    assert changed(merged, load_config(demo)) <= {*schedule, "TEST.EXPECTED_RESULTS"}


SCHEDULES = [
    ("PascalVOC-Detection/faster_rcnn_R_50_{}", 18000, (12000, 16000), 100, 20, False),
    ("PascalVOC-Detection/faster_rcnn_R_50_{}_voc07", 9000, (6000, 8000), 100, 20, False),
    ("COCO-Detection/faster_rcnn_R_50_{}_1x", 90000, (60000, 80000), 1000, 80, False),
    ("COCO-Detection/faster_rcnn_R_50_{}_2x", 180000, (120000, 160000), 1000, 80, False),
    ("COCO-Detection/faster_rcnn_R_50_{}_3x", 270000, (210000, 250000), 1000, 80, False),
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_{}_1x", 90000, (60000, 80000), 1000, 80, True),
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_{}_2x", 180000, (120000, 160000), 1000, 80, True),
    ("COCO-InstanceSegmentation/mask_rcnn_R_50_{}_3x", 270000, (210000, 250000), 1000, 80, True),
]


@pytest.mark.parametrize(
    ("name", "iterations", "steps", "warmup", "classes", "mask"),
    [
        *((row[0].format(family), *row[1:]) for row in SCHEDULES for family in ("FPN", "C4")),
        ("PascalVOC-Detection/faster_rcnn_R_50_C4_24k", 24000, (18000, 22000), 100, 20, False),
    ],
)
def test_schedules(name: str, iterations: int, steps: tuple[int, int], warmup: int, classes: int, mask: bool) -> None:
    cfg = load_config(CONFIG_DIR / f"{name}.yaml")
    assert (iterations, steps, classes) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    assert cfg.MODEL.MASK_ON is mask
    assert (16, 0.02, warmup) == (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS)
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("FrozenBN", 2)
    voc = ("voc_2007_trainval",) if name.endswith("voc07") else ("voc_2007_trainval", "voc_2012_trainval")
    assert (voc if classes == 20 else ("coco_2017_train",)) == cfg.DATASETS.TRAIN
    assert (("voc_2007_test",) if classes == 20 else ("coco_2017_val",)) == cfg.DATASETS.TEST


OF_THE_BACKBONE = {
    "INPUT.FORMAT",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.WEIGHTS",
}


SHIPPED = [
    "PascalVOC-Detection/faster_rcnn_R_50_FPN",
    "PascalVOC-Detection/faster_rcnn_R_50_C4",
    *(
        f"{detector}_{schedule}"
        for detector in (
            *(f"COCO-Detection/faster_rcnn_R_50_{family}" for family in ("FPN", "C4", "DC5")),
            *(f"COCO-InstanceSegmentation/mask_rcnn_R_50_{family}" for family in ("FPN", "C4", "DC5")),
            "COCO-Detection/retinanet_R_50_FPN",
            "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN",
        )
        for schedule in ("1x", "3x")
    ),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_only_the_backbone_tells_our_detectors_from_detectron2s(name: str) -> None:
    """Against the files that Detectron2 ships; in C4, the ROI heads' name stands for heads of the same structure."""
    published = base_config()
    file = name.replace("COCO-InstanceSegmentation/cascade", "Misc/cascade")
    # Its anchors are a Python expression: this reading, with eval, is the reference for ours.
    published.merge_from_file(str(DETECTRON2_CONFIGS / f"{file}.yaml"), allow_unsafe=True)
    ours = load_config(CONFIG_DIR / f"{name}.yaml", ["MODEL.DEVICE", "meta"])
    published.MODEL.DEVICE = "meta"
    expected = OF_THE_BACKBONE | ({"MODEL.ROI_HEADS.NAME"} if "C4" in name else set())
    assert changed(published, ours) == expected
    with torch.device("meta"):
        shapes = [
            {key: tensor.shape for key, tensor in build_model(cfg).state_dict().items()} for cfg in (ours, published)
        ]
    assert shapes[0] == shapes[1]


def test_mocos_recipe() -> None:
    """Its VOC configuration, written out by hand; naiveSyncBN there."""
    cfg = load_config(
        [CONFIG_DIR / "PascalVOC-Detection/faster_rcnn_R_50_C4_24k.yaml", CONFIG_DIR / "protocols/syncbn_C4.yaml"]
    )
    assert (cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (6000, 1000)
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM, cfg.MODEL.ROI_HEADS.RES5_NORM) == (
        0, "SyncBN", "SyncBN",
    )  # fmt: skip
    assert cfg.TEST.PRECISE_BN.ENABLED
    assert cfg.INPUT.MIN_SIZE_TRAIN == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    solver = cfg.SOLVER
    assert (solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS) == ((18000, 22000), 24000, 100)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (16, 0.02)


def of_backbone(detector: nn.Module) -> list[str]:
    """Names of the backbone's modules: the ResNet's, and res5 in the ROI heads of C4."""
    resnet = "backbone.bottom_up." if hasattr(detector.backbone, "bottom_up") else "backbone."
    return [name for name, _ in detector.named_modules() if name.startswith((resnet, "roi_heads.res5."))]


def modules_of(detector: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in detector.named_modules() if isinstance(module, kind)}


def trained(detector: nn.Module) -> set[str]:
    return {name for name, parameter in detector.named_parameters() if parameter.requires_grad}


ANY_TASK = pytest.mark.parametrize(
    "task",
    [path for path in TASKS if path not in OTHERS and path.stem.endswith(("_1x", "C4", "FPN", "shapes_instant"))],
    ids=name_of,
)


def family_of(task: Path) -> str:
    return "C4" if "C4" in task.stem else "FPN"


@ANY_TASK
def test_without_a_protocol_it_is_detectron2s(task: Path) -> None:
    """FrozenBN throughout, stem and res2 frozen, the rest trained."""
    detector = build(task)
    assert not modules_of(detector, nn.modules.batchnorm._BatchNorm)
    norms = {name for name in of_backbone(detector) if name.endswith(".norm")}
    assert modules_of(detector, FrozenBatchNorm2d) == norms
    assert len(norms) == 53
    frozen = {name for name, _ in detector.named_parameters()} - trained(detector)
    stem_and_res2 = {name for name, _ in detector.named_parameters() if ".stem." in name or ".res2." in name}
    assert frozen == stem_and_res2
    assert len(frozen) == 11


@ANY_TASK
def test_syncbn_trains_everything_with_batch_norm(task: Path) -> None:
    family = family_of(task)
    detector = build([task, PROTOCOLS[family][0]])
    assert not modules_of(detector, FrozenBatchNorm2d)
    assert trained(detector) == {name for name, _ in detector.named_parameters()}
    norms = modules_of(detector, nn.SyncBatchNorm)
    assert {f"{name}.norm" for name in of_backbone(detector) if "conv" in name.rsplit(".", 1)[-1]} < norms
    if family == "FPN":
        convolutions = {name for name in modules_of(detector.backbone, nn.Conv2d) if name.startswith("fpn_")}
        assert len(convolutions) == 8
        assert all(
            isinstance(detector.backbone.get_submodule(f"{name}.norm"), nn.SyncBatchNorm) for name in convolutions
        )
        assert len(norms) == 53 + 8
    else:
        assert isinstance(detector.roi_heads.res5_norm, nn.SyncBatchNorm)
        assert len(norms) == 53 + 1


@ANY_TASK
@pytest.mark.parametrize("norm", ["FrozenBN", "SyncBN"])
def test_frozen_trains_nothing_of_the_backbone(task: Path, norm: str) -> None:
    with torch.device("meta"):
        files = [task, CONFIG_DIR / "protocols/frozen.yaml"]
        detector = build_model(load_config(files, ["MODEL.DEVICE", "meta", "MODEL.RESNETS.NORM", norm]))
    names = [name for name, _ in detector.named_parameters()]
    backbone = {name for name in names if name.rsplit(".", 1)[0] in of_backbone(detector)}
    assert len(backbone) == 53  # FrozenBN has no parameters
    assert trained(detector) == set(names) - backbone
    assert len(modules_of(detector, FrozenBatchNorm2d)) == 53


@ANY_TASK
def test_scratch_freezes_nothing(task: Path) -> None:
    family = family_of(task)
    for before in ([], [PROTOCOLS[family][0]]):
        files = [task, *before, CONFIG_DIR / "protocols/scratch.yaml"]
        detector = build(files)
        assert not modules_of(detector, FrozenBatchNorm2d)
        assert trained(detector) == {name for name, _ in detector.named_parameters()}
        cfg = load_config(files)
        assert cfg.MODEL.BACKBONE.FROM_SCRATCH
        assert cfg.MODEL.RESNETS.NORM == "SyncBN"
        assert cfg.MODEL.WEIGHTS == ""
        assert cfg.TEST.PRECISE_BN.ENABLED


BASE = CONFIG_DIR / "Base-RCNN-FPN.yaml"
BASE_C4 = CONFIG_DIR / "Base-RCNN-C4.yaml"
ON_META = ["MODEL.DEVICE", "meta"]
COMPILED = [*ON_META, "MODEL.FAST_STEP", True, "MODEL.COMPILE", True]
CROPPED = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["MODEL.RESNET.DEPTH", 50], "MODEL.RESNETS.DEPTH"),
        (["SOLVER.BASE_LRR", 0.1], "SOLVER.BASE_LR"),
        (["SOLVER.MAX_ITER", "many"], "the overrides: Type mismatch"),
        (["SOLVER.AMP.DTYPE", "float8"], "float8"),
        (["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True], "bfloat16"),
        (["SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH 0 is no number of images"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD 0 is no number of iterations"),
        (["MODEL.DEVICE", "tpu"], "MODEL.DEVICE 'tpu' is no device"),
        (["DATALOADER.NUM_WORKERS", -1], "DATALOADER.NUM_WORKERS -1 is no number of processes"),
        (["INPUT.MIN_SIZE_TRAIN", ()], r"INPUT.MIN_SIZE_TRAIN \[\] are no sides"),
        (["INPUT.MIN_SIZE_TEST", -3], "INPUT.MIN_SIZE_TEST -3 are no sides"),
        (["INPUT.MAX_SIZE_TEST", 0], "INPUT.MAX_SIZE_TEST 0 is no side"),
        (["MODEL.FPN.OUT_CHANNELS", 0], "MODEL.FPN.OUT_CHANNELS 0 is no number of channels"),
        (["SOLVER.BASE_LR", -1.0], "SOLVER.BASE_LR -1.0 is no learning rate"),
        (["SEED", 2**32], "SEED 4294967296 is no seed"),
        (["SOLVER.EMA_DECAY", 1.0], r"SOLVER.EMA_DECAY 1.0 is not in \[0, 1\)"),
        (["SOLVER.EMA_DECAY", -0.5], "SOLVER.EMA_DECAY"),
        (["SOLVER.LAYER_DECAY", None], r"SOLVER.LAYER_DECAY None is not in \(0, 1\]"),
        (["MODEL.BACKBONE.NAME", None], "MODEL.BACKBONE.NAME None is no name"),
        (["SOLVER.EMA_DECAY", float("nan")], "SOLVER.EMA_DECAY"),
        (["TEST.VISUALIZE", -1], "TEST.VISUALIZE"),
        (["TEST.BEST_METRIC", "AP"], "TEST.BEST_METRIC 'AP' is no metric"),
        (["TEST.BEST_METRIC", "bbox/ap"], "TEST.BEST_METRIC 'bbox/ap' is no metric"),
        (["TEST.BEST_METRIC", "a/segm/AP"], "is of masks: give MODEL.MASK_ON True"),
        (["MODEL.BACKBONE.ALLOW_PARTIAL", "perhaps"], "Type mismatch"),
        (["MODEL.ROI_HEADS.RES5_NORM", "SyncBN"], r"protocols/syncbn\.yaml"),
        (["SOLVER.MAX_ITER", 80000], "below SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER", 0, "SOLVER.STEPS", "()"], "no schedule of 0 iterations"),
        (["SOLVER.STEPS", (80000, 60000)], "give rising steps"),
        (["SOLVER.STEPS", (60000, None)], "give rising steps"),
        (["MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.DEPTH", 18], "dilates no ResNet-18"),
        ([*ON_META, "MODEL.COMPILE", True], "give MODEL.FAST_STEP True"),
        # What would help on a GPU helps nobody on a CPU.
        (["MODEL.DEVICE", "cpu", "MODEL.COMPILE", True], "MODEL.COMPILE pays on GPUs only"),
        (
            ["MODEL.DEVICE", "cpu", "MODEL.COMPILE", True, "MODEL.FAST_STEP", True, "MODEL.MASK_ON", True],
            "on GPUs only",
        ),
        (["INPUT.FORMAT", "rgb"], "INPUT.FORMAT 'rgb' is no order of the 3 channels"),
        (["INPUT.FORMAT", "RGBA"], "INPUT.FORMAT 'RGBA' is no order of the 3 channels"),
        (["INPUT.FORMAT", "YUV-BT.601"], "is no order of the 3 channels"),  # float64, which no convolution takes
        (["INPUT.MASK_FORMAT", "x"], "INPUT.MASK_FORMAT 'x' is not one of polygon, bitmask"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (96, 64)], r"\[96, 64\] do not rise"),
        (
            [*CROPPED, "relative_range", "INPUT.CROP.SIZE", [384, 600]],
            r"\[384, 600\] is not what .*such as \[0.9, 0.9\]",
        ),
        ([*CROPPED, "relative", "INPUT.CROP.SIZE", [2.0, 2.0]], "INPUT.CROP.TYPE relative wants"),
        ([*CROPPED, "absolute", "INPUT.CROP.SIZE", [0.9, 0.9]], "give both sides in pixels"),
        ([*CROPPED, "absolute_range", "INPUT.CROP.SIZE", [600, 384]], "the least and the greatest"),
        ([*CROPPED, "absolute_range", "INPUT.CROP.SIZE", [0.9, 0.9]], "the least and the greatest"),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "is not one of WarmupMultiStepLR, WarmupCosineLR"),
        (["SOLVER.WARMUP_METHOD", "lin"], "SOLVER.WARMUP_METHOD 'lin' is not one of constant, linear"),
        (["SOLVER.WEIGHT_DECAY", float("nan")], "SOLVER.WEIGHT_DECAY nan is no factor"),
        (["SOLVER.WEIGHT_DECAY_BIAS", "null"], r"'null' is no factor: .* \(None in a command\)"),
        (["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 0], "MODEL.RPN.BATCH_SIZE_PER_IMAGE 0 is too small"),
        (["MODEL.RPN.PRE_NMS_TOPK_TEST", -1], "MODEL.RPN.PRE_NMS_TOPK_TEST -1 is too small"),
        (["MODEL.RPN.CONV_DIMS", [0]], "give 1 or more, or -1"),
        (["MODEL.RPN.BBOX_REG_LOSS_TYPE", "l1"], "is not one of smooth_l1, giou, diou, ciou"),
        (["MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0)], "give four positive numbers"),
        (["MODEL.RPN.IOU_THRESHOLDS", [30, 70]], "give numbers from 0.0 to 1.0"),
        (["MODEL.ROI_HEADS.POSITIVE_FRACTION", 25.0], "give 0.0 to 1.0"),
        (["MODEL.ROI_HEADS.NMS_THRESH_TEST", 50.0], "is no IoU: give a number from 0.0 to 1.0"),
        (["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 5.0], "is above every score: give a number up to 1.0"),
        (["MODEL.ROI_BOX_HEAD.FC_DIM", -1], "MODEL.ROI_BOX_HEAD.FC_DIM -1 is too small"),
        (["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", -7], "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION -7 is too small"),
        (["MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.CONV_DIM", 0], "MODEL.ROI_MASK_HEAD.CONV_DIM 0 is too small"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[0], [32], [64], [96], [128]]], "give positive numbers"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[]]], "one or more in each list"),
        (["MODEL.PIXEL_STD", [0.0, 0.0, 0.0]], "MODEL.PIXEL_STD .* are not all positive"),
        ([*COMPILED, "INPUT.MIN_SIZE_TRAIN", (0,)], "INPUT.MIN_SIZE_TRAIN without 0"),
        ([*COMPILED, "MODEL.RESNETS.NORM", "SyncBN"], "does not know MODEL.RESNETS.NORM 'SyncBN'"),
        (["MODEL.WEIGHTS"], "cannot use the overrides: .*odd length"),
    ],
)
def test_wrong_overrides_are_refused(overrides: list[object], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        load_config(BASE, overrides)
    assert "\n" not in str(error.value)


def test_unusual_values_that_detectron2_takes_are_taken() -> None:
    for overrides in (
        [*CROPPED, "relative_range", "INPUT.CROP.SIZE", [0.9]],
        [*CROPPED, "relative", "INPUT.CROP.SIZE", [1, 0.5]],
        [*CROPPED, "absolute", "INPUT.CROP.SIZE", [5000, 5000]],
        [*CROPPED, "absolute_range", "INPUT.CROP.SIZE", [384.0, 384.0]],
        ["INPUT.CROP.SIZE", [384, 600]],  # unused
        ["MODEL.MASK_ON", False, "MODEL.ROI_MASK_HEAD.CONV_DIM", 0],
        ["MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.CONV_DIM", 0],
        ["INPUT.FORMAT", "L"],
        ["MODEL.ANCHOR_GENERATOR.SIZES", [32, 64, 128]],
        ["MODEL.RPN.CONV_DIMS", []],
        ["SOLVER.WEIGHT_DECAY_NORM", None],
        ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", (64, 64)],
    ):
        load_config(BASE, overrides)
    cfg = load_config(BASE, ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"])
    cfg.INPUT.MIN_SIZE_TRAIN = 640  # as in a notebook
    check_config(cfg)


def test_steps_after_the_end_are_detectron2s_warning_once_where_it_trains(caplog: pytest.LogCaptureFixture) -> None:
    """Not before our errors, where the schedule is only looked at."""
    cfg = load_config(BASE, ["SOLVER.MAX_ITER", 10])
    assert not caplog.messages
    build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    assert len(caplog.messages) == 1


def test_a_protocol_of_the_other_family_is_refused() -> None:
    with pytest.raises(InputError, match=r"protocols/syncbn_C4\.yaml"):
        load_config([BASE_C4, CONFIG_DIR / "protocols/syncbn.yaml"])
    with pytest.raises(InputError, match=r"protocols/syncbn\.yaml"):
        load_config([BASE, CONFIG_DIR / "protocols/syncbn_C4.yaml"])


def test_the_new_keys_and_their_defaults() -> None:
    cfg = load_config(BASE)
    assert cfg.MODEL.BACKBONE.ALLOW_PARTIAL is False
    assert (cfg.SOLVER.EMA_DECAY, cfg.MODEL.ROI_HEADS.RES5_NORM) == (0.0, "")
    assert (cfg.TEST.REFERENCE_EVAL, cfg.TEST.VISUALIZE, cfg.TEST.BEST_METRIC) == (False, 4, "")
    values = ["SOLVER.EMA_DECAY", 0.999, "TEST.VISUALIZE", 0, "TEST.BEST_METRIC", "my val/bbox/AP-traffic light"]
    assert load_config(BASE, values).SOLVER.EMA_DECAY == 0.999


def test_files_merge_from_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("SOLVER:\n  BASE_LR: 0.1\n  MAX_ITER: 10\n  WARMUP_ITERS: 1\nVERSION: 2\n")
    second.write_text("SOLVER:\n  BASE_LR: 0.2\n  MAX_ITER: 20\nVERSION: 2\n")
    solver = load_config([BASE, first, second], ["SOLVER.MAX_ITER", 30]).SOLVER
    assert (solver.WARMUP_ITERS, solver.BASE_LR, solver.MAX_ITER) == (1, 0.2, 30)
    assert load_config([BASE, second, first]).SOLVER.BASE_LR == 0.1
    assert load_config([BASE]) == load_config(BASE)


TWICE = "SOLVER:\n  BASE_LR: 0.1\nSOLVER:\n  MAX_ITER: 10\n"


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(InputError, match="no configuration file"):
        load_config(path)
    with pytest.raises(InputError, match="nearest names here are COCO-Detection"):
        load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yml")
    with pytest.raises(InputError, match="nearest names here are COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"):
        load_config("mask_rcnn_R_50_FPN_1x.yaml")
    with pytest.raises(InputError, match="no configuration file"):
        load_config([])
    with pytest.raises(InputError, match=r"write MODEL\.WEIGHTS a\.pkl, without ="):
        load_config(BASE, ["MODEL.WEIGHTS=a.pkl", "OUTPUT_DIR=b"])
    for text in ("MODEL: [", "MODEL:\n  RESNET_DEPTH: 50\n", "_BASE_: none.yaml\n", "just text", TWICE):
        path.write_text(text)
        for files in (path, [BASE, path]):
            with pytest.raises(InputError) as error:
                load_config(files)
            assert "\n" not in str(error.value)


def test_the_wrong_file_of_several_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("MODEL: [")
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_config([BASE, path, CONFIG_DIR / "protocols/frozen.yaml"])
    with pytest.raises(InputError, match=r"none\.yaml"):
        load_config([BASE, tmp_path / "none.yaml"])


def test_detectron2s_own_files_load_as_they_are() -> None:
    """All of its model zoo, anchors written as a Python expression included; the reference is its reader with eval."""
    files = sorted(DETECTRON2_CONFIGS.rglob("*.yaml"))
    assert len(files) > 70
    for file in files:
        theirs = base_config()
        theirs.merge_from_file(str(file), allow_unsafe=True)
        if theirs.SOLVER.AMP.ENABLED or (theirs.MODEL.FPN.NORM and "FPN" not in file.stem):
            continue
        assert leaves(load_config(file, ["MODEL.DEVICE", theirs.MODEL.DEVICE])) | {"MODEL.DEVICE": ""} == (
            leaves(theirs) | {"MODEL.DEVICE": ""}
        ), file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("_BASE_: config.yaml", "circle"),
        ("_BASE_: other.yaml", "circle"),
        ("_BASE_: http://localhost/a.yaml", "give a file"),
        ("_BASE_: [3]", "give a file"),
        ("_BASE_: none.yaml", "there is no"),
        ("SEED: " + "[" * 5000, "cannot use"),
        ("VERSION: 1", "VERSION is 1"),
        *(
            (f'OUTPUT_DIR: !!python/object/apply:eval ["{code}"]', "arithmetic")
            for code in (
                "__import__('os').getcwd()", "[[1] * 10**9]", "9**9**9**9", "[[y for y in [x]] for x in [1]]", "x",
                "1 +",
            )
        ),
    ],
)  # fmt: skip
def test_a_file_leads_nowhere_else(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "other.yaml").write_text("_BASE_: config.yaml\n")
    (tmp_path / "config.yaml").write_text(f"{text}\n")
    with pytest.raises(InputError, match=words) as error:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(error.value)


def test_a_yaml_file_cannot_run_code(tmp_path: Path) -> None:
    marker, path = tmp_path / "was-run", tmp_path / "config.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{marker}']\n")
    for files in (path, [BASE, path]):
        with pytest.raises(InputError):
            load_config(files)
    assert not marker.exists()
