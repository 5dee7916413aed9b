"""Networks are found whatever wraps them: files of the layouts that people have, heads left out, nothing guessed."""

import json
import operator
import pickle
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from robust_backbones.checkpoint.convert import convert
from robust_backbones.checkpoint.names import NAMINGS, translated
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, build_backbone
from tests.conftest import randomize_batch_norms

STATED = Statement(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), channel_order="BGR", stride_in_1x1=False)
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """A ResNet-18 with seven classes, by torchvision's names, in half precision to be small."""
    net = build_backbone(BackboneSpec("resnet18", 7), seed=3)
    randomize_batch_norms(net)
    return net.half().state_dict()


def under(prefix: str, tensors: Tensors) -> Tensors:
    return OrderedDict((prefix + name, tensor) for name, tensor in tensors.items())


def body(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}


def other(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def mlp(prefix: str) -> Tensors:
    """A projection: two linear layers with a batch norm between them."""
    net = nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return under(prefix, net.state_dict())


def children(tensors: Tensors) -> Tensors:
    """The names in nn.Sequential(*net.children())."""
    places = {name: place for place, (name, _) in enumerate(build_backbone(BackboneSpec("resnet18")).named_children())}
    return {".".join([str(places[name.split(".")[0]]), *name.split(".")[1:]]): t for name, t in tensors.items()}


def as_detectron2(tensors: Tensors) -> Tensors:
    own = {name: tensor for name, tensor in body(tensors).items() if not name.endswith("num_batches_tracked")}
    return {translated(name, "torchvision", "detectron2"): tensor for name, tensor in own.items()}


def caffe2(tensors: Tensors) -> dict[str, np.ndarray]:
    """Blobs with statistics, as in Detectron2's MSRA/R-50.pkl."""
    endings = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
    branches = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "bn1": "2a", "bn2": "2b", "bn3": "2c", "downsample": "1"}
    blobs = {"conv1_b": np.zeros(64, np.float32), "fc1000_w": np.ones((5, 512)), "lr": np.ones(1)}
    for name, tensor in body(tensors).items():
        first, *rest, last = name.split(".")
        if last == "num_batches_tracked":
            continue
        stem = not first.startswith("layer")
        blob = "conv1" if stem else f"res{int(first[-1]) + 1}_{rest[0]}_branch{branches[rest[1]]}"
        is_norm = first == "bn1" or (not stem and (rest[1].startswith("bn") or rest[1:] == ["downsample", "1"]))
        ending = f"bn_{endings[last]}" if is_norm else "w"
        blobs[f"{'res_' if stem and is_norm else ''}{blob}_{ending}"] = tensor.numpy()
    return blobs


# What makes the file's content from a network's tensors; the layout's name; what the user has to say or choose.
RGB = Statement()
FILES: dict[str, tuple[Callable[[Tensors], Any], str, dict[str, Any]]] = {
    "torch.compile": (lambda t: under("_orig_mod.", t), "training", {"statement": STATED}),
    "compile in DDP": (lambda t: {"model": under("module._orig_mod.", t)}, "training", {"statement": STATED}),
    "DDP in compile": (lambda t: {"model": under("_orig_mod.module.", t)}, "training", {"statement": STATED}),
    "compiled part": (
        lambda t: {"state_dict": under("model._orig_mod.backbone._orig_mod.", t)},
        "training",
        {"statement": STATED},
    ),
    "compiled blocks": (
        lambda t: {name.replace("layer1.0.", "layer1.0._orig_mod."): tensor for name, tensor in t.items()},
        "training",
        {"statement": STATED},
    ),
    "DINO teacher": (
        lambda t: {
            "student": under("module.backbone.", other(body(t))) | mlp("module.head.mlp."),
            "teacher": under("module.backbone.", body(t)) | mlp("module.head.mlp."),
            "dino_loss": {"center": torch.zeros(1, 4)},
        },
        "dino",
        {"key": "teacher"},
    ),
    "DINO student": (
        lambda t: {
            "student": under("module.backbone.", body(t)) | mlp("module.head.mlp."),
            "teacher": under("backbone.", other(body(t))) | mlp("head.mlp."),
        },
        "dino",
        {"prefix": "module.backbone"},
    ),
    "SwAV": (
        lambda t: {
            "state_dict": under("module.", body(t))
            | mlp("module.projection_head.")
            | {"module.prototypes.weight": torch.ones(3, 4)}
        },
        "swav",
        {},
    ),
    "VICReg": (
        lambda t: {"epoch": 3, "model": under("module.backbone.", body(t)) | mlp("module.projector.")},
        "vicreg",
        {},
    ),
    "Barlow Twins": (
        lambda t: {
            "model": under("module.backbone.", body(t))
            | mlp("module.projector.")
            | {"module.bn.running_mean": torch.zeros(4), "module.bn.running_var": torch.ones(4)}
        },
        "vicreg",
        {},
    ),
    "MoCo v3": (
        lambda t: {
            "arch": "resnet18",
            "state_dict": under("module.base_encoder.", body(t))
            | mlp("module.base_encoder.fc.")
            | under("module.momentum_encoder.", other(body(t)))
            | mlp("module.predictor."),
        },
        "moco_v3",
        {},
    ),
    "SimSiam": (
        lambda t: {
            "state_dict": under("module.encoder.", body(t)) | mlp("module.encoder.fc.") | mlp("module.predictor.")
        },
        "simsiam",
        {},
    ),
    "PixPro": (
        lambda t: {
            "model": under("module.encoder.", body(t))
            | under("module.encoder_k.", other(body(t)))
            | {"module.projector.linear1.weight": torch.ones(3, 3, 1, 1)}
        },
        "pixpro",
        {},
    ),
    "BYOL of solo-learn": (
        lambda t: {
            "pytorch-lightning_version": "2.0",
            "state_dict": under("backbone.", body(t))
            | under("momentum_backbone.", other(body(t)))
            | mlp("projector.")
            | {"classifier.weight": torch.ones(5, 512), "classifier.bias": torch.ones(5)},
        },
        "lightning",
        {"statement": STATED},
    ),
    "nn.Sequential": (lambda t: children(body(t)), "training", {"statement": STATED}),
    "lightly": (
        lambda t: under("backbone.", children(body(t))) | mlp("projection_head.layers."),
        "training",
        {"statement": STATED},
    ),
    "fastai": (
        lambda t: {"model": under("0.", children(body(t))) | mlp("1."), "opt": {"state": [{"mom": torch.ones(2)}]}},
        "training",
        {"statement": STATED},
    ),
    "MMDetection": (
        lambda t: {
            "meta": {"mmdet_version": "3"},
            "state_dict": under("backbone.", body(t)) | {"neck.lateral_convs.0.conv.weight": torch.ones(2, 2, 1, 1)},
        },
        "mmdetection",
        {"statement": STATED},
    ),
    "MMPretrain": (
        lambda t: {
            "meta": {},
            "state_dict": under("backbone.", body(t)) | {"head.fc.weight": torch.ones(3, 512)},
            "message_hub": {},
        },
        "mmdetection",
        {"statement": STATED},
    ),
    "DeepSpeed": (
        lambda t: {"module": t, "ds_version": "0.14", "param_shapes": None},
        "deepspeed",
        {"statement": STATED},
    ),
    "Composer": (
        lambda t: {"state": {"model": under("module.", t), "optimizers": {"SGD": {"state": {}}}}, "rng": []},
        "composer",
        {"statement": STATED},
    ),
    "VISSL": (
        lambda t: {
            "phase_idx": 1,
            "classy_state_dict": {
                "base_model": {
                    "model": {
                        "trunk": under("_feature_blocks.", body(t)),
                        "heads": {"0.clf.0.weight": torch.ones(3, 512)},
                    }
                }
            },
        },
        "vissl",
        {},
    ),
    "Sequential(normalise, net)": (
        lambda t: {"0.mean": torch.full((1, 3, 1, 1), 0.5), "0.std": torch.full((1, 3, 1, 1), 0.25)} | under("1.", t),
        "robustbench",
        {},
    ),
    "mu and sigma": (
        lambda t: {"mu": torch.full((3, 1, 1), 0.5), "sigma": torch.full((3, 1, 1), 0.25)} | t,
        "robustbench",
        {},
    ),
    "a defaultdict": (
        lambda t: defaultdict(list, state_dict=defaultdict(int, t)),
        "training",
        {"statement": STATED},
    ),
    "numbers beside the weights": (
        lambda t: {"model": t, "losses": list(np.linspace(0, 1, 600_000).tolist())},
        "training",
        {"statement": STATED},
    ),
    "MoCo in another network": (
        lambda t: {"state_dict": under("module.encoder_q.", body(t)) | mlp("module.encoder_q.fc.")},
        "moco",
        {},
    ),
    "one network under two keys": (
        lambda t: {"state_dict": dict(t), "model": {name: tensor.clone() for name, tensor in t.items()}},
        "training",
        {"statement": STATED},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_layout_that_people_have(tmp_path: Path, tensors: Tensors, name: str) -> None:
    make, layout, options = FILES[name]
    path = tmp_path / "file.pth"
    torch.save(make(tensors), path)
    checkpoint = read_checkpoint(path, **options)
    assert checkpoint.layout == layout
    assert checkpoint.spec.arch == "resnet18"
    assert checkpoint.state_dict.keys() in (tensors.keys(), body(tensors).keys())
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint.state_dict.items())
    if "statement" in options:
        assert checkpoint.spec == replace(BackboneSpec("resnet18", checkpoint.spec.num_classes), **given(STATED))
        with pytest.raises(InputError, match=r"give --mean --std --channel-order \("):
            read_checkpoint(path)
    elif layout == "robustbench":
        assert (checkpoint.spec.mean, checkpoint.spec.std) == ((0.5,) * 3, (0.25,) * 3)
    else:
        assert (checkpoint.spec.mean, checkpoint.spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert checkpoint.said["mean"] == "assumed"
    if any("proj" in left or "mlp" in left or "head" in left for left in checkpoint.left_out):
        assert set(convert(checkpoint)[1].dropped) >= set(checkpoint.left_out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: {"epoch": 3, "model": nn.Linear(2, 2)}, "holds whole objects (model), which are not unpickled"),
        (lambda t: nn.Linear(2, 2), "holds a whole object, which is not unpickled"),
        (
            lambda t: {n: x.to(torch.float8_e5m2) if n.endswith("weight") else x for n, x in t.items()},
            "save plain floats",
        ),
        (lambda t: {"model": under("backbone.", body(t)) | {"classifier.0.convs.0.0.weight": torch.ones(1)}}, "dilate"),
        (lambda t: {"model": under("encoder.", body(t)) | {"decoder.0.convs.0.0.weight": torch.ones(1)}}, "dilate"),
        (lambda t: under("backbone.", body(t)) | {"aux_classifier.0.weight": torch.ones(1)}, "dilate"),
        (lambda t: under("backbone.", body(t)) | {"classifier.0.weight": torch.ones(8, 512, 3, 3)}, "dilate"),  # FCN
        *(
            (lambda t, h=head, p=prefix: under("net.", body(t)) | under(p, h(512, 3).state_dict()), "dilate")
            for head in (DeepLabHead, FCNHead)
            for prefix in ("head.", "model.seg.")
        ),
        (lambda t: under("encoder.", body(t)) | {"decoder.fpa.branch1.1.weight": torch.ones(8, 512, 1, 1)}, "dilate"),
        (  # FCN
            lambda t: {
                "pytorch-lightning_version": "2",
                "state_dict": under("model.backbone.", body(t))
                | {"model.classifier.0.weight": torch.ones(8, 512, 3, 3)},
            },
            "dilate",
        ),
        (lambda t: under("backbone.", body(t)) | {"aspp.aspp1.atrous_conv.weight": torch.ones(8, 512, 1, 1)}, "dilate"),
        *(
            (lambda t, p=p: under(f"{p}backbone.", as_detectron2(t)) | mlp(f"{p}roi_heads.box_head.fc1."), "DC5")
            for p in ("", "module.", "_orig_mod.")
        ),
    ],
)
def test_what_no_resnet_of_floats_is_called_so(
    tmp_path: Path, tensors: Tensors, make: Callable[[Tensors], Any], message: str
) -> None:
    torch.save(make(tensors), tmp_path / "file.pth")
    with pytest.raises(InputError, match=re.escape(message)):
        read_checkpoint(tmp_path / "file.pth", statement=STATED)


@pytest.mark.parametrize("name", ["detr-r50-dc5-f0fb7ef5.pth", "ConditionalDETR_r50dc5_epoch50.pth"])
def test_a_detr_whose_name_says_dc5_is_refused(tmp_path: Path, tensors: Tensors, name: str) -> None:
    for file in (name, "resnet18-0adc5b1c.pth"):
        torch.save({"model": under("backbone.0.body.", body(tensors))}, tmp_path / file)
    with pytest.raises(InputError, match="DC5"):
        read_checkpoint(tmp_path / name, statement=STATED)
    for file, source in ((name, "training"), ("resnet18-0adc5b1c.pth", "")):  # of which the latter's is a hash
        assert read_checkpoint(tmp_path / file, statement=STATED, source=source).layout == "training"


def test_a_head_of_convolutions_and_a_linear_layer_is_of_no_segmenter(tmp_path: Path, tensors: Tensors) -> None:
    head = nn.Sequential(nn.Conv2d(512, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    torch.save(under("backbone.", body(tensors)) | under("classifier.", head.state_dict()), tmp_path / "file.pth")
    checkpoint = read_checkpoint(tmp_path / "file.pth", statement=STATED)
    assert checkpoint.state_dict.keys() == body(tensors).keys()
    assert set(checkpoint.left_out) == {f"classifier.{name}" for name in head.state_dict()}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize(
    "divide",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
    ids=["pruned", "spectral norm", "weight norm", "parametrised"],
)
def test_the_advice_for_a_weight_in_parts_makes_it_whole(tmp_path: Path, divide: Callable[[nn.Module], Any]) -> None:
    net, path = build_backbone(BackboneSpec("resnet18", 2)), tmp_path / "file.pth"
    layer = net.get_submodule("layer1.0.conv1")
    divide(layer)
    torch.save(net.state_dict(), path)
    with pytest.raises(InputError) as refused:
        read_checkpoint(path)
    advised = re.search(r"make it whole by (torch[\w.]+),", str(refused.value))
    assert advised
    operator.attrgetter(advised[1].removeprefix("torch."))(torch)(layer, "weight")
    torch.save(net.state_dict(), path)
    assert torch.equal(read_checkpoint(path).state_dict["layer1.0.conv1.weight"], layer.weight)


def test_a_head_of_convolutions_alone_is_of_no_segmenter(tmp_path: Path, tensors: Tensors) -> None:
    head = nn.Sequential(nn.Conv2d(512, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(), nn.Conv2d(64, 3, 1))
    torch.save(under("backbone.", body(tensors)) | under("keypoints.", head.state_dict()), tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth", statement=STATED).state_dict.keys() == body(tensors).keys()


def test_a_segmenter_that_strides_is_read_by_the_option_that_the_refusal_names(
    tmp_path: Path, tensors: Tensors
) -> None:
    path = tmp_path / "file.pth"
    torch.save(under("backbone.", body(tensors)) | {"aux_classifier.0.weight": torch.ones(1)}, path)
    with pytest.raises(InputError) as refused:
        read_checkpoint(path, statement=STATED)
    _, _, source = str(refused.value).rpartition("--source ")
    assert (
        read_checkpoint(path, statement=STATED, source=source.split(",")[0]).state_dict.keys() == body(tensors).keys()
    )


def given(statement: Statement) -> dict[str, Any]:
    return {name: value for name, value in vars(statement).items() if value is not None}


def test_detectron2s_own_resnet50_has_statistics(tmp_path: Path) -> None:
    net = build_backbone(BackboneSpec("resnet50", 1), seed=1)
    randomize_batch_norms(net)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": caffe2(net.state_dict()), "__author__": "Caffe2"}))
    checkpoint = read_checkpoint(path)
    assert (checkpoint.layout, checkpoint.spec.arch, checkpoint.spec.channel_order) == ("msra", "resnet50", "BGR")
    assert checkpoint.spec.stride_in_1x1
    expected = {k: t for k, t in body(net.state_dict()).items() if not k.endswith("num_batches_tracked")}
    assert checkpoint.state_dict.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.state_dict.items())


def test_a_detector_of_torchvision(tmp_path: Path) -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    torch.save({"model": FasterRCNN(backbone, 3).state_dict()}, tmp_path / "model.pth")
    checkpoint = read_checkpoint(tmp_path / "model.pth")
    assert (checkpoint.layout, checkpoint.prefix) == ("torchvision_detector", "backbone.body.")
    expected = backbone.body.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.state_dict.items())
    assert any(name.startswith("roi_heads.") for name in checkpoint.left_out)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_torchvision_s_own_detectors_normalise_without_an_epsilon(tmp_path: Path, epsilon: float) -> None:
    """Features are those of its own detector, for the name of its COCO_V1 weights, and for one of its users'."""
    from torchvision.models import resnet50
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import FrozenBatchNorm2d

    network = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    generator = torch.Generator().manual_seed(0)
    for norm in (module for module in network.modules() if isinstance(module, FrozenBatchNorm2d)):
        norm.running_var.uniform_(1e-6, 1e-3, generator=generator)
        norm.weight.copy_(0.5 * norm.running_var.sqrt())
    detector = nn.ModuleDict({"backbone": _resnet_fpn_extractor(network, 3)}).eval()
    overwrite_eps(detector, epsilon)
    path = tmp_path / ("mine.pth" if epsilon else "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    torch.save(detector.state_dict(), path)
    ours, pixels = read_checkpoint(path).build(), torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        features = ours.maxpool(ours.relu(ours.bn1(ours.conv1(pixels))))
        for stage, expected in zip(range(1, 5), detector["backbone"].body(pixels).values(), strict=True):
            features = ours.get_submodule(f"layer{stage}")(features)
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_of_transformers(tmp_path: Path, layer_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    depths = [2, 2, 2, 2] if layer_type == "basic" else [3, 4, 6, 3]
    config = transformers.ResNetConfig(
        depths=depths, hidden_sizes=sizes, layer_type=layer_type, downsample_in_bottleneck=layer_type == "bottleneck"
    )
    net = transformers.ResNetForImageClassification(config).eval()
    randomize_batch_norms(net)
    net.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="give --mean --std"):
        read_checkpoint(path)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    checkpoint = read_checkpoint(path)
    assert (checkpoint.layout, checkpoint.spec.mean) == ("transformers", (0.5, 0.4, 0.3))
    assert checkpoint.spec.stride_in_1x1 == (layer_type == "bottleneck")
    assert checkpoint.said["stride_in_1x1"] == "said by the file"
    for change, mean, std in (
        ({"do_normalize": False}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ({"rescale_factor": 1 / 255}, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        ({"rescale_factor": 2 / 255}, (0.25, 0.2, 0.15), (0.1, 0.15, 0.2)),
        ({"rescale_factor": 2 / 255, "do_rescale": False}, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | change))
        spec = read_checkpoint(path).spec
        assert (spec.mean, spec.std) == (pytest.approx(mean), pytest.approx(std))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"do_flip_channel_order": True}))
    assert read_checkpoint(path).spec.channel_order == "BGR"
    pixels = torch.rand(1, 3, 64, 64)
    ours = checkpoint.build()
    features = ours.layer4(ours.layer3(ours.layer2(ours.layer1(ours.maxpool(ours.relu(ours.bn1(ours.conv1(pixels))))))))
    with torch.no_grad():
        torch.testing.assert_close(features, net.resnet(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_resnet_in_a_segmenter_of_transformers_strides_as_its_config_says(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    stages = [f"stage{number}" for number in range(1, 5)]
    config = transformers.ResNetConfig(out_features=stages, downsample_in_bottleneck=True)
    net = transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(backbone_config=config)).eval()
    randomize_batch_norms(net)
    net.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors", statement=Statement(IMAGENET_MEAN, IMAGENET_STD))
    assert (checkpoint.spec.stride_in_1x1, checkpoint.said["stride_in_1x1"]) == (True, "said by the file")
    pixels, ours = torch.rand(1, 3, 64, 64), checkpoint.build()
    with torch.no_grad():
        features = ours.layer4(
            ours.layer3(ours.layer2(ours.layer1(ours.maxpool(ours.relu(ours.bn1(ours.conv1(pixels)))))))
        )
        torch.testing.assert_close(features, net.backbone(pixels).feature_maps[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("naming", NAMINGS)
def test_names_go_there_and_back(naming: str) -> None:
    with torch.device("meta"):
        names = [n for n in build_backbone(BackboneSpec("resnet50")).state_dict() if not n.startswith("fc.")]
    there = [translated(name, "torchvision", naming) for name in names]
    assert len(set(there)) == len(names)
    assert [translated(name, naming, "torchvision") for name in there] == names
