"""The configurations and studies that come with the package; both are also at the top of a checkout."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from robust_backbones.errors import InputError

CONFIG_DIR = Path(__file__).with_name("detectron_configs")
STUDY_DIR = Path(__file__).with_name("studies")


def find_file(path: str | Path, folder: Path) -> Path:
    """``path`` if it exists, else the file of that name in ``folder``, with or without the folder's own name in front.

    So a checkout, an install and any working folder find ``detectron_configs/quick/x.yaml`` and ``quick/x.yaml``.
    """
    path = Path(path)
    name = path.relative_to(folder.name) if path.parts[:1] == (folder.name,) else path
    return folder / name if not path.exists() and (folder / name).is_file() else path


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a duplicated key is refused instead of silently taking its last value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: dict[str, yaml.Node] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if keys.setdefault(key.value, key) is not key and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"{key.value} is there twice, again in line {key.start_mark.line + 1}: leave one")
        return node


DETECTOR_KEYS: dict[str, Any] = {
    # An empty MODEL.WEIGHTS means a random backbone; it has to be asked for.
    "MODEL.BACKBONE.FROM_SCRATCH": False,
    # A backbone file that does not fill every tensor is refused, unless parts of the backbone are to be random.
    "MODEL.BACKBONE.ALLOW_PARTIAL": False,
    # The network of timm that "build_timm_fpn_backbone" of MODEL.BACKBONE.NAME puts under a feature pyramid, or the one
    # that Detectron2's own network of its family is shaped as: "build_swin_fpn_backbone".
    "MODEL.BACKBONE.TIMM": "",
    # Stochastic depth: how often the last block is left out in training, the first never; not for ResNets.
    "MODEL.BACKBONE.DROP_PATH": 0.0,
    # Activations of blocks are computed anew in the backward pass instead of being kept: slower, in less memory.
    "MODEL.BACKBONE.USE_ACT_CHECKPOINT": False,
    # Of "build_swin_fpn_backbone" of MODEL.BACKBONE.NAME: side of the windows in tokens; 0: as in pre-training. For
    # others relative position biases are interpolated as timm does, which nothing proves.
    "MODEL.SWIN.WINDOW_SIZE": 0,
    # Of "build_vit_sfp_backbone" of MODEL.BACKBONE.NAME: the square, in pixels, that position embeddings are for.
    "MODEL.VIT.PRETRAIN_SIZE": 224,
    # Of its layer norms; 0.0: as timm has it.
    "MODEL.VIT.NORM_EPSILON": 0.0,
    # Side, in patches, of the windows that blocks attend within, but for the GLOBAL_BLOCKS (from 0 on); 0: all attend
    # globally.
    "MODEL.VIT.WINDOW_SIZE": 0,
    "MODEL.VIT.GLOBAL_BLOCKS": (),
    # Relative position embeddings, which no backbone file has: they begin at zero, as if they were not there.
    "MODEL.VIT.REL_POS": False,
    # Images are padded to a square of so many pixels; 0: to multiples of 32.
    "MODEL.VIT.SQUARE_SIZE": 0,
    # A detector that plain Detectron2 wrote does not say what its backbone is, and is refused unless this takes it.
    "MODEL.ALLOW_UNVERIFIED": False,
    # A norm (as RESNETS.NORM) after res5 in the ROI heads of C4 detectors, as in MoCo's detection protocol; "": none.
    "MODEL.ROI_HEADS.RES5_NORM": "",
    # On CPUs: a ROIAlign that is faster than torchvision's (benchmark mask-rcnn) and equal to it up to rounding.
    "MODEL.FAST_ROI_ALIGN": True,
    # The losses of Faster and Mask R-CNN over the whole batch at once: fast/rcnn.py. False: Detectron2's own step.
    "MODEL.FAST_STEP": False,
    # Of MODEL.FAST_STEP on GPUs: backbone, FPN and RPN head compiled, and batches padded to a few shapes, which is more
    # than rounding and so another run: anchors are sampled, and norms that learn see zeros, beyond the images.
    "MODEL.COMPILE": False,
    # "float16" is Detectron2's own AMP and needs CUDA; "bfloat16" needs no loss scaling and runs on CPUs too.
    "SOLVER.AMP.DTYPE": "float16",
    # Decay, in [0, 1), of the exponential moving average of the weights, which is what is evaluated and saved; 0: off.
    "SOLVER.EMA_DECAY": 0.0,
    # "AdamW" takes WEIGHT_DECAY and the like as "SGD" does, and has no use for MOMENTUM and NESTEROV.
    "SOLVER.OPTIMIZER": "SGD",
    # The learning rate of the backbone (without FPN) as a multiple of the rest's.
    "SOLVER.BACKBONE_MULTIPLIER": 1.0,
    # Multiplies the learning rate of the backbone once for every layer above: detection/layer_decay.py. 1.0: none.
    "SOLVER.LAYER_DECAY": 1.0,
    # Keys whose values a study chose for each backbone, on other images: reports compare runs whatever these are.
    "SOLVER.CHOSEN": (),
    # Set by --extend: rows of (iteration, MAX_ITER, STEPS), the schedules that were left at these iterations.
    "SOLVER.EXTENDED": (),
    # The adversary of adversarial training: "free" or "pgd", as detection/adversarial.py has them; "": none.
    "ADVERSARIAL.KIND": "",
    # In pixels of [0, 1], before they are normalised.
    "ADVERSARIAL.THREAT_MODEL": "Linf:4/255",
    # Where the perturbation of an image starts: at 0, or at a random point of the ball.
    "ADVERSARIAL.RANDOM_START": False,
    # m of free training: the updates for each batch. MAX_ITER and all else count updates, not batches.
    "ADVERSARIAL.REPLAYS": 4,
    # Of PGD; a step's size is a fraction of epsilon.
    "ADVERSARIAL.STEPS": 3,
    "ADVERSARIAL.RELATIVE_STEP_SIZE": 2 / 3,
    # Large-scale jitter (Ghiasi et al. 2021) instead of a shorter side: (0.1, 2.0, 1024) fits the image into a square
    # of 0.1 to 2.0 x 1024 pixels, then crops or pads to 1024; () leaves it out.
    "INPUT.SCALE_JITTER": (),
    # Data sets in COCO's format to register: (name, annotation file, image folder), the paths within the folder
    # that the environment variable DETECTRON2_DATASETS names.
    "DATASETS.COCO_FORMAT": (),
    # The same in VOC's format: (name, folder, list in ImageSets/Main) or (..., classes), a tuple of names; without it
    # the classes are those of all XML files in the folder.
    "DATASETS.VOC_FORMAT": (),
    # So many images of each set in TRAIN are held out: the set NAME_held_out has them, to be named in TEST. 0: none.
    "DATASETS.HELD_OUT": 0,
    # Images to leave out, which --skip-unreadable finds: rows of (set, image id, file).
    "DATASETS.SKIPPED": (),
    # Set by a run: rows of (set, SHA-256 of its annotations).
    "DATASETS.CONTENT": (),
    # COCO's own (slow) pycocotools instead of faster-coco-eval, which gives the same numbers.
    "TEST.REFERENCE_EVAL": False,
    # COCO's maxDets: of a class in an image so many detections count, the best; AP by the last, AR by each.
    "TEST.MAX_DETS": (1, 10, 100),
    # How many test images are drawn with their detections to TensorBoard at each evaluation.
    "TEST.VISUALIZE": 4,
    # The metric, as "bbox/AP50", by which model_best.pth is chosen; "": segm/AP with masks, bbox/AP without.
    "TEST.BEST_METRIC": "",
}
"""The keys that we add to Detectron2's configuration, with their defaults."""


def get_config_file(name: str) -> str:
    """The absolute path of a configuration that comes with the package, as in Detectron2's model zoo.

    Args:
        name: a path within ``detectron_configs``, such as ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"``.

    Raises:
        InputError: there is no such configuration; the message gives the closest names.
    """
    path = CONFIG_DIR / name
    if not path.is_file():
        raise InputError(f"no configuration is called {name!r}: the nearest names are {nearest_names(name)}")
    return str(path.absolute())


def as_arguments(overrides: Mapping[str, object]) -> str:
    """Overrides of a configuration as a shell's command line takes them."""
    return " ".join(f'{key} "{value}"' for key, value in overrides.items())


def nearest_names(name: str, folder: Path = CONFIG_DIR) -> str:
    """The three names of the package's files in ``folder`` that are closest to ``name``, by file name before folder."""

    def likeness(file: PurePath) -> list[float]:
        pairs = ((file.stem, PurePath(name).stem), (file.as_posix(), name))
        return [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]

    files = [file.relative_to(folder) for file in folder.glob("**/*.yaml")]
    return ", ".join(file.as_posix() for file in sorted(files, key=likeness, reverse=True)[:3])
