"""Epochs as batches: every process and every starting point sees its part of one and the same order."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from robust_backbones.data.batches import steps_per_epoch, train_batches, val_batches
from robust_backbones.data.datasets import ClassificationDataset, open_dataset
from robust_backbones.data.images import ImageFiles
from robust_backbones.data.transforms import train_transform, val_transform
from robust_backbones.errors import InputError

AUGMENT = train_transform(32, min_crop_scale=0.3)
TRANSFORM = val_transform(32, resize=32)


def listing(images: int, seed: int = 0) -> ClassificationDataset:
    """A data set of which only the length matters: nothing is read."""
    names = [f"a/{index}.jpg" for index in range(images)]
    return ClassificationDataset(ImageFiles(Path("none"), ["a"], [0] * images, names), TRANSFORM, seed=seed)


def indices(loader: DataLoader) -> list[list[int]]:
    return list(loader.batch_sampler)


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def contents(loader: DataLoader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@given(
    images=st.integers(0, 200),
    micro=st.integers(1, 5),
    accumulated=st.integers(1, 4),
    world=st.integers(1, 4),
    epoch=st.integers(0, 100),
    data=st.data(),
)
def test_all_ranks_together_see_the_steps_of_one_process(
    images: int, micro: int, accumulated: int, world: int, epoch: int, data: st.DataObject
) -> None:
    batch_size = micro * accumulated * world
    steps = images // batch_size
    first_step = data.draw(st.integers(0, steps))
    dataset = listing(images)
    assert steps_per_epoch(dataset, batch_size) == steps
    alone = indices(train_batches(dataset, batch_size=batch_size, micro_batch_size=batch_size, epoch=epoch, workers=0))
    assert [len(step) for step in alone] == [batch_size] * steps
    assert max(Counter(flat(alone)).values(), default=1) == 1
    assert set(flat(alone)) <= set(range(images))
    ranks = [
        indices(
            train_batches(
                dataset,
                batch_size=batch_size,
                micro_batch_size=micro,
                epoch=epoch,
                first_step=first_step,
                rank=rank,
                world_size=world,
                workers=0,
            )
        )
        for rank in range(world)
    ]
    assert all(len(batches) == (steps - first_step) * accumulated for batches in ranks)
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    for step in range(steps - first_step):
        part = slice(step * accumulated, (step + 1) * accumulated)
        assert flat([index for batches in ranks for index in [flat(batches[part])]]) == alone[first_step + step]


@given(images=st.integers(0, 60), batch_size=st.integers(1, 9), world=st.integers(1, 7))
def test_validation_images_come_once_and_in_order_over_all_ranks(images: int, batch_size: int, world: int) -> None:
    ranks = [
        indices(val_batches(listing(images), batch_size, rank=rank, world_size=world, workers=0))
        for rank in range(world)
    ]
    assert flat([flat(batches) for batches in ranks]) == list(range(images))
    assert all(0 < len(batch) <= batch_size for batches in ranks for batch in batches)
    counts = [len(flat(batches)) for batches in ranks]
    assert max(counts) - min(counts) <= 1


@given(seed=st.integers(0, 1000), epoch=st.integers(0, 1000), other=st.integers(0, 1000))
def test_the_order_depends_on_seed_and_epoch(seed: int, epoch: int, other: int) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        dataset = listing(100, seed)
        return flat(indices(train_batches(dataset, batch_size=100, micro_batch_size=100, epoch=epoch, workers=0)))

    assume(epoch != other)
    assert order(seed, epoch) == order(seed, epoch)
    assert order(seed, epoch) != order(seed, other)
    assert order(seed, epoch) != order(seed + 1, epoch)


def test_every_image_comes_first_equally_often() -> None:
    """Over 2,000 epochs of 10 images, chi-square of the first image's index against the uniform distribution."""
    firsts = Counter(
        indices(train_batches(listing(10), batch_size=1, micro_batch_size=1, epoch=epoch, workers=0))[0][0]
        for epoch in range(2000)
    )
    assert sum((firsts[index] - 200) ** 2 / 200 for index in range(10)) < 27.9  # 0.1 % of chance at 9 degrees


@pytest.mark.parametrize(("batch_size", "micro", "world"), [(32, 32, 3), (32, 5, 1), (32, 16, 4)])
def test_batches_that_do_not_split_are_refused_with_the_numbers(batch_size: int, micro: int, world: int) -> None:
    with pytest.raises(InputError, match=f"batch of {batch_size} images .* of {micro} on {world} .* {world * micro}$"):
        train_batches(listing(100), batch_size=batch_size, micro_batch_size=micro, epoch=0, world_size=world, workers=0)


@pytest.mark.parametrize("first_step", [-1, 4])
def test_a_step_beyond_the_epoch_is_refused(first_step: int) -> None:
    with pytest.raises(InputError, match=f"step {first_step} of 3"):
        train_batches(listing(31), batch_size=10, micro_batch_size=10, epoch=0, first_step=first_step, workers=0)


def test_delivered_images_depend_on_seed_and_epoch_alone(shapes: Path) -> None:
    """Not on workers, micro-batches, the place to start from, or loaders made for other epochs."""
    root = shapes / "shapes_classification/train"
    dataset = open_dataset(root, AUGMENT)

    def loader(epoch: int = 0, micro: int = 8, first_step: int = 0, workers: int = 0) -> DataLoader:
        return train_batches(
            dataset, batch_size=8, micro_batch_size=micro, epoch=epoch, first_step=first_step, workers=workers
        )

    early = loader()
    images, labels = contents(loader(epoch=1))
    first, first_labels = contents(early)
    assert first.shape == (32, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert not torch.equal(first, images)
    for other in (loader(workers=2), loader(micro=4, workers=2)):
        images, labels = contents(other)
        assert torch.equal(images, first)
        assert torch.equal(labels, first_labels)
    images, labels = contents(loader(first_step=2, micro=2))
    assert torch.equal(images, first[16:])
    assert torch.equal(labels, first_labels[16:])
    assert dataset.epoch == 0


def test_earlier_images_are_not_loaded(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = ClassificationDataset.load
    monkeypatch.setattr(
        ClassificationDataset, "load", lambda self, position: loaded.append(position) or load(self, position)
    )
    dataset = open_dataset(shapes / "shapes_classification/train", AUGMENT)
    batches = train_batches(dataset, batch_size=8, micro_batch_size=4, epoch=0, first_step=3, workers=0)
    assert len(list(batches)) == 2
    assert loaded == flat(indices(batches))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_is_left_alone(shapes: Path, workers: int) -> None:
    dataset = open_dataset(shapes / "shapes_classification/val", AUGMENT)
    state = torch.get_rng_state()
    for loader in (
        train_batches(dataset, batch_size=4, micro_batch_size=4, epoch=0, workers=workers),
        val_batches(dataset, 4, workers=workers),
    ):
        assert len(list(loader)) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_validation_images_are_the_items_in_order(shapes: Path) -> None:
    dataset = open_dataset(shapes / "shapes_classification/val", TRANSFORM)
    images, labels = contents(val_batches(dataset, 3, workers=2))
    assert torch.equal(images, torch.stack([image for image, _ in dataset]))
    assert labels.tolist() == dataset.labels


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_with_one_sentence(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(InputError) as error:
        next(iter(val_batches(open_dataset(tmp_path, TRANSFORM), 1, workers=workers)))
    assert str(error.value) == (
        "cannot read the image a/broken.jpg (not in a known image format): repair or remove it, "
        "or give --skip-unreadable, which pretrain and transfer have"
    )


@pytest.mark.parametrize("batch_size", [3, 7, 12])
def test_with_the_last_batch_an_epoch_is_every_image_once(shapes: Path, batch_size: int) -> None:
    """And its whole batches are those of an epoch without."""
    dataset = open_dataset(shapes / "shapes_classification/train", train_transform(8, min_crop_scale=1))
    numbers = [
        [
            list(batch)
            for batch in train_batches(
                dataset, batch_size=batch_size, micro_batch_size=batch_size, epoch=2, workers=0, keep_last=keep
            ).batch_sampler
        ]
        for keep in (False, True)
    ]
    assert sorted(number for batch in numbers[1] for number in batch) == list(range(len(dataset)))
    assert numbers[1][: len(numbers[0])] == numbers[0]
    for keep, batches in enumerate(numbers):
        assert len(batches) == steps_per_epoch(dataset, batch_size, keep_last=bool(keep))
