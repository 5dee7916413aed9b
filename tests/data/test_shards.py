"""Shards against the tarfile and webdataset libraries, and against the same images in folders."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from robust_backbones.data.batches import train_batches
from robust_backbones.data.datasets import open_dataset
from robust_backbones.data.decoding import ResizedCache
from robust_backbones.data.shards import ShardImages, _members
from robust_backbones.data.transforms import train_transform, val_transform
from robust_backbones.errors import InputError

AUGMENT = train_transform(32, min_crop_scale=0.3)
TRANSFORM = val_transform(32, resize=32)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def noise(seed: int) -> bytes:
    image = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def pack(path: Path, members: list[tuple[str, bytes]], form: str = "ustar") -> Path:
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, label: int, extension: str = "jpg", seed: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.{extension}", noise(seed))]


THREE = [*sample("x/3", 0, seed=3), *sample("x/4", 1, "png", seed=4), *sample("x/5", 2, seed=5)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six samples of three classes in two shards, the second one sorting first."""
    root = tmp_path / "shards"
    root.mkdir()
    pack(root / "b.tar", THREE)
    members = [*sample("x/0", 2, "JPEG", seed=0), ("x/0.json", b"{}"), *sample("x/1", 1, "jpeg", seed=1)]
    label, image = sample("2", 0, seed=2)
    others = [("README", b"no sample"), ("__meta__.json", b"{}")]
    pack(root / "a.tar", [*others, *members, label, ("._2.jpg", b"what macOS adds"), image])
    return root


def test_samples_come_shard_by_shard(shards: Path) -> None:
    dataset = open_dataset(shards, v2.Identity())
    members = ["a.tar:x/0.JPEG", "a.tar:x/1.jpeg", "a.tar:2.jpg", "b.tar:x/3.jpg", "b.tar:x/4.png", "b.tar:x/5.jpg"]
    assert dataset.names == members
    assert dataset.labels == [2, 1, 0, 0, 1, 2]
    assert dataset.classes == ["0", "1", "2"]
    for index, (image, label) in enumerate(dataset):
        expected = cv2.imdecode(np.frombuffer(noise(index), np.uint8), cv2.IMREAD_COLOR_RGB)
        assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))
        assert label == dataset.labels[index]


def test_classes_may_have_names(shards: Path) -> None:
    (shards / "classes.txt").write_text("tench\ngoldfish\ngreat white shark\n")
    assert open_dataset(shards, TRANSFORM).classes == ["tench", "goldfish", "great white shark"]
    (shards / "classes.txt").write_bytes("\ufeffHünd\r\nb\r\nc\r\n".encode())  # as Windows writes it
    assert open_dataset(shards, TRANSFORM).classes == ["Hünd", "b", "c"]
    (shards / "classes.txt").write_bytes("Hünd\nb\nc\n".encode("latin1"))
    with pytest.raises(InputError, match="is no text in UTF-8"):
        open_dataset(shards, TRANSFORM)


def test_shards_and_folders_give_the_same_items(shards: Path, tmp_path: Path) -> None:
    """Alike to the bit, as items are known by index: augmentation, order, workers, a cache."""
    order = {0: [2, 3], 1: [1, 4], 2: [0, 5]}
    single = tmp_path / "single"
    single.mkdir()
    members = []
    for label, seeds in order.items():
        for seed in seeds:
            path = tmp_path / "folders" / str(label) / f"{seed}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(noise(seed))
            members += sample(f"{label}/{seed}", label, seed=seed)
    pack(single / "0.tar", members)

    def batches(root: Path, workers: int, cache: ResizedCache | None = None) -> tuple[torch.Tensor, list[int]]:
        dataset = open_dataset(root, AUGMENT, seed=1, cache=cache)
        loader = train_batches(dataset, batch_size=3, micro_batch_size=1, epoch=2, workers=workers)
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels).tolist()

    expected, labels = batches(tmp_path / "folders", 0)
    for workers in (0, 2):
        images, found = batches(single, workers)
        assert torch.equal(images, expected)
        assert found == labels
    reduced, _ = batches(single, 0, ResizedCache(tmp_path / "one", 32))
    assert torch.equal(batches(tmp_path / "folders", 0, ResizedCache(tmp_path / "two", 32))[0], reduced)
    assert torch.equal(batches(single, 2, ResizedCache(tmp_path / "one", 32))[0], reduced)


def test_shards_travel_to_other_processes(shards: Path) -> None:
    dataset = open_dataset(shards, AUGMENT)
    dataset[0]
    copied = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(copied, dataset, strict=True))


@pytest.mark.parametrize("form", FORMATS)
def test_names_longer_than_a_header_and_other_kinds_of_members(tmp_path: Path, form: str) -> None:
    path = tmp_path / "any.tar"
    long = "/".join(["folder" * 5] * 4) + "/name.jpg"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for kind, name in (
            (tarfile.DIRTYPE, "folder"),
            (tarfile.REGTYPE, long),
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.AREGTYPE, "old.jpg"),
            (tarfile.FIFOTYPE, "pipe.jpg"),
            (tarfile.REGTYPE, "last.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "x" * 90
            info.mtime = 0.5 if form == "pax" else 0  # pax writes a header of its own for half a second
            info.size = 700  # links may state the size of what they point at, and hold none of it
            tar.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert [name for name, _, _ in expected] == [long, "old.jpg", "last.jpg"]
    with open(path, "rb") as file:
        assert list(_members(file, path)) == expected


def test_shards_of_the_webdataset_library_are_read_as_it_reads_them(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    written = [
        {"__key__": key, extension: noise(index), "cls": index % 3, "json": {"i": index}}
        for index, (key, extension) in enumerate(
            [("n01/a_1", "jpg"), ("n01/b", "jpeg"), ("c", "png"), ("d.e/f", "jpg"), ("g" * 90, "JPEG"), ("h/i", "jpg")]
        )
    ]
    with wds.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for row in written:
            writer.write(row)
    source = ShardImages.scan(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert len(urls) == 2
    theirs = list(wds.WebDataset(urls, shardshuffle=False))
    assert [row["__key__"] for row in theirs] == [row["__key__"] for row in written]
    for index, row in enumerate(theirs):
        extension = next(name for name in ("jpg", "jpeg", "png") if name in row)
        assert source.names[index].lower() == f"{Path(row['__url__']).name}:{row['__key__']}.{extension}"
        assert source.labels[index] == int(row["cls"])
        assert source.read(index) == row[extension]
    assert len(source.names) == len(theirs)


@pytest.mark.parametrize("keys", [["a.b/c.d", "e"], [".hidden", "x"], ["x/.y", "__z__", "w"], ["a", "a.b", "c"]])
def test_members_are_grouped_as_the_webdataset_library_groups_them(tmp_path: Path, keys: list[str]) -> None:
    wds = pytest.importorskip("webdataset")
    pack(tmp_path / "0.tar", [member for key in keys for member in sample(key, 0)])
    theirs = [
        row for row in wds.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False) if {"jpg", "cls"} <= row.keys()
    ]
    assert ShardImages.scan(tmp_path).names == [f"0.tar:{row['__key__']}.jpg" for row in theirs]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "hold no sample"),
        ([("README.md", b""), ("a.txt", b"")], "hold no sample"),
        ([("a.jpg", b"")], r"sample a of .*/0\.tar has 1 image and 0 labels: it needs a\.jpg"),
        ([("a.cls", b"0")], "sample a of .* has 0 images and 1 label:"),
        ([*sample("a", 0), ("a.png", b"")], "sample a of .* has 2 images and 1 label:"),
        ([("a.jpg", b""), ("b.cls", b"0"), ("a.cls", b"0")], "sample a of .* side by side"),
        ([("a.jpg", b""), ("a.cls", b"cat")], r"a\.cls of .* is not a class number"),
        ([("a.jpg", b""), ("a.cls", b"-1")], r"a\.cls of .* is not a class number"),
        ([("a.jpg", b""), ("a.cls", b"")], r"a\.cls of .* is not a class number"),
        ([("a.jpg", b""), ("a.cls", b"1" * 5000)], r"a\.cls of .* is not a class number"),
        ([*sample("a", 0), *sample("b", 2)], "no sample of class 1, of 3"),
        (sample("a", 999_999_999), "no sample of class 0, of 1000000000"),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    pack(tmp_path / "0.tar", members)
    with pytest.raises(InputError, match=message):
        open_dataset(tmp_path, TRANSFORM)


def test_labels_and_class_names_must_belong_together(shards: Path) -> None:
    (shards / "classes.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"label of a\.tar:x/0\.JPEG is beyond the 2 classes in .*classes\.txt"):
        open_dataset(shards, TRANSFORM)
    (shards / "classes.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(InputError, match="no sample of class 3, of 4"):
        open_dataset(shards, TRANSFORM)


def test_a_compressed_shard_is_refused(shards: Path) -> None:
    (shards / "b.tar").write_bytes(gzip.compress((shards / "b.tar").read_bytes()))
    with pytest.raises(InputError, match=r"b\.tar is compressed"):
        open_dataset(shards, TRANSFORM)


def test_shards_that_were_put_together_byte_by_byte_are_refused(shards: Path) -> None:
    """Tar sees the first alone."""
    (shards / "b.tar").write_bytes((shards / "b.tar").read_bytes() + (shards / "a.tar").read_bytes())
    with pytest.raises(InputError, match=r"b\.tar is damaged or several archives in one"):
        open_dataset(shards, TRANSFORM)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path: Path, share: float) -> None:
    """Also between two members, where the tarfile module sees nothing amiss."""
    path = pack(tmp_path / "0.tar", THREE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole.rstrip(b"\0")))])
    with pytest.raises(InputError, match=r"0\.tar is damaged"):
        open_dataset(tmp_path, TRANSFORM)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(member=st.integers(0, 5), byte=st.integers(0, 511), change=st.integers(1, 255))
def test_a_damaged_header_is_refused(tmp_path: Path, member: int, byte: int, change: int) -> None:
    """The tarfile module would pass silently over all that follows one."""
    assume(not 148 <= byte < 156)  # the checksum's own digits, which may be written in several ways
    path = pack(tmp_path / "0.tar", THREE)
    with tarfile.open(path) as tar:
        position = tar.getmembers()[member].offset + byte
    damaged = bytearray(path.read_bytes())
    damaged[position] = (damaged[position] + change) % 256
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"0\.tar is (damaged|compressed)"):
        open_dataset(tmp_path, TRANSFORM)


def test_a_shard_cut_off_after_it_was_indexed_gives_unreadable_images(shards: Path) -> None:
    dataset = open_dataset(shards, TRANSFORM)
    (shards / "b.tar").write_bytes((shards / "b.tar").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cannot read the image b\.tar:x/5\.jpg"):
        dataset[5]
