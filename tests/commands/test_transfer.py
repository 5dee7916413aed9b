"""tools/transfer.py: both modes end to end, their tables, and folders of images of every kind."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robust_backbones.checkpoint.format import write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.data.transfer_datasets import TRANSFER_DATASETS
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.commands.test_cli import Run, assert_refused
from tests.conftest import negatives
from tests.hub import FakeHub, hub_fixture, robustness_file  # noqa: F401
from tests.transfer.conftest import narrow_resnet18  # noqa: F401

pytestmark = pytest.mark.usefixtures("narrow_resnet18")
SMALL = ["--batch-size", "8", "--image-size", "32", "--val-resize", "32", "--device", "cpu", "--workers", "0"]
PROBE = [*SMALL, "--epochs", "1"]
FINETUNE = [*SMALL, "--epochs", "1", "--no-tensorboard"]
HEADS = ["data set", "mode", "backbone", "trained at", "accuracy", "trials", "min to max", "std", "robust acc"]


@pytest.fixture(scope="module")
def backbones(narrow_resnet18: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:  # noqa: F811
    """Two checkpoints of one file name, in folders of their own."""
    root = tmp_path_factory.mktemp("backbones")
    paths = []
    for seed, (name, threat_model) in enumerate({"standard": ThreatModel(), "robust": ThreatModel("L2", 3)}.items()):
        spec = BackboneSpec("resnet18", 10)
        weights = build_backbone(spec, seed=seed).state_dict()
        paths.append(root / name / "checkpoint.pt")
        write_checkpoint(paths[-1], spec=spec, state_dict=weights, threat_model=threat_model)
    return paths


@pytest.fixture(scope="module")
def folder(shapes: Path) -> Path:
    return shapes / "shapes_classification"


def cells(table: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by column."""
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
    assert heads[: len(HEADS)] == HEADS
    return [dict(zip(heads, row, strict=True)) for row in rows]


def printed_table(out: str) -> str:
    return "\n".join(line for line in out.splitlines() if line.startswith("|"))


def photograph(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 48)) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size, dtype=np.uint16))
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def of_own(root: Path, *, train: dict[str, int], test: dict[str, int]) -> Path:
    """A folder with so many images a class."""
    for part, classes in (("train", train), ("test", test)):
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                photograph(index).save(root / part / name / f"{index}.png")
    return root


# --- what there is ---------------------------------------------------------------------------------------------------


def test_all_twelve_data_sets_are_listed_with_what_is_missing(run_tool: Run, tmp_path: Path) -> None:
    of_own(tmp_path / "dtd", train={"banded": 1}, test={"banded": 1})
    status, out, err = run_tool("transfer", "datasets", "--data-root", tmp_path)
    assert (status, err) == (0, "")
    heads = [line.split() for line in out.splitlines() if not line.startswith(" ")]
    assert [head[0] for head in heads[:-1]] == list(TRANSFER_DATASETS)
    assert len(heads) == 13
    assert {head[0]: head[1] for head in heads[:-1]} == {
        **dict.fromkeys(TRANSFER_DATASETS, "missing"),
        "dtd": "differs",
    }
    assert out.count("get it from") == 11
    assert "1 class instead of 47" in out
    assert out.splitlines()[-1] == f"0 of 12 data sets are in {tmp_path}"


def test_a_data_root_that_is_not_there_is_refused(run_tool: Run, tmp_path: Path) -> None:
    assert_refused(run_tool("transfer", "datasets", "--data-root", tmp_path / "none"), str(tmp_path / "none"))


# --- both modes ------------------------------------------------------------------------------------------------------


def test_both_modes_and_one_table_of_them(run_tool: Run, backbones: list[Path], folder: Path, tmp_path: Path) -> None:
    outputs = {"linear_probe": tmp_path / "probe", "full_network": tmp_path / "finetune"}
    for name, options, (mode, output) in zip(
        ("probe", "finetune"),
        ([*PROBE, "--lrs", "0.1", "0.01"], [*FINETUNE, "--lrs", "0.01"]),
        outputs.items(),
        strict=True,
    ):
        status, out, _ = run_tool("transfer", name, folder, *backbones, "--output", output, "--seeds", 0, 3, *options)
        assert status == 0
        assert out.splitlines()[-1] == f"records and networks written to {output}"
        found = {row["backbone"]: row for row in cells(printed_table(out))}
        assert found.keys() == {"standard", "robust"}
        for label, row in found.items():
            records = [RunRecord.read(output / label / f"seed_{seed}/record.json") for seed in (0, 3)]
            assert [record.seed for record in records] == [0, 3]
            first, second = sorted(record.metrics["clean_accuracy"] or 0.0 for record in records)
            assert row["data set"] == "shapes_classification (top1)"
            assert row["mode"] == mode
            assert row["trained at"] == {"standard": "L2:0", "robust": "L2:3"}[label]
            assert row["trials"] == "2"
            assert row["accuracy"] == f"{(first + second) / 2:.1f}"
            assert row["min to max"] == f"{first:.1f} to {second:.1f}"
            assert row["selected on"] == ("held_out" if name == "probe" else "nothing")
    # What is left can be read as any other backbone.
    assert read_checkpoint(tmp_path / "probe/robust/seed_3/checkpoint.pt").spec.num_classes == 4
    network = read_checkpoint(tmp_path / "finetune/robust/runs/lr0.01_wd0.0005_test_seed3/checkpoint.pt")
    assert network.spec.num_classes == 4

    file = tmp_path / "tables/shapes.md"
    status, out, _ = run_tool("transfer", "table", *outputs.values(), "--output", file)
    assert (status, out) == (0, f"table written to {file}\n")
    rows = cells(file.read_text())
    assert [(row["mode"], row["backbone"]) for row in rows] == [
        (mode, label) for mode in ("full_network", "linear_probe") for label in ("robust", "standard")
    ]
    status, out, _ = run_tool("transfer", "table", *outputs.values())
    assert (status, out) == (0, file.read_text())

    # The same command again finds all done; another one does not touch what is there.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "finetune").rglob("checkpoint.pt")}
    arguments = ["finetune", folder, *backbones, "--output", tmp_path / "finetune", "--seeds", 0, 3, *FINETUNE]
    status, out, _ = run_tool("transfer", *arguments, "--lrs", "0.01")
    assert status == 0
    assert cells(printed_table(out)) == rows[:2]
    assert_refused(run_tool("transfer", *arguments, "--lrs", "0.1"), "holds another run (lrs is ")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_published_backbone_goes_by_its_name(
    run_tool: Run,
    hub: FakeHub,
    folder: Path,
    tmp_path: Path,
) -> None:
    hub.files["resnet18_l2_eps3.ckpt"] = robustness_file(build_backbone(BackboneSpec("resnet18", 1000)))
    arguments = ["hub:resnet18_l2_eps3", "--output", tmp_path / "run", "--solver", "lbfgs", "--penalties", "0.01"]
    status, out, _ = run_tool("transfer", "probe", folder, *arguments, *SMALL)
    assert status == 0
    (row,) = cells(printed_table(out))
    assert (row["backbone"], row["trained at"]) == ("resnet18_l2_eps3", "L2:3")
    assert (tmp_path / "run/resnet18_l2_eps3/seed_0/record.json").exists()


def test_test_images_select_where_that_is_asked_for(
    run_tool: Run, backbones: list[Path], folder: Path, tmp_path: Path
) -> None:
    options = ["--lrs", "0.01", "0.001", "--seeds", "0", "--select-on", "test", "--num-outputs", "57", "--freeze", "4"]
    arguments = [folder, backbones[0], "--output", tmp_path / "run", *options, *FINETUNE]
    status, out, _ = run_tool("transfer", "finetune", *arguments)
    assert status == 0
    (row,) = cells(printed_table(out))
    assert row["selected on"] == "test"
    assert row["otherwise"] == "57 outputs, first 4 groups frozen"


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_images_of_less_detail_are_another_experiment(
    run_tool: Run, backbones: list[Path], folder: Path, tmp_path: Path, mode: str
) -> None:
    defaults = PROBE if mode == "probe" else FINETUNE
    arguments = ["transfer", mode, folder, backbones[0], "--seeds", 0, "--lrs", 0.1, *defaults]
    weights = {}
    for downscale in (0, 4):
        output = tmp_path / str(downscale)
        status, out, _ = run_tool(*arguments, "--output", output, "--downscale", downscale)
        assert status == 0
        record = RunRecord.read(output / "standard/seed_0/record.json")
        held = json.loads((output / "config.json").read_text())
        (row,) = cells(printed_table(out))
        assert record.config["downscale"] == held["downscale"] == downscale
        assert row["otherwise"] == ("images reduced to 4 px" if downscale else "-")
        weights[downscale] = learnt(output, mode)
    assert not torch.equal(*weights.values())
    assert_refused(
        run_tool(*arguments, "--output", tmp_path / "0", "--downscale", 4), "downscale is 0 there and 4 here"
    )
    assert_refused(run_tool(*arguments, "--output", tmp_path / "new", "--downscale", -1), "downscale must be >= 0")
    arguments[2] = negatives(folder, tmp_path / "other")
    assert_refused(run_tool(*arguments, "--output", tmp_path / "0", "--downscale", 0), "data_fingerprint.test is")


def learnt(output: Path, mode: str) -> torch.Tensor:
    """The weights of the new classifier, which learnt from what images were shown."""
    path = "seed_0" if mode == "probe" else "runs/lr0.1_wd0.0005_test_seed0"
    return read_checkpoint(output / "standard" / path / "checkpoint.pt").state_dict["fc.weight"]


def test_a_grid_that_diverges_ends_with_status_1(
    run_tool: Run, backbones: list[Path], folder: Path, tmp_path: Path
) -> None:
    arguments = ["--output", tmp_path / "run", "--seeds", "0", "--lrs", "1e6", "1e7", *FINETUNE]
    status, _, err = run_tool("transfer", "finetune", folder, backbones[0], *arguments)
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith("error: every setting of the grid diverged")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_bad_input_is_one_sentence_and_nothing_is_written(
    run_tool: Run, backbones: list[Path], folder: Path, tmp_path: Path, mode: str
) -> None:
    standard, output = backbones[0], tmp_path / "output"
    twin = tmp_path / "copies/standard/best.pt"
    twin.parent.mkdir(parents=True)
    shutil.copy(standard, twin)

    def run(*arguments: object) -> tuple[int, str, str]:
        defaults = PROBE if mode == "probe" else FINETUNE
        return run_tool("transfer", mode, "--output", output, *defaults, *arguments)

    assert_refused(run(folder), "one or more backbones")
    assert_refused(run(folder, standard, twin), "two checkpoints would be called standard")
    assert_refused(run(folder, standard, standard), "two checkpoints would be called standard")
    assert_refused(run("flower", standard), "no data set or folder flower", "flowers", "sun397")
    assert_refused(run("flowers", standard), "--data-root")
    assert_refused(run("flowers", standard, "--data-root", tmp_path), "Flowers", "get it from")
    assert_refused(run(folder, tmp_path / "none.pt"), "none.pt")
    assert_refused(run(folder, "hub:resnet9"), "resnet9", "nearest names")
    assert_refused(run(folder, standard, "--num-outputs", 3), "4 classes, more than 3 outputs")
    assert_refused(run(folder, standard, "--batch-size", 33), "lower --batch-size")
    assert_refused(run(folder, standard, "--lrs", 0), "learning rate")
    assert_refused(run(folder, standard, "--checkpoint-minutes", -1), "checkpoint_minutes must be >= 0")
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "inheritance"}, "is of task inheritance, no transfer"),
        ({"config": {}}, "cannot be put into a table"),
        ({"metrics": {"clean_accuracy": "93"}}, "is not a run record (metrics)"),
    ],
)
def test_a_table_of_a_broken_record_names_it(run_tool: Run, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values = {"run_id": "r", "task": "transfer", "backbone": {}, "threat_model": None, "dataset": "d", "seconds": 1.0}
    values |= {"metrics": {}, "seed": 0, "config": {}, **change}
    (tmp_path / "net/seed_0").mkdir(parents=True)
    (tmp_path / "net/seed_0/record.json").write_text(json.dumps(values))
    result = run_tool("transfer", "table", tmp_path)
    assert_refused(result, str(tmp_path / "net/seed_0"), words)


def test_a_table_of_nothing_is_refused(run_tool: Run, tmp_path: Path) -> None:
    result = run_tool("transfer", "table", tmp_path, "--output", tmp_path / "table.md")
    assert_refused(result, f"no finished trial in {tmp_path}")
    assert not (tmp_path / "table.md").exists()


# --- a folder of one's own -------------------------------------------------------------------------------------------


def test_images_of_every_kind_are_read(run_tool: Run, backbones: list[Path], tmp_path: Path) -> None:
    """Gray and CMYK JPEGs, 16 bits, palettes, transparency, a rotation tag, sizes from one pixel on."""
    data = of_own(tmp_path / "data", train={"a": 4, "b": 4}, test={"a": 2, "b": 2})
    for part in ("train", "test"):
        place = data / part / "a"
        photograph(1, "L").save(place / "gray.jpg")
        photograph(2, "CMYK").save(place / "cmyk.jpg")
        photograph(3, "I;16").save(place / "deep.png")
        photograph(4, "P").save(place / "palette.png")
        photograph(5, "RGBA").save(place / "transparent.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        photograph(6).save(place / "rotated.jpg", exif=exif)
        photograph(7, size=(1, 1)).save(place / "pixel.png")
        photograph(8, size=(9, 300)).save(place / "wide.JPEG")
    for mode, options in (("probe", PROBE), ("finetune", FINETUNE)):
        arguments = [data, backbones[0], "--output", tmp_path / mode, "--seeds", 0, "--lrs", 0.01, *options]
        status, out, err = run_tool("transfer", mode, *arguments)
        assert status == 0, err
        assert cells(printed_table(out))[0]["data set"] == "data (top1)"


@pytest.mark.parametrize("mode", ["probe", "finetune"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_truncated_image_is_named_or_left_out(
    run_tool: Run, backbones: list[Path], tmp_path: Path, mode: str, part: str
) -> None:
    data = of_own(tmp_path / "data", train={"a": 5, "b": 5}, test={"a": 2, "b": 2})
    victim = data / part / "b/cut.jpg"
    photograph(0).save(victim)
    victim.write_bytes(victim.read_bytes()[:400])
    options = ["--seeds", 0, "--lrs", 0.01, *(PROBE if mode == "probe" else FINETUNE)]
    assert_refused(
        run_tool("transfer", mode, data, backbones[0], "--output", tmp_path / "stopped", *options),
        "cannot read the image b/cut.jpg (",
        "--skip-unreadable",
    )
    arguments = [data, backbones[0], "--output", tmp_path / "run", "--skip-unreadable", *options]
    status, _, err = run_tool("transfer", mode, *arguments)
    assert status == 0, err
    skipped = json.loads((tmp_path / "run/skipped.json").read_text())
    assert {name: list(found) for name, found in skipped.items()} == {"train": [], "test": [], part: ["b/cut.jpg"]}


@pytest.mark.parametrize("mode", ["probe", "finetune"])
def test_a_class_of_one_image_keeps_it_for_training(
    run_tool: Run, backbones: list[Path], tmp_path: Path, mode: str
) -> None:
    data = of_own(tmp_path / "data", train={"a": 9, "b": 1}, test={"a": 1, "b": 1})
    options = ["--seeds", 0, "--held-out", 0.1, *(PROBE if mode == "probe" else FINETUNE)]
    grid = ["--lrs", 0.01, 0.001]
    status, out, err = run_tool("transfer", mode, data, backbones[0], "--output", tmp_path / "run", *options, *grid)
    assert status == 0, err
    assert cells(printed_table(out))[0]["selected on"] == "held_out"

    alone = of_own(tmp_path / "alone", train=dict.fromkeys("abcdefgh", 1), test=dict.fromkeys("abcdefgh", 1))
    arguments = [alone, backbones[0], "--output", tmp_path / "alone_run", *options]
    result = run_tool("transfer", mode, *arguments, *grid)
    assert_refused(result, "one training image a class", "give one setting, or --select-on test")
    assert not (tmp_path / "alone_run").exists()
    assert run_tool("transfer", mode, *arguments, "--lrs", 0.01)[0] == 0


def test_a_class_without_test_images_is_named(run_tool: Run, backbones: list[Path], tmp_path: Path) -> None:
    data = of_own(tmp_path / "data", train={"a": 5, "b": 5}, test={"a": 2})
    result = run_tool("transfer", "probe", data, backbones[0], "--output", tmp_path / "run", *PROBE)
    assert_refused(result, "class b of ", "no image in its test part")


def write_shard(root: Path, labels: list[int]) -> None:
    root.mkdir(parents=True)
    with tarfile.open(root / "0000.tar", "w") as archive:
        for index, label in enumerate(labels):
            file = io.BytesIO()
            photograph(index).save(file, "JPEG")
            for extension, content in (("jpg", file.getvalue()), ("cls", f"{label}".encode())):
                member = tarfile.TarInfo(f"{index:04d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (root / "classes.txt").write_text("cat\ndog\n")


def test_shards_are_data_and_a_label_beyond_their_classes_is_named(
    run_tool: Run, backbones: list[Path], tmp_path: Path
) -> None:
    write_shard(tmp_path / "data/train", [0, 1] * 5)
    write_shard(tmp_path / "data/test", [0, 1])

    def finetune(name: str) -> tuple[int, str, str]:
        output = tmp_path / f"{name}_run"
        options = ["--output", output, "--seeds", 0, "--lrs", 0.01, *FINETUNE]
        return run_tool("transfer", "finetune", tmp_path / name, backbones[0], *options)

    assert finetune("data")[0] == 0
    write_shard(tmp_path / "wrong/train", [0, 1] * 5)
    write_shard(tmp_path / "wrong/test", [0, 1, 2])
    assert_refused(finetune("wrong"), "the label of 0000.tar:0002.jpg is beyond the 2 classes")
    assert not (tmp_path / "wrong_run").exists()
