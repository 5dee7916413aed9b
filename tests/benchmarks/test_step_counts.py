"""Host waits and aten calls, counted without a GPU."""

import json
from collections.abc import Callable

import pytest
import torch
from benchmarks.step_counts import count, counting

VALUES = torch.arange(6.0, requires_grad=True)


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda: VALUES.sum().item(), 1),
        (lambda: bool(VALUES.sum() > 0), 1),
        (lambda: VALUES[VALUES > 2], 1),
        (lambda: VALUES.detach().clone().__setitem__(VALUES > 2, torch.zeros(3)), 1),
        (lambda: (VALUES > 2).nonzero(), 1),
        (lambda: VALUES.tolist(), 1),
        (lambda: VALUES.detach().unique(), 1),
        (lambda: torch.arange(2).repeat_interleave(torch.tensor([1, 2])), 1),
        (lambda: torch.arange(2).repeat_interleave(torch.tensor([1, 2]), output_size=3), 0),
        (lambda: VALUES[torch.tensor([0, 1])], 0),
        (lambda: torch.where(VALUES > 2, VALUES, 0).sum().backward(), 0),
    ],
)
def test_a_wait_is_what_the_host_needs_the_value_of(work: Callable[[], object], waits: int) -> None:
    with counting() as counts:
        work()
    assert counts.waits == waits


def test_the_backward_pass_is_counted_and_the_first_step_is_not() -> None:
    steps = []

    def step() -> None:
        steps.append(VALUES)
        (VALUES * 2).sum().backward()

    VALUES.grad = torch.zeros(6)
    counts = count(step)
    assert len(steps) == 2
    assert counts.calls > 4  # mul, sum, and in the backward pass: ones_like, expand, mul, add


@pytest.mark.slow
def test_the_last_line_is_json(run_tool: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ["--steps", "pgd-3", "faster-rcnn-fpn", "--batches", "2", "3", "--size", "32"]
    status, out, _ = run_tool("benchmark", "step-counts", *arguments)
    assert status == 0
    rows = {(row["step"], row["way"], row["batch"]): row for row in json.loads(out.splitlines()[-1])["step_counts"]}
    assert len(rows) == 10
    assert rows["pgd-3", "ours", 2]["waits"] == 0
    assert rows["pgd-3", "ours", 3]["calls"] == rows["pgd-3", "ours", 2]["calls"]
    # Detectron2's steps wait once an image and more.
    assert rows["faster-rcnn-fpn", "Detectron2", 3]["waits"] > rows["faster-rcnn-fpn", "Detectron2", 2]["waits"] + 5


def test_an_unknown_step_is_named(run_tool: Callable[..., tuple[int, str, str]]) -> None:
    status, _, err = run_tool("benchmark", "step-counts", "--steps", "pgd-4")
    assert status == 2
    assert "pgd-4" in err
