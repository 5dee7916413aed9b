"""Any damage to a sound set gives the reference's number of the data that are meant, or a refusal with the place."""

from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode

from tests.detection.conftest import base_config
from tests.detection.mutations import check_coco_mutation, check_voc_mutation, write_images

Check = Callable[[CfgNode, Path, Path, int], str]


@pytest.mark.parametrize("check", [check_coco_mutation, check_voc_mutation])
@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 140), marks=pytest.mark.slow)], ids=len)
@pytest.mark.filterwarnings("ignore")
def test_mutations_are_measured_as_meant_or_refused(tmp_path: Path, check: Check, seeds: range) -> None:
    write_images(tmp_path)
    cfg = base_config()
    outcomes = {check(cfg, tmp_path, tmp_path, seed) for seed in seeds}
    assert outcomes == {"same", "meant", "refused"}
