"""Images that test and training share, against a comparison of every pair."""

import os
import random
import shutil
from pathlib import Path

import pytest

from robust_backbones.data.shared_images import first_shared, shared_images


@pytest.mark.parametrize("seed", range(3))
def test_a_test_image_is_shared_if_its_bytes_are_those_of_a_training_image(tmp_path: Path, seed: int) -> None:
    """Files of few sizes, about the ends of the blocks that are read, which differ late or not at all."""
    draw, folders = random.Random(seed), {}
    for part in ("test", "train"):
        folders[part] = tmp_path / part
        folders[part].mkdir()
        for number in range(60):
            content = bytearray(draw.choice((1, 4095, 4096, 4097, 69_632, 69_633, 1_200_000)))
            if draw.random() < 0.6:
                content[draw.choice((0, -1))] = draw.randrange(4)
            (folders[part] / f"{draw.randrange(1000):03}-{number}.jpg").write_bytes(content)
    test, train = ({str(path): path.read_bytes() for path in folders[part].iterdir()} for part in ("test", "train"))
    equal = {path: {other for other in train if train[other] == content} for path, content in test.items()}
    found = shared_images(test, train)
    assert list(found) == sorted(path for path, others in equal.items() if others)
    assert all(original in equal[path] for path, original in found.items())
    assert 0 < len(found) < len(test)


def test_links_are_found_and_files_that_are_no_images_are_not(tmp_path: Path) -> None:
    train, test = tmp_path / "train", tmp_path / "test"
    for folder in (train, test):
        folder.mkdir()
        (folder / "empty.jpg").touch()
        (folder / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (train / "a.jpg").write_bytes(b"a" * 5000)
    os.link(train / "a.jpg", test / "hard.jpg")
    (test / "soft.jpg").symlink_to(train / "a.jpg")
    shutil.copy(train / "a.jpg", test / "copy.jpg")
    paths = [[str(path) for path in folder.iterdir()] for folder in (test, train)]
    original, shared = str(train / "a.jpg"), shared_images(*paths)
    assert shared == {str(test / f"{name}.jpg"): original for name in ("copy", "hard", "soft")}
    assert first_shared(shared) == f"{test / 'copy.jpg'}, the same image as {original}"
    assert shared_images([original], paths[1]) == {original: original}
    assert shared_images(paths[0], []) == shared_images([], paths[1]) == {}
