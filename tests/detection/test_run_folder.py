"""A run's folder is its own: another configuration, or a run that is there already, is refused."""

from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode

from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.run_folder import check_folder, keep_other_record, set_up, write_record
from robust_backbones.errors import InputError


@pytest.fixture
def cfg(small_cfg: CfgNode, tmp_path: Path) -> CfgNode:
    small_cfg.OUTPUT_DIR = str(tmp_path / "run")
    return small_cfg


def begin(cfg: CfgNode) -> CfgNode:
    """As far as a run is after its first iterations."""
    cfg = set_up(cfg, training=True)
    (Path(cfg.OUTPUT_DIR) / "metrics.json").touch()
    return cfg


def test_a_folder_is_for_one_run(cfg: CfgNode) -> None:
    assert not check_folder(cfg, resume=False)
    assert not check_folder(cfg, resume=True)  # there is nothing to resume yet
    begin(cfg)
    with pytest.raises(InputError, match="--resume"):
        check_folder(cfg, resume=False)
    assert not check_folder(cfg, resume=True)
    (Path(cfg.OUTPUT_DIR) / "record.json").touch()
    assert check_folder(cfg, resume=True)


@pytest.mark.parametrize(
    ("key", "value"), [("SOLVER.BASE_LR", 0.5), ("MODEL.WEIGHTS", "other.pkl"), ("DATASETS.TRAIN", ("a", "b"))]
)
@pytest.mark.parametrize("resume", [True, False])
def test_another_configuration_is_refused_by_its_keys(cfg: CfgNode, key: str, value: object, resume: bool) -> None:
    begin(cfg)
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=f"another run .{key} is .* there and .* here"):
        check_folder(cfg, resume=resume)


def test_what_changes_no_result_may_change(cfg: CfgNode) -> None:
    """A study's folder may be another too, as on the machine that it is unpacked on."""
    cfg.MODEL.WEIGHTS = "old/runs/convert-robust-0123456789/backbone.pkl"
    begin(cfg)
    cfg.MODEL.WEIGHTS = "/new/study/runs/convert-robust-0123456789/backbone.pkl"
    cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", 7, "TEST.REFERENCE_EVAL", True])
    cfg.DATALOADER.NUM_WORKERS += 1
    assert not check_folder(cfg, resume=True)


def test_a_run_of_a_version_that_knew_less_goes_on(cfg: CfgNode) -> None:
    begin(cfg)
    path = Path(cfg.OUTPUT_DIR) / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content["ADVERSARIAL"], content["SOLVER"]["EMA_DECAY"]
    path.write_text(yaml.safe_dump(content))
    assert not check_folder(cfg, resume=True)
    cfg.SOLVER.EMA_DECAY = 0.5
    with pytest.raises(InputError, match=r"SOLVER\.EMA_DECAY is 0\.0 there and 0\.5 here"):
        check_folder(cfg, resume=True)


def test_a_run_that_never_began_leaves_its_folder_to_another(cfg: CfgNode) -> None:
    """As one whose model could not be built: it left its configuration and its log."""
    set_up(cfg, training=True)
    cfg.SOLVER.BASE_LR = 0.5
    assert not check_folder(cfg, resume=False)
    set_up(cfg, training=True)
    assert yaml.safe_load((Path(cfg.OUTPUT_DIR) / "config.yaml").read_text())["SOLVER"]["BASE_LR"] == 0.5


@pytest.mark.parametrize("is_coco", [True, False])
def test_annotations_that_have_changed_make_another_run(cfg: CfgNode, tmp_path: Path, is_coco: bool) -> None:
    """Under the same name and path; a folder of before they were noted may be of any."""
    listed, annotated = tmp_path / "ImageSets/Main/train.txt", tmp_path / "Annotations/1.xml"
    for path, text in {listed: "1\n", annotated: "<annotation/>", tmp_path / "train.json": "{}"}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
    if is_coco:
        cfg.DATASETS.COCO_FORMAT = (("mine", str(tmp_path / "train.json"), str(tmp_path)),)
    else:
        cfg.DATASETS.VOC_FORMAT = (("mine", str(tmp_path), "train", ("cat",)),)
    register_datasets(cfg)
    assert not check_folder(cfg, resume=True)
    begin(cfg)
    for path in [tmp_path / "train.json"] if is_coco else [listed, annotated]:
        before = path.read_text()
        path.write_text(f" {before}")
        with pytest.raises(InputError, match="holds a run on other annotations of mine"):
            check_folder(cfg, resume=True)
        path.write_text(before)
        assert not check_folder(cfg, resume=True)
    path.unlink()  # as on a machine without the data
    assert not check_folder(cfg, resume=True)
    path.touch()
    held = Path(cfg.OUTPUT_DIR) / "config.yaml"
    content = yaml.safe_load(held.read_text())
    assert content["DATASETS"].pop("CONTENT")
    held.write_text(yaml.safe_dump(content))
    assert not check_folder(cfg, resume=True)


def test_a_seed_that_was_drawn_is_kept(cfg: CfgNode) -> None:
    cfg.SEED = -1
    drawn = begin(cfg).SEED
    assert drawn >= 0
    assert not check_folder(cfg, resume=True)
    assert drawn == cfg.SEED


def test_evaluation_leaves_the_run_s_configuration_alone(cfg: CfgNode) -> None:
    begin(cfg)
    before = (Path(cfg.OUTPUT_DIR) / "config.yaml").read_bytes()
    cfg.MODEL.WEIGHTS = "model_final.pth"
    set_up(cfg, training=False)
    assert (Path(cfg.OUTPUT_DIR) / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("content", ["[", "just text", ""])
def test_a_damaged_configuration_is_an_error_of_one_line(cfg: CfgNode, content: str) -> None:
    begin(cfg)
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"cannot read .*config\.yaml") as error:
        check_folder(cfg, resume=True)
    assert "\n" not in str(error.value)


def test_a_configuration_of_another_program_is_another_run(cfg: CfgNode) -> None:
    """It ended in a KeyError."""
    begin(cfg)
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text("model: resnet\n")
    with pytest.raises(InputError, match="holds another run"):
        check_folder(cfg, resume=True)


def test_a_record_of_before_annotations_were_noted_is_of_the_same_settings(cfg: CfgNode) -> None:
    """It was renamed, and called one of other weights or settings."""
    path = Path(cfg.OUTPUT_DIR) / "eval_record.json"
    write_record(path.name, cfg, {}, backbone={}, threat_model=None, seconds=1.0, data_warnings={})
    for content, is_kept in (((), True), ((("a", "1"),), True), ((("a", "2"),), False)):
        cfg.DATASETS.CONTENT = content
        keep_other_record(path.name, cfg)
        assert path.exists() == is_kept
        write_record(path.name, cfg, {}, backbone={}, threat_model=None, seconds=1.0, data_warnings={})


@pytest.mark.parametrize("name", ["model_0000099.pth", "record.json"])
def test_results_of_something_else_are_not_written_over(cfg: CfgNode, name: str) -> None:
    Path(cfg.OUTPUT_DIR).mkdir()
    (Path(cfg.OUTPUT_DIR) / name).touch()
    with pytest.raises(InputError, match="no detector's run of ours"):
        check_folder(cfg, resume=True)
