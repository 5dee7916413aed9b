"""Which runs are the same: not where they run, not what is left out at its default; all else makes another run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from robust_backbones.errors import InputError
from robust_backbones.runs.identity import FINGERPRINT, FREE, check_same, differences, digest, flat, read_settings

NAMES = st.sampled_from(["lr", "SEED", "a.b", "c", "label-1"])
VALUES = st.none() | st.integers(-3, 3) | st.sampled_from([0.5, 1e-5]) | st.text("ab:0", max_size=3)
LEAVES = VALUES | st.lists(VALUES, max_size=2)
CONFIGS = st.dictionaries(NAMES, LEAVES | st.dictionaries(NAMES, LEAVES, max_size=3), max_size=4)
FREE_PARTS = st.dictionaries(st.sampled_from(sorted(FREE)), VALUES)


@given(CONFIGS, FREE_PARTS, FREE_PARTS)
def test_free_settings_never_make_another_run(config: dict[str, Any], one: Any, other: Any) -> None:
    assert not differences({**config, **one}, {**config, **other})
    assert digest({**config, **one}) == digest({**config, **other})


@given(CONFIGS, CONFIGS)
def test_a_setting_left_out_has_its_default(config: dict[str, Any], defaults: dict[str, Any]) -> None:
    """In a folder of before the option existed, and in the digest of it."""
    full = {**defaults, **config}
    assert not differences(config, full, defaults)
    assert digest(config, defaults) == digest(full, defaults)
    assert digest(full, {}) == digest({**full, "later": 0.5}, {"later": 0.5})


@given(CONFIGS, CONFIGS, CONFIGS)
def test_digests_differ_where_runs_do(one: Any, other: Any, defaults: Any) -> None:
    assert not differences(one, one, defaults)
    assert differences(one, other, defaults) == differences(other, one, defaults)
    assert (digest(one, defaults) != digest(other, defaults)) == bool(differences(one, other, defaults))


@given(CONFIGS, NAMES, st.integers(4, 9))
def test_every_other_setting_makes_another_run(config: dict[str, Any], name: str, value: int) -> None:
    assert name in differences(config, {**config, name: value})


def test_data_are_the_same_where_most_of_their_images_are() -> None:
    """In any order; a folder of before there were fingerprints may hold any."""
    held = {FINGERPRINT: {"train": "".join(f"{number:04x}" for number in range(16)), "val": "ffff"}, "data": "shapes"}
    repaired = "".join(f"{number:04x}" for number in reversed(range(4, 20)))
    other = "".join(f"{number:04x}" for number in range(5, 21))
    for train, differ in ((repaired, []), (other, [f"{FINGERPRINT}.train"])):
        own = {**held, FINGERPRINT: {"train": train, "val": "ffff"}}
        assert differences(held, own) == differences(own, held) == differ
        assert not differences({"data": "shapes"}, own)
    assert differences({"data": "shapes"}, {**held, "data": "others"}) == ["data"]


@pytest.mark.parametrize("place", [0, 16, 60])
def test_a_refusal_shows_how_two_digests_differ(place: int) -> None:
    held = "0" * 64
    own = (held[:place] + "f" * 40)[:64].ljust(64, "0")
    with pytest.raises(InputError, match=r"start_sha256 is (0+) there and (?!\1 here)"):
        check_same(Path("run"), {"start_sha256": held}, {"start_sha256": own})


@given(CONFIGS)
def test_a_file_gives_the_run_back(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_settings(folder / "config.json") == read_settings(folder / "config.yaml") == flat(config)
    (folder / "config.yaml").write_text("yes: 1\n2: {null: 3}\n")  # as no run writes it
    assert read_settings(folder / "config.yaml") == {"True": 1, "2.None": 3}


def test_names_are_full_and_tuples_are_lists() -> None:
    assert flat({"TEST": {"SIZES": (4, (5,)), "NONE": {}}, "seed": 0}) == {"TEST.SIZES": [4, [5]], "seed": 0}
