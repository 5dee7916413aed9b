"""Training images in other styles: phases are kept exactly, amplitudes are mixed, and runs without it are untouched."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robust_backbones.analysis.paper.transfer_results import Pretrainings
from robust_backbones.analysis.records import RecordedRun
from robust_backbones.checkpoint.format import sha256
from robust_backbones.classification.pretrain import PretrainConfig, pretrain
from robust_backbones.data.stylization import mix_amplitudes, stylize
from robust_backbones.data.transfer_datasets import open_transfer_data
from robust_backbones.errors import InputError
from tests.classification.test_pretrain import CONFIG, HERE, build_tiny, cut_off_after, same_checkpoints


def pictures(seed: int, count: int = 5, size: tuple[int, int] = (12, 15)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(12, 15), (8, 8)])
def test_phases_are_kept_and_amplitudes_mixed(size: tuple[int, int]) -> None:
    """Against numpy's transform of the whole spectrum, image by image and channel by channel."""
    images, others = pictures(0, size=size), pictures(1, size=size)
    shares = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    mixed = mix_amplitudes(images, others, shares)
    assert mixed.shape == images.shape
    for image, other, share, result in zip(images, others, shares, mixed, strict=True):
        for channel in range(3):
            own, theirs, found = (np.fft.fft2(x[channel].double().numpy()) for x in (image, other, result))
            expected = (1 - float(share)) * np.abs(own) + float(share) * np.abs(theirs)
            np.testing.assert_allclose(np.abs(found), expected, atol=1e-4)
            np.testing.assert_allclose(found / np.abs(found), own / np.abs(own), atol=1e-3)


def test_brightness_is_mixed_by_the_same_share() -> None:
    """The amplitude at frequency 0 is the sum of the pixels."""
    images, others, shares = pictures(0), pictures(1), torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    means = [x.mean((2, 3)) for x in (images, others, mix_amplitudes(images, others, shares))]
    torch.testing.assert_close(means[2], (1 - shares[:, None]) * means[0] + shares[:, None] * means[1])


def test_a_share_of_nothing_changes_nothing() -> None:
    images = pictures(0)
    torch.testing.assert_close(mix_amplitudes(images, pictures(1), torch.zeros(5)), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(mix_amplitudes(images, images, torch.rand(5)), images, atol=1e-6, rtol=0)


def test_batches_are_images_and_their_generators() -> None:
    images = pictures(0, count=16)
    found = [stylize(images, 1.0, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].min() >= 0
    assert found[0].max() <= 1
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    # Of the draws as documented, each image by itself.
    generator = torch.Generator().manual_seed(3)
    partners = torch.randperm(16, generator=generator)
    shares = torch.rand(16, generator=generator)
    for index in range(16):
        pair = images[index : index + 1], images[partners[index]][None], shares[index : index + 1]
        torch.testing.assert_close(found[0][index], mix_amplitudes(*pair)[0].clamp(0, 1))


def test_less_strength_is_nearer_to_the_image() -> None:
    images = pictures(0, count=32)
    distances = [
        (stylize(images, strength, generator=torch.Generator().manual_seed(0)) - images).norm().item()
        for strength in (0.0, 0.1, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 1e-4 < distances[1]


# --- in pre-training -------------------------------------------------------------------------------------------------


def test_a_strength_beyond_1_is_refused() -> None:
    with pytest.raises(InputError, match=r"stylize .* \[0, 1\]"):
        PretrainConfig(stylize=1.5)


def test_it_changes_the_run_is_recorded_and_resumes_exactly(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust_backbones.classification.pretrain.build_backbone", build_tiny)
    data, config = shapes / "shapes_classification", replace(CONFIG, stylize=1.0, epochs=1)
    whole = pretrain(config, data, tmp_path / "whole", HERE)
    assert whole.config["stylize"] == 1.0
    plain = pretrain(replace(config, stylize=0.0), data, tmp_path / "plain", HERE)
    path = tmp_path / "plain/config.json"  # of before this switch
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "stylize"}))
    assert pretrain(replace(config, stylize=0.0), data, tmp_path / "plain", HERE) == plain
    assert len({sha256(tmp_path / run / "checkpoint.pt") for run in ("whole", "plain")}) == 2
    with monkeypatch.context() as patch:
        cut_off_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, data, tmp_path / "cut", replace(HERE, checkpoint_minutes=0.0))
    assert pretrain(config, data, tmp_path / "cut", HERE).metrics == whole.metrics
    assert same_checkpoints(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(InputError, match=r"stylize is 0\.0 there and 1\.0 here"):
        pretrain(config, data, tmp_path / "plain", HERE)


def test_a_folder_of_stylized_imagenet_is_read_as_what_it_is(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as Geirhos et al.'s code writes it, {train,val}/WNID/*.png: to pre-train on, and to transfer to."""
    wnids = {"circle": "n01440764", "cross": "n01443537", "square": "n01484850", "triangle": "n01491361"}
    for part in ("train", "val"):
        for source in sorted((shapes / "shapes_classification" / part).rglob("*.*")):
            target = tmp_path / "stylized-imagenet" / part / wnids[source.parent.name] / f"{source.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(source).save(target)
    folder = tmp_path / "stylized-imagenet"
    monkeypatch.setattr("robust_backbones.classification.pretrain.build_backbone", build_tiny)
    record = pretrain(replace(CONFIG, epochs=1), folder, tmp_path / "run", HERE)
    assert record.dataset == "stylized-imagenet"
    known = Pretrainings([RecordedRun(tmp_path / "run", record)])
    trial = replace(record, task="transfer", backbone={**record.backbone, "label": record.run_id})
    trial.backbone["source_sha256"] = sha256(tmp_path / "run/checkpoint.pt")
    found = known.of(trial)
    assert found is not None
    assert (found.stylized, found.stand_in) == (True, False)
    data = open_transfer_data(str(folder), None)
    assert (data.name, data.metric) == ("stylized-imagenet", "top1")
    assert [*data.train.classes] == [*data.test.classes] == sorted(wnids.values())
    for part, own in (("train", data.train), ("val", data.test)):
        assert sorted(own.names) == sorted(
            str(path.relative_to(folder / part)) for path in (folder / part).rglob("*.png")
        )
