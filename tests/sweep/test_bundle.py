"""A study goes on elsewhere: what is done stays done, and what is left finds what it needs."""

from dataclasses import replace
from pathlib import Path

import pytest

from robust_backbones.errors import InputError
from robust_backbones.runs.locks import lock
from robust_backbones.sweep.bundle import INDEX, pack, unpack
from robust_backbones.sweep.plan import Attempt, Plan, Run

NEEDS = {
    "convert": (),
    "done": ("convert",),
    "left": ("convert",),
    "begun": ("convert",),
    "used": (),
    "judged": ("used",),
}
LARGE = bytes(range(256)) * 8192  # 2 MiB, which travels only where it is needed


def study(output: Path) -> Plan:
    """Two conversions; of the first one's three detectors one is done and one is begun; the other's is done."""

    def run(key: str) -> Run:
        is_conversion = key in ("convert", "used")
        weights = tuple(f"{output}/runs/{need}/backbone.pkl" for need in NEEDS[key])
        results = ("backbone.pkl",) if is_conversion else ("record.json",)
        return Run(key, "stub", "stub", ("stub", *weights), NEEDS[key], results)

    return Plan("study", "study.yaml", output, tuple(map(run, NEEDS)))


def write(plan: Plan, key: str, **files: bytes) -> None:
    folder = plan.folder(plan.run(key))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


@pytest.fixture
def first(tmp_path: Path) -> Plan:
    plan = study(tmp_path / "first")
    plan.output.mkdir()
    plan.write()
    for key in ("convert", "used"):
        write(plan, key, backbone__pkl=LARGE)
    for key in ("done", "judged"):
        write(plan, key, record__json=b'{"seconds": 3.0}', model_final__pth=LARGE, lock__json=b"{}")
    write(plan, "begun", model_1__pth=LARGE, last_checkpoint=b"model_1.pth")
    Attempt(0.0, 0.0).write(plan.job(plan.run("begun")))
    return plan


def contents(plan: Plan) -> dict[str, bytes]:
    paths = [path for path in plan.output.rglob("*") if path.is_file()]
    return {str(path.relative_to(plan.output)): path.read_bytes() for path in paths}


def test_another_machine_goes_on(first: Plan, tmp_path: Path) -> None:
    files = pack(first, tmp_path / "bundle", part_bytes=10_000)
    assert len(files) > 2
    assert all(path.stat().st_size <= 10_000 for path in files)
    second = study(tmp_path / "second")
    second.output.mkdir()
    assert {*unpack(second, tmp_path / "bundle")} == {"convert", "done", "judged"}
    assert contents(second) == {
        "runs/convert/backbone.pkl": LARGE,  # of the first, because two of its detectors are not done
        "runs/done/record.json": b'{"seconds": 3.0}',
        "runs/judged/record.json": b'{"seconds": 3.0}',
        "runs/begun/model_1.pth": LARGE,
        "runs/begun/last_checkpoint": b"model_1.pth",
        "jobs/begun/attempt.json": (first.job(first.run("begun")) / "attempt.json").read_bytes(),
    }
    done = dict.fromkeys(("convert", "done", "used", "judged"), "done")
    assert second.states() == first.states() == {**done, "left": "ready", "begun": "preempted"}


def test_the_first_machine_gets_what_the_second_has_done(first: Plan, tmp_path: Path) -> None:
    """Whoever is further wins; what both have stays, and nothing is removed for want of it in the bundle."""
    second = study(tmp_path / "second")
    second.output.mkdir()
    unpack(second, pack(first, tmp_path / "bundle")[0].parent)
    write(second, "begun", record__json=b"{}")
    (second.folder(second.run("begun")) / "model_1.pth").unlink()
    write(second, "done", record__json=b"another")
    pack(second, tmp_path / "bundle")
    with lock(first.job(first.run("begun")) / "lock.json"), pytest.raises(InputError, match="begun is at work"):
        unpack(first, tmp_path / "bundle")
    assert unpack(first, tmp_path / "bundle") == ["begun"]
    assert first.states() == second.states()
    found = contents(first)
    assert found["runs/done/record.json"] == b'{"seconds": 3.0}'
    assert found["runs/done/model_final.pth"] == found["runs/used/backbone.pkl"] == LARGE
    assert "runs/begun/model_1.pth" not in found
    assert unpack(first, tmp_path / "bundle") == []
    assert contents(first) == found


def test_what_is_not_a_whole_bundle_is_refused(first: Plan, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    with pytest.raises(InputError, match="no whole bundle"):
        unpack(first, tmp_path)
    part = pack(first, bundle)[0]
    with pytest.raises(InputError, match="the study study, not of another"):
        unpack(replace(first, name="another"), bundle)
    with pytest.raises(InputError, match="the bundle of the study study"):
        pack(replace(first, name="another"), bundle)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"study\.000 is missing or damaged"):
        unpack(first, bundle)
    for parts in ("{}", '["study.000"]', "null", "[" * 100_000):
        (bundle / INDEX).write_text(f'{{"study": "study", "parts": {parts}}}')
        with pytest.raises(InputError, match="no whole bundle"):
            unpack(first, bundle)
    (bundle / INDEX).unlink()  # of a pack that was killed
    assert pack(first, bundle)[0] == part
    (bundle / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"holds holiday\.jpg"):
        pack(first, bundle)
    assert (bundle / "holiday.jpg").exists()
