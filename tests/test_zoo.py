"""The table of published backbones, held against the paper and the authors' own tables."""

import re

import pytest

from robust_backbones.errors import InputError
from robust_backbones.models import ARCHITECTURES
from robust_backbones.threat_models import ThreatModel
from robust_backbones.zoo import PublishedBackbone, find, published, table


def test_every_network_at_the_papers_levels() -> None:
    """Salman et al. 2020 and the README of their code: 10 L2 levels, 5 Linf levels, six pairs."""
    l2 = {ThreatModel("L2", epsilon) for epsilon in (0, 0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 3, 5)}
    linf = {ThreatModel("Linf", levels / 255) for levels in (0.5, 1, 2, 4, 8)}
    pair = {ThreatModel("L2", 0), ThreatModel("L2", 3)}
    others = ("densenet161", "mnasnet1_0", "mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x1_0", "vgg16_bn")
    expected = {
        **dict.fromkeys(("resnet18", "resnet50", "wide_resnet50_2"), l2 | linf),
        "wide_resnet50_4": l2,
        **dict.fromkeys(others, pair),
    }
    found: dict[str, set[ThreatModel]] = {}
    for backbone in published().values():
        found.setdefault(backbone.arch, set()).add(backbone.threat_model)
    assert found == expected
    assert len(published()) == 67


def test_every_architecture_can_be_built() -> None:
    assert {backbone.arch for backbone in published().values()} <= ARCHITECTURES.keys()


def test_names_files_and_threat_models_agree() -> None:
    """The file names are the authors': norm and epsilon stand in them, epsilon in 1/255 for linf."""
    for name, backbone in published().items():
        arch, norm, epsilon = re.fullmatch(r"(\w+)_(l2|linf)_eps([\d.]+)\.ckpt", backbone.file).groups()
        assert name == backbone.name == backbone.file.removesuffix(".ckpt")
        # the authors' short names begin our full ones
        assert backbone.arch.startswith(arch)
        assert backbone.threat_model.norm.lower() == norm
        assert backbone.threat_model.epsilon == pytest.approx(
            float(epsilon) / (255 if norm == "linf" else 1), rel=1e-12
        )


@pytest.mark.parametrize(
    ("name", "accuracy"),
    # from the README of the authors' code
    [
        ("resnet50_l2_eps5", 56.13),
        ("wide_resnet50_2_l2_eps0.03", 77.26),
        ("wide_resnet50_4_l2_eps0.01", 78.02),
        ("densenet_l2_eps3", 66.98),
        ("vgg16_bn_l2_eps0", 73.66),
        ("resnet18_linf_eps8.0", 42.11),
        ("resnet50_linf_eps4.0", 63.86),
        ("wide_resnet50_2_linf_eps4.0", 68.41),
    ],
)
def test_accuracies_are_the_authors(name: str, accuracy: float) -> None:
    assert find(name).imagenet_accuracy == accuracy


def test_robustness_costs_accuracy() -> None:
    """From ε 0.1 on, each level is less accurate than the one before; a slip of a row would show."""
    series: dict[tuple[str, str], list[PublishedBackbone]] = {}
    for backbone in published().values():
        if backbone.threat_model.norm == "Linf" or backbone.threat_model.epsilon >= 0.1:
            series.setdefault((backbone.arch, backbone.threat_model.norm), []).append(backbone)
    for backbones in series.values():
        by_epsilon = sorted(backbones, key=lambda backbone: backbone.threat_model.epsilon)
        accuracies = [backbone.imagenet_accuracy for backbone in by_epsilon]
        assert accuracies == sorted(accuracies, reverse=True)
    assert all(40 < backbone.imagenet_accuracy < 80 for backbone in published().values())


def test_find() -> None:
    assert find("shufflenet_l2_eps3") == PublishedBackbone(
        name="shufflenet_l2_eps3",
        arch="shufflenet_v2_x1_0",
        threat_model=ThreatModel("L2", 3),
        imagenet_accuracy=43.32,
        file="shufflenet_l2_eps3.ckpt",
    )


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("resnet50_l2_eps3.0", "resnet50_l2_eps3"),
        ("densenet161_l2_eps3", "densenet_l2_eps3"),
        ("resnet50_linf_eps4", "resnet50_linf_eps4.0"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"'{re.escape(wrong)}': the nearest names are .*{re.escape(nearest)}(,|$)"):
        find(wrong)


@pytest.mark.parametrize("wrong", ["", "7", "../../etc/passwd"])
def test_whatever_is_asked_for_some_names_are_offered(wrong: str) -> None:
    with pytest.raises(InputError) as error:
        find(wrong)
    assert sum(name in str(error.value) for name in published()) >= 4


def test_the_table_is_aligned_and_whole() -> None:
    header, *rows = table().splitlines()
    assert len({len(line) for line in (header, *rows)}) == 1
    starts = [header.index(head) for head in ("name", "architecture", "threat model", "ImageNet accuracy")]
    for row, backbone in zip(rows, published().values(), strict=True):
        cells = [row[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        accuracy = f"{backbone.imagenet_accuracy:.2f}"
        assert cells == [backbone.name, backbone.arch, str(backbone.threat_model), accuracy]
    assert "resnet50_linf_eps4.0         resnet50            Linf:4/255                63.86" in rows
