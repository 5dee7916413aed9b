"""tools/visualize.py: its numbers are those of the library, its intervals those of a t test, its folder its own."""

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from PIL import Image
from scipy import stats

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, rest_of, write_backbone
from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.visualization import (
    AscentConfig,
    invert,
    maximize_activation,
    noise,
    pixel_correlation,
    saliency_alignment,
    ssim,
)
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone, usual_spec
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.conftest import negatives, randomize_batch_norms
from tests.transfer.conftest import narrow_resnet18  # noqa: F401

pytest.importorskip("skimage")
pytestmark = pytest.mark.usefixtures("narrow_resnet18")

Run = Callable[..., tuple[int, str, str]]
SIZE = ["--image-size", "32", "--val-resize", "32", "--device", "cpu"]
FEW = ["--steps", "3", "--step-size", "0.02"]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``standard=...`` and ``robust=...``: two small networks, in our own format."""
    folder = tmp_path_factory.mktemp("backbones")
    spec = BackboneSpec("resnet18", 4)
    for seed, (name, epsilon) in enumerate({"standard": 0.0, "robust": 0.5}.items()):
        net = build_backbone(spec, seed=seed)
        randomize_batch_norms(net, seed)
        threat_model = ThreatModel("L2", epsilon)
        write_checkpoint(folder / f"{name}.pt", spec=spec, state_dict=net.state_dict(), threat_model=threat_model)
    return [f"{name}={folder / name}.pt" for name in ("standard", "robust")]


@pytest.mark.parametrize(("own", "asked"), [((48, 48), []), ((48, 56), []), ((224, 256), ["--image-size", "48"])])
def test_images_have_the_size_of_the_backbones(
    run_tool: Run, photographs: Path, tmp_path: Path, own: tuple[int, int], asked: list[str]
) -> None:
    spec = BackboneSpec("resnet18", 4, image_size=own[0], val_resize=own[1])
    net = build_backbone(spec).state_dict()
    write_checkpoint(tmp_path / "own.pt", spec=spec, state_dict=net, threat_model=None)
    write_checkpoint(tmp_path / "224.pt", spec=BackboneSpec("resnet18", 4), state_dict=net, threat_model=None)
    options = ["--data", photographs, "--images", "2", "--device", "cpu", "--output", tmp_path / "run"]
    command = ["visualize", "saliency", f"own={tmp_path / 'own.pt'}"]
    assert run_tool(*command, *options, *asked)[0] == 0
    config = RunRecord.read(tmp_path / "run/record.json").config
    assert (config["image_size"], config["val_resize"]) == (own if own[0] == 48 else (48, 55))
    if own[0] == 48:
        status, _, err = run_tool(*command, f"b={tmp_path / '224.pt'}", *options[:-1], tmp_path / "two")
        assert (status, "made for images of 48 and 224 pixels: give --image-size" in err) == (2, True)
        assert not (tmp_path / "two").exists()


@pytest.fixture
def photographs(shapes: Path) -> Path:
    return shapes / "shapes_classification/val"


def model_of(backbone: str) -> NormalizedModel:
    checkpoint = read_checkpoint(Path(backbone.partition("=")[2]))
    return NormalizedModel(checkpoint.build(), checkpoint.spec)


def rows_of(output: Path, backbone: str) -> list[dict[str, str]]:
    with open(output / "numbers.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["backbone"] == backbone]


def column(output: Path, backbone: str, measure: str) -> list[float]:
    return [float(row[measure]) for row in rows_of(output, backbone)]


def pixels_of(folder: Path, output: Path) -> torch.Tensor:
    """The photographs that the numbers are of, by Pillow."""
    images = [Image.open(folder / row["image"]).convert("RGB") for row in rows_of(output, "standard")]
    assert {image.size for image in images} == {(32, 32)}
    flat = [torch.tensor(list(image.tobytes()), dtype=torch.float32).view(32, 32, 3) for image in images]
    return torch.stack(flat).permute(0, 3, 1, 2) / 255


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    status, _, err = result
    assert status == 2
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert word in err


def test_inversion_from_noise(run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ["inversion", *backbones, "--data", photographs, "--output", output, "--images", "5"]
    arguments += [*SIZE, *FEW, "--batch-size", "2", "--pictures", "3", "--layer", "layer2"]
    status, out, _ = run_tool("visualize", *arguments)
    assert status == 0
    assert out.splitlines()[-1].endswith(f"are in {output}")
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "numbers.csv",
        "picture.png",
        "record.json",
    ]

    targets, starts = pixels_of(photographs, output), noise(5, 32, seed=0)
    assert column(output, "start", "ssim") == pytest.approx(ssim(starts, targets).tolist())
    for backbone in backbones:
        name = backbone.partition("=")[0]
        ascent = AscentConfig(steps=3, step_size=0.02)
        expected = invert(model_of(backbone), targets, starts, layer="layer2", ascent=ascent)
        assert column(output, name, "distance") == pytest.approx(expected.values.tolist(), rel=1e-3)
        assert column(output, name, "ssim") == pytest.approx(ssim(expected.images, targets).tolist(), abs=1e-3)
        correlation = pixel_correlation(expected.images, targets).tolist()
        assert column(output, name, "pixel_correlation") == pytest.approx(correlation, abs=1e-3)

    record = RunRecord.read(output / "record.json")
    assert (record.task, record.dataset, record.seed) == ("visualization", "val", 0)
    assert {name: entry["threat_model"] for name, entry in record.backbone.items()} == {
        "standard": "L2:0",
        "robust": "L2:0.5",
    }
    assert record.config["images"] == 5
    for measure in ("ssim", "pixel_correlation", "distance"):
        standard, robust = (column(output, name, measure) for name in ("standard", "robust"))
        assert record.metrics[f"standard/{measure}"] == pytest.approx(fmean(standard))
        differences = [a - b for a, b in zip(robust, standard, strict=True)]
        half = stats.t.ppf(0.975, 4) * stdev(differences) / math.sqrt(5)
        interval = [record.metrics[f"robust - standard/{measure}{end}"] for end in ("", "_low", "_high")]
        mean = fmean(differences)
        assert interval == pytest.approx([mean, mean - half, mean + half])
        assert f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})" in out
    assert Image.open(output / "picture.png").size == (720, 880)  # 0.3 + 3 x 1.1 by 4 x 1.1 inches at 200 dots

    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    status, again, _ = run_tool("visualize", *arguments)
    first, rest = again.split("\n", 1)
    assert (status, rest) == (0, out)
    assert str(output) in first  # it finished before, which is said
    assert_refused(run_tool("visualize", *arguments, "--seed", "1"), "seed is 0 there and 1 here")
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}


def test_inversion_from_another_image_in_a_ball(
    run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path
) -> None:
    """A ball far too small to leave the other image: what is found is as like the target as the start was."""
    output = tmp_path / "run"
    options = ["--data", photographs, "--output", output, "--images", "3", "--start", "image", "--ball", "L2:0.001"]
    status, out, _ = run_tool("visualize", "inversion", backbones[0], *options, *SIZE, *FEW)
    assert status == 0
    assert out.startswith("means over 3 images\n")
    targets = pixels_of(photographs, output)
    correlation = pixel_correlation(targets.roll(-1, 0), targets).tolist()
    assert column(output, "start", "pixel_correlation") == pytest.approx(correlation)
    assert column(output, "standard", "pixel_correlation") == pytest.approx(correlation, abs=1e-3)
    assert json.loads((output / "config.json").read_text())["ball"] == "L2:0.001"


def test_saliency(run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path) -> None:
    """A flat folder of images gives the numbers that class folders do."""
    output, flat = tmp_path / "run", tmp_path / "flat"
    status, out, _ = run_tool(
        "visualize", "saliency", *backbones, "--data", photographs, "--output", output, "--images", "4", *SIZE
    )
    assert status == 0
    assert "means over 4 images" in out
    targets = pixels_of(photographs, output)
    for backbone in backbones:
        alpha, cosine = saliency_alignment(model_of(backbone), targets)
        name = backbone.partition("=")[0]
        assert column(output, name, "alignment") == pytest.approx(alpha.tolist(), rel=1e-3)
        assert column(output, name, "cosine") == pytest.approx(cosine.tolist(), rel=1e-3)
    flat.mkdir()

    def in_flat(name: str) -> str:
        return Path(name.replace("/", "_")).with_suffix(".jfif").name  # which torchvision passes over

    for row in rows_of(output, "standard"):
        shutil.copy(photographs / row["image"], flat / in_flat(row["image"]))
    (flat / "notes.txt").write_text("no image")
    again = tmp_path / "again"
    options = ["--data", flat, "--output", again, "--images", "100", "--batch-size", "3", *SIZE]
    assert run_tool("visualize", "saliency", *backbones, *options)[0] == 0
    numbers = {in_flat(row["image"]): float(row["cosine"]) for row in rows_of(output, "robust")}
    assert {row["image"]: float(row["cosine"]) for row in rows_of(again, "robust")} == pytest.approx(numbers, rel=1e-3)


def test_gradients_of_zero_are_told(run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path) -> None:
    """Of a network whose classifier ignores its features: the picture is grey."""
    checkpoint = read_checkpoint(Path(backbones[0].partition("=")[2]))
    state = {k: v * 0 if k == "fc.weight" else v for k, v in checkpoint.state_dict.items()}
    write_checkpoint(tmp_path / "net.pt", spec=checkpoint.spec, state_dict=state, threat_model=None)
    command = ["visualize", "saliency", f"flat={tmp_path / 'net.pt'}", backbones[0], "--data", photographs, *SIZE]
    _, _, err = run_tool(*command, "--output", tmp_path / "run", "--images", "3")
    assert err == "warning: flat: the gradient of 3 of 3 images is 0: grey in the picture\n"


def test_activation_of_a_layer(run_tool: Run, backbones: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--layer", "layer3.0.conv2", "--units", "7", "20", "--output", output, "--image-size", "32"]
    status, out, _ = run_tool("visualize", "activation", *backbones, *options, "--device", "cpu", *FEW)
    assert status == 0
    assert "means over 2 units, each of its own scale: numbers.csv has" in out
    assert not [name for name in RunRecord.read(output / "record.json").metrics if " - " in name]
    expected = maximize_activation(
        model_of(backbones[1]),
        noise(2, 32, seed=0),
        torch.tensor([7, 20]),
        layer="layer3.0.conv2",
        ascent=AscentConfig(steps=3, step_size=0.02),
    )
    assert [row["image"] for row in rows_of(output, "robust")] == ["unit 7", "unit 20"]
    assert column(output, "robust", "activation") == pytest.approx(expected.values.tolist(), rel=1e-3)
    assert column(output, "robust", "before") == pytest.approx(expected.start_values.tolist(), rel=1e-3)


def test_a_detectors_backbone_is_inverted_and_has_no_logits(
    run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(Path(backbones[0].partition("=")[2]))
    write_backbone(tmp_path / "backbone.pkl", convert(checkpoint)[0], BackboneMetadata.of(checkpoint))
    both = [backbones[0], f"converted={tmp_path / 'backbone.pkl'}"]
    output, common = tmp_path / "run", ["--data", photographs, "--images", "2", *SIZE]
    assert run_tool("visualize", "inversion", *both, *common, *FEW, "--output", output)[0] == 0
    distances = column(output, "standard", "distance")
    assert column(output, "converted", "distance") == pytest.approx(distances, rel=1e-3)
    refused = tmp_path / "refused"
    result = run_tool("visualize", "saliency", *both, *common, "--output", refused)
    assert_refused(result, "converted: the network has no", "another --layer than logits where the command has it")
    assert not refused.exists()


@pytest.mark.parametrize("arch", ["test_convnext", "test_vit"])
def test_what_a_detector_keeps_of_a_network_with_linear_layers_has_no_logits(
    run_tool: Run, arch: str, tmp_path: Path
) -> None:
    spec = usual_spec(arch, 4)
    checkpoint = Checkpoint(spec, build_backbone(spec).state_dict(), None, "", "", "")
    tensors, _ = convert(checkpoint)
    write_backbone(tmp_path / "a.pkl", tensors, BackboneMetadata.of(checkpoint), rest_of(checkpoint))
    output = tmp_path / "run"
    size = ["--image-size", spec.image_size, "--device", "cpu", "--units", "0", "--steps", "1"]
    found = run_tool("visualize", "activation", f"a={tmp_path / 'a.pkl'}", *size, "--output", output)
    assert_refused(found, "a: the network has no classifier")


def test_images_that_a_network_cannot_take_are_refused(run_tool: Run, tmp_path: Path) -> None:
    spec, output = usual_spec("test_convnext", 4), tmp_path / "run"
    state = build_backbone(spec).state_dict()
    write_checkpoint(tmp_path / "net.pt", spec=spec, state_dict=state, threat_model=None)
    options = [f"a={tmp_path / 'net.pt'}", "--image-size", "16", "--units", "0", "--output", output]
    found = run_tool("visualize", "activation", *options)
    assert_refused(found, "a takes no images of this size", "Kernel size")
    assert not output.exists()


def test_a_finished_run_is_of_its_number_of_pictures(
    run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path
) -> None:
    command = ["visualize", "saliency", *backbones, "--data", photographs, "--images", "2", *SIZE]
    command += ["--output", tmp_path / "run"]
    assert run_tool(*command)[0] == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pictures"}))
    assert run_tool(*command)[0] == 0  # of before it was noted
    assert_refused(run_tool(*command, "--pictures", "1"), "pictures is 8 there and 1 here")


def test_a_finished_run_is_of_its_images(
    run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path
) -> None:
    command = ["visualize", "saliency", *backbones, "--images", "2", *SIZE, "--output", tmp_path / "run", "--data"]
    assert run_tool(*command, photographs)[0] == 0
    moved = shutil.copytree(photographs, tmp_path / "moved" / photographs.name)
    assert run_tool(*command, moved)[0] == 0
    assert_refused(run_tool(*command, negatives(photographs, tmp_path)), "another run (data_fingerprint is")


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("inversion", ["--steps", "0"], ["steps must be > 0"]),
        ("inversion", ["--step-size", "0"], ["step_size must be > 0"]),
        ("inversion", ["--step-size", "nan"], ["step_size must be > 0"]),
        ("inversion", ["--val-resize", "0"], ["--val-resize must be > 0"]),
        ("inversion", ["--ball", "L2:0"], ["radius 0"]),
        ("inversion", ["--ball", "L3:1"], ["L3"]),
        ("inversion", ["--layer", "layer5"], ["standard: no layer 'layer5'"]),
        ("inversion", ["--images", "0"], ["--images must be > 0"]),
        ("inversion", ["--images", "1", "--start", "image"], ["--start image needs two"]),
        ("inversion", ["--image-size", "64"], ["val_resize 32 is smaller"]),
        ("inversion", ["--image-size", "8"], ["SSIM needs images of 11 pixels"]),
        ("inversion", ["--data", "nowhere"], ["no folder nowhere"]),
        ("saliency", ["--batch-size", "0"], ["--batch-size must be > 0"]),
        ("saliency", ["--pictures", "0"], ["--pictures must be > 0"]),
    ],
)
def test_bad_input_is_one_sentence(
    run_tool: Run,
    backbones: list[str],
    photographs: Path,
    tmp_path: Path,
    command: str,
    arguments: list[str],
    words: list[str],
) -> None:
    output = tmp_path / "run"
    options = ["--data", photographs, "--output", output, "--images", "2", *SIZE]
    assert_refused(run_tool("visualize", command, *backbones, *options, *arguments), *words)
    assert not output.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], ["one or more backbones"]),
        (["checkpoint.pt"], ["cannot read the backbone 'checkpoint.pt'", "NAME=PATH"]),
        (["a=nowhere.pt"], ["nowhere.pt"]),
        (["target=x.pt"], ["the name target is taken"]),
        (["a=x.pt", "a=y.pt"], ["the name a is taken"]),
    ],
)
def test_a_backbone_is_a_name_and_a_path(run_tool: Run, tmp_path: Path, given: list[str], words: list[str]) -> None:
    output = tmp_path / "run"
    assert_refused(run_tool("visualize", "activation", *given, "--output", output), *words)
    assert not output.exists()


def test_units_that_are_not_there_are_refused(run_tool: Run, backbones: list[str], tmp_path: Path) -> None:
    common = ["--output", tmp_path / "run", "--image-size", "32", "--device", "cpu"]
    result = run_tool("visualize", "activation", *backbones, *common, "--units", "0", "4")
    assert_refused(result, "standard: logits has the units 0 to 3")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_images_or_of_somebody_else_is_refused(
    run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path
) -> None:
    empty, taken = tmp_path / "empty", tmp_path / "taken"
    empty.mkdir()
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    options = [*SIZE, "--images", "2"]
    result = run_tool("visualize", "saliency", *backbones, "--data", empty, "--output", tmp_path / "run", *options)
    assert_refused(result, f"no image in {empty}")
    result = run_tool("visualize", "saliency", *backbones, "--data", photographs, "--output", taken, *options)
    assert_refused(result, "not empty")
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]


def test_without_scikit_image_inversion_says_so_before_it_starts(
    run_tool: Run, backbones: list[str], photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    output = tmp_path / "run"
    options = ["--data", photographs, "--output", output, *SIZE]
    assert_refused(run_tool("visualize", "inversion", *backbones, *options), "pip install scikit-image")
    assert not output.exists()
