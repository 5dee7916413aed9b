"""Linear probes: one pass for all heads gives what a run for each would, and no test image has a part in it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.checkpoint.format import Checkpoint, sha256
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.data.batches import train_batches
from robust_backbones.data.datasets import ClassificationDataset
from robust_backbones.data.transfer_datasets import TransferData, open_transfer_data
from robust_backbones.data.transforms import train_transform, val_transform
from robust_backbones.errors import InputError, PreemptedError, TrainingFailedError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer import linear_probe as module
from robust_backbones.transfer.config import ProbeConfig, Setting
from robust_backbones.transfer.features import Features
from robust_backbones.transfer.heads import HeadBank
from robust_backbones.transfer.linear_probe import linear_probe
from robust_backbones.transfer.protocol import split_held_out

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
CONFIG = ProbeConfig(
    lrs=(0.01, 0.001), seeds=(0, 1), epochs=4, lr_step=2, batch_size=8, image_size=32, val_resize=32, min_crop_scale=0.5
)


def probe(
    config: ProbeConfig, checkpoint: Checkpoint, data: TransferData, output: Path, **options: Any
) -> list[RunRecord]:
    return linear_probe({"net": checkpoint}, data, output, config, workers=0, **options)


def head(output: Path, seed: int = 0, label: str = "net") -> Tensor:
    return read_checkpoint(output / label / f"seed_{seed}" / "checkpoint.pt").state_dict["fc.weight"]


def pixels(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


def network(checkpoint: Checkpoint, seed: int) -> nn.Module:
    """The whole network with a fresh classifier of ``seed``: nothing is folded, nothing shared."""
    net = build_backbone(BackboneSpec("resnet18", 4), seed=seed)
    net.load_state_dict({**net.state_dict(), **{k: v for k, v in checkpoint.state_dict.items() if k[:3] != "fc."}})
    return net


def sequential(
    checkpoint: Checkpoint,
    images: ClassificationDataset,
    setting: Setting,
    seed: int,
    *,
    config: ProbeConfig = CONFIG,
    train_statistics: bool = False,
) -> nn.Module:
    """One run for one head, as one writes it first: all epochs through the whole network, by torch's own SGD."""
    net = network(checkpoint, seed)
    net.requires_grad_(False)
    net.fc.requires_grad_(True)
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_step)
    order = images.seen_through(train_transform(32, min_crop_scale=0.5), seed=CONFIG.data_seed)
    for epoch in range(config.epochs):
        net.train(train_statistics)
        # The order is the seed's, the augmentation the probe's.
        drawn = train_batches(
            images.seen_through(order.transform, seed=CONFIG.data_seed if train_statistics else seed),
            batch_size=8,
            micro_batch_size=8,
            epoch=epoch,
            workers=0,
        ).batch_sampler
        view = order.seen_through(order.transform, epoch=epoch)
        for rows in drawn:  # type: ignore[union-attr]
            batch = torch.stack([view[row][0] for row in rows])
            labels = torch.tensor([images.labels[row] for row in rows])
            loss = F.cross_entropy(net(pixels(batch)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return net.eval()


def mean_accuracy(net: nn.Module, images: ClassificationDataset) -> float:
    plain = images.seen_through(val_transform(32, resize=32))
    with torch.no_grad():
        answers = [
            int(net(pixels(image[None])).argmax()) == label for image, label in (plain[i] for i in range(len(plain)))
        ]
    return 100 * sum(answers) / len(answers)


def test_one_pass_gives_what_a_run_for_each_head_gives(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights within 1e-6, and with them every accuracy; for heads on all images and on those that are not held out."""
    config = replace(CONFIG, epochs=2, lr_step=1)
    banks: dict[str, list[HeadBank]] = {}
    original = module._Probe.train

    def train(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        banks.update(self.heads)

    monkeypatch.setattr(module._Probe, "train", train)
    records = probe(config, checkpoint, data, tmp_path / "out")
    kept, held_out = split_held_out(data.train.labels, CONFIG.held_out, CONFIG.data_seed)
    scores: dict[str, list[float]] = {}
    for setting, seed in itertools.product(CONFIG.settings, CONFIG.seeds):
        for part, images in (("all", data.train), ("selecting", data.train.take(kept))):
            # The held-out images keep their place in the draws of augmentation, and others' order is by their number.
            net = sequential(checkpoint, images, setting, seed, config=config)
            ours = banks[part][0].classifier(CONFIG.seeds.index(seed), setting)
            torch.testing.assert_close(ours.weight, net.fc.weight, rtol=0, atol=1e-6)
            torch.testing.assert_close(ours.bias, net.fc.bias, rtol=0, atol=1e-6)
            if part == "selecting":
                scores.setdefault(str(setting), []).append(mean_accuracy(net, data.train.take(held_out)))
    selection = records[0].config["selection"]
    assert selection["on"] == "held_out"
    assert selection["scores"] == {name: pytest.approx(values) for name, values in scores.items()}
    best = max(scores, key=lambda name: sum(scores[name]))
    assert selection["selected"] == best
    chosen = next(setting for setting in CONFIG.settings if str(setting) == best)
    for record in records:
        net = sequential(checkpoint, data.train, chosen, record.seed, config=config)
        assert record.metrics["clean_accuracy"] == pytest.approx(mean_accuracy(net, data.test))
        torch.testing.assert_close(head(tmp_path / "out", record.seed), net.fc.weight, rtol=0, atol=1e-6)


def test_batch_norms_in_train_mode_are_the_plain_networks(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path
) -> None:
    config = replace(CONFIG, batch_norm="train", lrs=(0.01,), seeds=(3,))
    (record,) = probe(config, checkpoint, data, tmp_path / "out")
    net = sequential(checkpoint, data.train, config.settings[0], 3, train_statistics=True)
    ours = read_checkpoint(tmp_path / "out/net/seed_3/checkpoint.pt").state_dict
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours["bn1.running_mean"], checkpoint.state_dict["bn1.running_mean"])
    assert record.metrics["clean_accuracy"] == pytest.approx(mean_accuracy(net, data.test))


def test_batch_norms_cannot_be_trained_on_one_small_image(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path
) -> None:
    config = replace(CONFIG, batch_norm="train", batch_size=1)
    with pytest.raises(InputError, match=r"one value a channel.*larger"):
        probe(config, checkpoint, data, tmp_path / "out")


def test_a_frozen_backbone_stays_what_it_is(checkpoint: Checkpoint, data: TransferData, tmp_path: Path) -> None:
    probe(CONFIG, checkpoint, data, tmp_path / "out")
    for seed in CONFIG.seeds:
        trial = read_checkpoint(tmp_path / f"out/net/seed_{seed}/checkpoint.pt")
        assert all(torch.equal(trial.state_dict[k], v) for k, v in checkpoint.state_dict.items() if k[:3] != "fc.")
        assert trial.threat_model == checkpoint.threat_model


def test_several_backbones_share_one_pass(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends as if alone, and no image is read more often."""
    other = replace(checkpoint, state_dict={k: v * 1.01 for k, v in checkpoint.state_dict.items()})
    reads: list[str] = []
    original = ClassificationDataset.load
    monkeypatch.setattr(ClassificationDataset, "load", lambda self, i: reads.append(self.names[i]) or original(self, i))
    probe(CONFIG, checkpoint, data, tmp_path / "first")
    alone = len(reads)
    probe(CONFIG, other, data, tmp_path / "second")
    reads.clear()
    together = linear_probe({"first": checkpoint, "second": other}, data, tmp_path / "both", CONFIG, workers=0)
    assert len(reads) == alone
    assert [record.backbone["label"] for record in together] == ["first", "first", "second", "second"]
    for name in ("first", "second"):
        for seed in CONFIG.seeds:
            assert torch.equal(head(tmp_path / "both", seed, name), head(tmp_path / name, seed))


@pytest.mark.parametrize(
    ("epochs", "way"),
    [(1, {}), (4, {}), (3, {"views": 2}), (3, {"batch_norm": "train"})],
    ids=["early", "at the end", "views", "batch norm"],
)
def test_a_probe_cut_off_ends_the_same(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int, way: Any
) -> None:
    """Bit for bit, wherever a kill comes; what is finished is not computed again."""
    config = replace(CONFIG, **way)
    whole = probe(config, checkpoint, data, tmp_path / "whole")
    original, done = module._Probe._train_epoch, []

    def dying(self: Any, banks: Any, epoch: int, features: Any) -> Any:
        if len(done) == epochs:
            raise KeyboardInterrupt
        done.append(epoch)
        return original(self, banks, epoch, features)

    def dying_at_the_end(self: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Probe, "_train_epoch", dying)
        patch.setattr(module._Probe, "finish", dying_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            probe(config, checkpoint, data, tmp_path / "cut", checkpoint_minutes=0)
    rest: list[int] = []
    monkeypatch.setattr(
        module._Probe, "_train_epoch", lambda self, b, epoch, f: rest.append(epoch) or original(self, b, epoch, f)
    )
    resumed = probe(config, checkpoint, data, tmp_path / "cut", checkpoint_minutes=0)
    assert rest == list(range(epochs, config.epochs))
    assert [record.metrics for record in resumed] == [record.metrics for record in whole]
    assert resumed[0].config["selection"] == whole[0].config["selection"]
    for path in (tmp_path / "whole").rglob("*.pt"):
        assert sha256(path) == sha256(tmp_path / "cut" / path.relative_to(tmp_path / "whole")), path
    rows = [json.loads(line) for line in (tmp_path / "cut/epochs.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert not list((tmp_path / "cut").rglob("*.tmp*"))
    assert not (tmp_path / "cut/state.pt").exists()


def test_a_finished_probe_is_not_run_again(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = probe(CONFIG, checkpoint, data, tmp_path / "out")
    monkeypatch.setattr(Features, "__init__", lambda *a, **k: pytest.fail("it builds networks again"))
    (tmp_path / "out/state.pt").touch()  # of a process that was killed after its last record
    assert probe(CONFIG, checkpoint, data, tmp_path / "out") == records
    assert not (tmp_path / "out/state.pt").exists()
    with pytest.raises(InputError, match="epochs is 4 there and 5 here"):
        probe(replace(CONFIG, epochs=5), checkpoint, data, tmp_path / "out")


def test_a_probe_asked_to_stop_says_so_and_resumes(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probe(CONFIG, checkpoint, data, tmp_path / "whole")
    original = module._Probe._train_epoch

    def signalled(self: Any, banks: Any, epoch: int, features: Any) -> Any:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, banks, epoch, features)

    with monkeypatch.context() as patch:
        patch.setattr(module._Probe, "_train_epoch", signalled)
        with pytest.raises(PreemptedError, match="give the same command again to resume"):
            probe(CONFIG, checkpoint, data, tmp_path / "out")
    assert [r.metrics for r in probe(CONFIG, checkpoint, data, tmp_path / "out")] == [r.metrics for r in whole]


# No test image reaches training or selection


def with_other_test_images(shapes: Path, folder: Path) -> TransferData:
    """The shapes with noise in place of every test image."""
    source = shapes / "shapes_classification"
    for path in [*source.glob("train/*/*.jpg"), *source.glob("val/*/*.jpg")]:
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.parts[-3] == "train":
            copy.write_bytes(path.read_bytes())
        else:
            noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            cv2.imwrite(str(copy), noise)
    return open_transfer_data(str(folder), None)


@pytest.mark.parametrize("way", [{}, {"solver": "lbfgs"}, {"batch_norm": "train"}], ids=["sgd", "lbfgs", "batch norm"])
def test_test_images_change_nothing_but_the_result(
    checkpoint: Checkpoint, data: TransferData, shapes: Path, tmp_path: Path, way: Any
) -> None:
    config = replace(CONFIG, **way)
    noise = replace(with_other_test_images(shapes, tmp_path / "shapes_classification"), name=data.name)
    records = [probe(config, checkpoint, each, tmp_path / name) for name, each in (("a", data), ("b", noise))]
    assert records[0][0].config["selection"] == records[1][0].config["selection"]
    assert records[0][0].metrics != records[1][0].metrics
    for record in records[0]:
        assert torch.equal(head(tmp_path / "a", record.seed), head(tmp_path / "b", record.seed))


@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_no_test_image_is_read_before_the_selection(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    events: list[str] = []
    original, select = ClassificationDataset.load, module.select
    monkeypatch.setattr(
        ClassificationDataset,
        "load",
        lambda self, i: events.append(self._source.root.name) or original(self, i),
    )
    monkeypatch.setattr(module, "select", lambda scores: events.append("selected") or select(scores))
    probe(replace(CONFIG, solver=solver), checkpoint, data, tmp_path / "out")
    assert "val" not in events[: events.index("selected")]
    assert set(events[events.index("selected") + 1 :]) == {"val"}
    assert events.count("val") == len(data.test)


def test_held_out_images_do_not_train_the_heads_that_they_select(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, held_out = split_held_out(data.train.labels, CONFIG.held_out, CONFIG.data_seed)
    seen: dict[int, set[int]] = {}
    original = HeadBank.train_epoch

    def train_epoch(self: HeadBank, x: Tensor, labels: Tensor, orders: Tensor, **options: Any) -> Tensor:
        seen.setdefault(id(self), set()).update(orders.flatten().tolist())
        return original(self, x, labels, orders, **options)

    monkeypatch.setattr(HeadBank, "train_epoch", train_epoch)
    probe(CONFIG, checkpoint, data, tmp_path / "out")
    assert sorted(map(sorted, seen.values())) == sorted([sorted(kept + held_out), kept])


# Ways


def test_selection_on_test_images_is_labelled(checkpoint: Checkpoint, data: TransferData, tmp_path: Path) -> None:
    config = replace(CONFIG, select_on="test")
    records = probe(config, checkpoint, data, tmp_path / "out")
    selection = records[0].config["selection"]
    assert selection["on"] == "test"
    assert [r.metrics["clean_accuracy"] for r in records] == selection["scores"][selection["selected"]]
    best = max(sum(values) for values in selection["scores"].values())
    assert sum(selection["scores"][selection["selected"]]) == best


def test_one_setting_selects_nothing_and_trains_on_everything(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path
) -> None:
    records = probe(replace(CONFIG, lrs=(0.01,)), checkpoint, data, tmp_path / "one")
    assert records[0].config["selection"] == {"selected": "lr0.01_wd0.0005", "on": "nothing", "scores": {}}
    # The setting's heads are those that a grid would train, too.
    probe(replace(CONFIG, select_on="test", lrs=(0.01, 1e-6)), checkpoint, data, tmp_path / "grid")
    torch.testing.assert_close(head(tmp_path / "one"), head(tmp_path / "grid"), rtol=0, atol=1e-6)


def test_cached_views_are_the_fresh_views_of_the_first_epochs(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many views as epochs give the fresh ones' weights; fewer give others, with fewer passes."""
    fresh = probe(CONFIG, checkpoint, data, tmp_path / "fresh")
    as_many = probe(replace(CONFIG, views=4), checkpoint, data, tmp_path / "four")
    assert [r.metrics for r in as_many] == [r.metrics for r in fresh]
    assert torch.equal(head(tmp_path / "four"), head(tmp_path / "fresh"))
    passes: list[int] = []
    original = Features.of
    monkeypatch.setattr(
        Features, "of", lambda self, images, **k: passes.append(len(images)) or original(self, images, **k)
    )
    probe(replace(CONFIG, views=2), checkpoint, data, tmp_path / "two")
    assert not torch.equal(head(tmp_path / "two"), head(tmp_path / "fresh"))
    assert passes.count(len(data.train)) == 2
    passes.clear()
    probe(replace(CONFIG, augmentation="none"), checkpoint, data, tmp_path / "none")
    assert passes.count(len(data.train)) == 1


def test_logistic_regression_reaches_its_optimum_for_every_penalty(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path
) -> None:
    config = replace(CONFIG, solver="lbfgs", penalties=(1e-3, 10.0))
    (record,) = probe(config, checkpoint, data, tmp_path / "out")  # one trial: nothing is random
    net = network(checkpoint, 0).eval()
    net.fc = nn.Identity()
    plain = data.train.seen_through(val_transform(32, resize=32))
    with torch.no_grad():
        x = net(pixels(torch.stack([plain[i][0] for i in range(len(plain))]))).double()
    weight = head(tmp_path / "out").double()
    bias = read_checkpoint(tmp_path / "out/net/seed_0/checkpoint.pt").state_dict["fc.bias"].double()
    penalty = float(record.config["selection"]["selected"].removeprefix("penalty"))
    error = torch.softmax(x @ weight.T + bias, 1) - F.one_hot(torch.tensor(data.train.labels), 4)
    scale = x.square().mean()
    assert (error.T @ x / len(x) + penalty * scale * weight).abs().max() < 1e-4
    assert set(record.config["selection"]["scores"]) == {"penalty0.001", "penalty10"}


def test_images_as_they_are_reach_the_network(checkpoint: Checkpoint, data: TransferData, tmp_path: Path) -> None:
    config = replace(CONFIG, normalize=False, lrs=(0.01,), seeds=(0,), augmentation="none", epochs=1)
    probe(config, checkpoint, data, tmp_path / "out")
    trial = read_checkpoint(tmp_path / "out/net/seed_0/checkpoint.pt")
    assert (trial.spec.mean, trial.spec.std) == ((0, 0, 0), (1, 1, 1))


def test_robust_accuracy_is_that_of_the_whole_network(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At epsilon 0 it is the clean one, under attack that of PGD on the network that the probe leaves."""
    plain = probe(replace(CONFIG, lrs=(0.01,)), checkpoint, data, tmp_path / "plain")
    assert "robust_accuracy" not in plain[0].metrics
    config = replace(CONFIG, lrs=(0.01,), eval_threat_model=ThreatModel("L2", 0.0))
    for one, other in zip(probe(config, checkpoint, data, tmp_path / "zero"), plain, strict=True):
        assert one.metrics["robust_accuracy"] == one.metrics["clean_accuracy"] == other.metrics["clean_accuracy"]
    attack = AttackConfig(steps=3, relative_step_size=0.5)
    config = replace(CONFIG, lrs=(0.01,), eval_threat_model=ThreatModel("L2", 1.5), eval_attack=attack, eval_images=7)
    (record, _) = probe(config, checkpoint, data, tmp_path / "one")
    assert record.config["eval_threat_model"] == "L2:1.5"
    left = read_checkpoint(tmp_path / "one/net/seed_0/checkpoint.pt")
    model = NormalizedModel(left.build(), left.spec)
    drawn = data.test.seen_through(val_transform(32, resize=32)).sample(7, seed=CONFIG.data_seed)
    images = torch.stack([image for image, _ in (drawn[i] for i in range(7))]) / 255
    labels = torch.tensor(drawn.labels)
    adversarial = pgd(model, images, labels, ThreatModel("L2", 1.5), attack)
    right = (model(images).argmax(1) == labels) & (model(adversarial).argmax(1) == labels)
    assert record.metrics["robust_accuracy"] == pytest.approx(100 * right.double().mean().item())
    assert record.metrics["robust_accuracy"] < record.metrics["clean_accuracy"]


def test_more_outputs_than_classes(checkpoint: Checkpoint, data: TransferData, tmp_path: Path) -> None:
    probe(replace(CONFIG, num_outputs=57), checkpoint, data, tmp_path / "out")
    assert head(tmp_path / "out").shape == (57, 64)


def test_bfloat16_features_are_near(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "robust_backbones.classification.compute.computes_bfloat16", lambda: True
    )  # in software, where it must be
    for precision in ("fp32", "bf16"):
        probe(replace(CONFIG, precision=precision), checkpoint, data, tmp_path / precision)
    plain, half = head(tmp_path / "fp32"), head(tmp_path / "bf16")
    assert not torch.equal(plain, half)
    assert F.cosine_similarity(plain.flatten(), half.flatten(), dim=0) > 0.999


def test_a_diverging_setting_is_ruled_out(checkpoint: Checkpoint, data: TransferData, tmp_path: Path) -> None:
    records = probe(replace(CONFIG, lrs=(1e30, 0.001)), checkpoint, data, tmp_path / "one")
    assert records[0].config["selection"]["selected"] == "lr0.001_wd0.0005"
    assert records[0].config["selection"]["scores"]["lr1e+30_wd0.0005"] == [None, None]
    with pytest.raises(TrainingFailedError, match="lower learning rates"):
        probe(replace(CONFIG, lrs=(1e30, 1e31)), checkpoint, data, tmp_path / "both")
    with pytest.raises(TrainingFailedError, match="diverged for net"):
        probe(replace(CONFIG, lrs=(1e30,)), checkpoint, data, tmp_path / "only")


def test_unreadable_images_stop_the_probe_or_are_listed(checkpoint: Checkpoint, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes / "shapes_classification", tmp_path / "data")
    for part in ("train", "val"):
        path = min((tmp_path / "data" / part).rglob("*.jpg"))
        path.write_bytes(path.read_bytes()[:300])
    data = open_transfer_data(str(tmp_path / "data"), None)
    with pytest.raises(InputError, match=r"circle/00000\.jpg"):
        probe(CONFIG, checkpoint, data, tmp_path / "strict")
    probe(CONFIG, checkpoint, data, tmp_path / "out", skip_unreadable=True)
    skipped = json.loads((tmp_path / "out/skipped.json").read_text())
    assert {part: list(names) for part, names in skipped.items()} == {
        "train": ["circle/00000.jpg"],
        "test": ["circle/00000.jpg"],
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"solver": "adam"}, "sgd, lbfgs"),
        ({"augmentation": "mixup"}, "none"),
        ({"batch_norm": "frozen"}, "eval, train"),
        ({"precision": "fp16"}, "fp32, bf16"),
        ({"penalties": ()}, "penalties"),
        ({"penalties": (0.0,)}, "> 0"),
        ({"views": -1}, "views"),
        ({"epochs": 0}, "epochs"),
        ({"val_resize": 16}, "val_resize"),
        ({"min_crop_scale": 0.0}, "share"),
        ({"batch_norm": "train", "views": 2}, "fresh views"),
        ({"batch_norm": "train", "solver": "lbfgs"}, "sgd only"),
    ],
)
def test_what_is_no_probe_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 100}, "lower --batch-size"),
        ({"num_outputs": 3}, "4 classes"),
        ({"images_per_class": 1}, "held out"),
    ],
)
def test_nothing_is_written_for_what_cannot_be_probed(
    checkpoint: Checkpoint, data: TransferData, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        probe(replace(CONFIG, **wrong), checkpoint, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[int], TransferData]:
    """Makes a data set of single-colour classes with so many images in the last class."""

    def make(count: int) -> TransferData:
        for part, label in itertools.product(("train", "test"), range(3)):
            folder = tmp_path / "own" / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count if (part, label) == ("train", 2) else 8):
                colour = np.full((32, 32, 3), 80 * label + index, np.uint8)
                cv2.imwrite(str(folder / f"{index}.png"), colour)
        return open_transfer_data(str(tmp_path / "own"), None, metric="mean_per_class")

    return make


def test_a_class_of_one_image_trains_with_it(
    checkpoint: Checkpoint, folder_of: Callable[[int], TransferData], tmp_path: Path
) -> None:
    data = folder_of(1)
    kept, _ = split_held_out(data.train.labels, 0.2, 0)
    assert data.train.labels.index(2) in kept
    records = probe(CONFIG, checkpoint, data, tmp_path / "out")
    assert records[0].config["metric"] == "mean_per_class"
    assert all(0 <= (record.metrics["clean_accuracy"] or 0) <= 100 for record in records)
