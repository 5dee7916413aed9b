"""The protocol of transfer: who selects, from what, and what is left as it was."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust_backbones.classification.metrics import accuracy
from robust_backbones.errors import InputError, TrainingFailedError
from robust_backbones.transfer.config import Setting, TransferConfig
from robust_backbones.transfer.protocol import labels_of, open_data, select, split_held_out


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_a_split_is_complete_disjoint_and_of_every_class(labels: list[int], share: float, seed: int) -> None:
    kept, held_out = split_held_out(labels, share, seed)
    assert sorted(kept + held_out) == list(range(len(labels)))
    assert (kept, held_out) == (sorted(kept), sorted(held_out))
    all_, selecting = Counter(labels), Counter(labels[position] for position in held_out)
    for label, count in all_.items():
        assert selecting[label] == (0 if count == 1 else min(count - 1, max(1, round(share * count))))


def test_a_split_is_its_seeds() -> None:
    labels = [0, 1] * 50
    assert split_held_out(labels, 0.2, 0) == split_held_out(labels, 0.2, 0)
    assert split_held_out(labels, 0.2, 0) != split_held_out(labels, 0.2, 1)
    # A class's draw is not another's: positions within the classes differ.
    held_out = split_held_out(labels, 0.2, 0)[1]
    assert {p // 2 for p in held_out if labels[p] == 0} != {p // 2 for p in held_out if labels[p] == 1}


@given(st.data())
def test_accuracies_are_what_counting_gives(data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=40))
    right = data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels)))
    counts = torch.zeros(2, 5)
    for label, answer in zip(labels, right, strict=True):
        counts[0, label] += answer
        counts[1, label] += 1
    shares = {
        c: sum(a for a, label in zip(right, labels, strict=True) if label == c) / labels.count(c) for c in set(labels)
    }
    assert accuracy(*counts, "top1") == pytest.approx(100 * sum(right) / len(right))
    assert accuracy(*counts, "mean_per_class") == pytest.approx(100 * sum(shares.values()) / len(shares))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(InputError, match="top1, mean_per_class"):
        accuracy(torch.ones(2), torch.ones(2), "f1")


def test_the_best_mean_is_selected_and_of_equal_ones_the_first() -> None:
    assert select({"a": [10.0, 20.0], "b": [5.0, 26.0], "c": [0.0, 30.0]}) == "b"
    assert select({"a": [10.0, 20.0], "b": [20.0, 10.0]}) == "a"


def test_a_setting_that_diverged_is_out() -> None:
    assert select({"a": [99.0, None], "b": [1.0, 1.0]}) == "b"
    with pytest.raises(TrainingFailedError, match="--lrs"):
        select({"a": [None]})


def test_the_grid_is_every_rate_with_every_decay() -> None:
    config = TransferConfig(lrs=(0.1, 0.01), weight_decays=(0.0, 5e-4))
    assert config.settings == [Setting(lr, decay) for lr in (0.1, 0.01) for decay in (0.0, 5e-4)]
    assert str(config.settings[1]) == "lr0.1_wd0.0005"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lrs": ()}, "lrs"),
        ({"lrs": (0.1, 0.1)}, "different"),
        ({"lrs": (0.0,)}, "> 0"),
        ({"lrs": (float("nan"),)}, "> 0"),
        ({"weight_decays": (-1.0,)}, ">= 0"),
        ({"seeds": ()}, "seeds"),
        ({"lrs": (0.01, 0.01000000001)}, "six digits"),
        ({"select_on": "val"}, "held_out, test"),
        ({"held_out": 1.0}, "share"),
        ({"num_outputs": -1}, "num_outputs"),
        ({"images_per_class": -1}, "images_per_class"),
        ({"seeds": (0, 2**63)}, "seeds 9223372036854775808 is too large"),
    ],
)
def test_what_is_no_protocol_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TransferConfig(**wrong)  # type: ignore[arg-type]


def test_checkpoints_are_called_by_their_files_or_folders() -> None:
    paths = [
        Path("runs/a/checkpoint.pt"),
        Path("runs/b/best.pt"),
        Path("files/r50.v2.pth"),
        Path("hub:resnet50_l2_eps3"),
    ]
    assert labels_of(paths) == ["a", "b", "r50.v2", "resnet50_l2_eps3"]
    assert labels_of([Path("runs/../checkpoint.pt")]) == [Path.cwd().name]
    with pytest.raises(InputError, match="called a"):
        labels_of([Path("x/a/checkpoint.pt"), Path("y/a/best.pt")])


def test_test_images_that_are_trained_on_are_told(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_data(shapes / "shapes_classification")
    assert capsys.readouterr().out == ""
    train, copy = tmp_path / "data/train", tmp_path / "data/val/cross/copy.png"
    shutil.copytree(shapes / "shapes_classification", tmp_path / "data")
    shutil.copy(min((train / "circle").iterdir()), copy)
    open_data(tmp_path / "data")
    told = f"{tmp_path / 'data/val'} shares 1 image with {train}, the first: {copy}, the same image as {train}"
    assert told in capsys.readouterr().out
