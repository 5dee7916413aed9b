"""The package's top: cheap to import, and every function says what the modules below it say."""

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import robust_backbones
from robust_backbones import api
from robust_backbones.configs import CONFIG_DIR
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.conftest import randomize_batch_norms
from tests.hub import robustness_file

Maker = Callable[[str], Path]


def test_every_name_is_there_and_no_other() -> None:
    assert robust_backbones.__all__ == api.__all__
    assert {*api.__all__} <= {*dir(robust_backbones)}
    assert all(getattr(robust_backbones, name) is getattr(api, name) for name in api.__all__)
    assert all(pickle.loads(pickle.dumps(getattr(api, name))) is getattr(api, name) for name in api.__all__)
    assert all(getattr(api, name).__doc__ for name in api.__all__)
    for name in ("load_backbon", "Path"):
        with pytest.raises(AttributeError, match=f"'{name}'"):
            getattr(robust_backbones, name)


@pytest.fixture(scope="module")
def madry_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 of four classes as MadryLab's library saves it."""
    network = build_backbone(BackboneSpec("resnet18", 4), seed=5)
    randomize_batch_norms(network)
    path = tmp_path_factory.mktemp("madry") / "resnet18.ckpt"
    path.write_bytes(robustness_file(network))
    return path


def test_a_loaded_backbone_is_the_network_of_the_file(madry_file: Path, images: Tensor) -> None:
    model = robust_backbones.load_backbone(str(madry_file), threat_model="L2:3")
    network = build_backbone(BackboneSpec("resnet18", 4), seed=5)
    randomize_batch_norms(network)
    expected = NormalizedModel(network, BackboneSpec("resnet18", 4)).eval()(images)
    assert torch.equal(model(images), expected)
    assert not model.training
    assert (model.spec.arch, model.threat_model) == ("resnet18", ThreatModel("L2", 3))
    again = robust_backbones.load_backbone(robust_backbones.read_checkpoint(madry_file))
    assert again.threat_model is None
    checkpoint = replace(robust_backbones.read_checkpoint(madry_file), threat_model=None)
    stated = robust_backbones.load_backbone(checkpoint, threat_model="L2:3")
    assert stated.threat_model == ThreatModel("L2", 3)
    with pytest.raises(InputError, match="threat model is L2:3, not L2:1"):
        robust_backbones.load_backbone(replace(checkpoint, threat_model=stated.threat_model), threat_model="L2:1")
    assert torch.equal(again(images), expected)


def test_convert_and_verify(madry_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "backbone.pkl"
    assert robust_backbones.convert(str(madry_file), str(target)).ok
    state = torch.get_rng_state()
    errors = robust_backbones.verify(str(madry_file), str(target))
    assert torch.equal(torch.get_rng_state(), state)
    assert {error.stage for error in errors} == {"res2", "res3", "res4", "res5"}
    assert all(error.relative < 1e-4 for error in errors)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"\.pkl or \.pth or \.safetensors"):
        robust_backbones.convert(madry_file, tmp_path / "backbone.npz")
    with pytest.raises(InputError, match="would be overwritten"):
        robust_backbones.convert(target, tmp_path / "." / target.name)


def test_slips_are_answered_with_what_was_likely_meant(madry_file: Path) -> None:
    with pytest.raises(InputError, match="did you mean hub:resnet50_l2_eps3"):
        robust_backbones.load_backbone("resnet50_l2_eps3")
    with pytest.raises(InputError, match="no published backbone is called 'resnet50'"):
        robust_backbones.load_backbone("robust://resnet50")
    with pytest.raises(InputError, match="cannot read the threat model 3: write NORM:EPSILON"):
        robust_backbones.load_backbone(madry_file, threat_model=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("several", [False, True])
def test_errors_name_arguments_that_mend_them(tmp_path: Path, several: bool) -> None:
    tensors, path = build_backbone(BackboneSpec("resnet50", 3)).half().state_dict(), tmp_path / "file.pth"
    torch.save({"net": tensors} | ({"network": {n: t + 1 for n, t in tensors.items()}} if several else {}), path)
    for function in (api.load_backbone, api.read_checkpoint, lambda src: api.convert(src, tmp_path / "out.pkl")):
        with pytest.raises(InputError) as refused:
            function(path)
        assert "--" not in str(refused.value)
        message, _, call = str(refused.value).rpartition("; ")
        if several:
            assert "key net (resnet50" in message
            assert call == "give what read_checkpoint(FILE, key=...) returns in place of the file"
        else:
            assert "give mean std channel_order stride_in_1x1 (" in message
            names = re.findall(r"(\w+)=\.\.\.", call)
            usual = (IMAGENET_MEAN, IMAGENET_STD, "RGB", False)
            statement = api.Statement(**dict(zip(names, usual, strict=True)))
            assert f"FILE, statement=Statement({', '.join(f'{name}=...' for name in names)})" in call
            assert api.load_backbone(api.read_checkpoint(path, statement=statement)).spec.arch == "resnet50"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_of_another_precision_is_a_network_of_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    network = build_backbone(BackboneSpec("resnet18", 3)).to(dtype)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    loaded, images = robust_backbones.load_backbone(tmp_path / "file.pth").eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network.float().eval()(loaded.normalize(images)), rtol=0, atol=0)


def test_what_is_no_whole_backbone_is_reported_and_not_written(tmp_path: Path) -> None:
    network = build_backbone(BackboneSpec("resnet18", 4))
    with torch.no_grad():
        network.layer1[0].conv1.weight[0] = float("nan")
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    (tmp_path / "broken.pth").write_bytes(buffer.getvalue())
    report = robust_backbones.convert(tmp_path / "broken.pth", tmp_path / "backbone.pkl")
    assert not report.ok
    assert report.not_finite == ("layer1.0.conv1.weight",)
    assert not (tmp_path / "backbone.pkl").exists()


def test_configurations_are_found_by_name() -> None:
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    path = Path(robust_backbones.get_config_file(name))
    assert path.is_absolute()
    assert path.samefile(CONFIG_DIR / name)
    with pytest.raises(InputError, match=name):
        robust_backbones.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R50_FPN_3x.yaml")
