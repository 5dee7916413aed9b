"""The ball's geometry: projection, steepest ascent and random starts, against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robust_backbones.errors import InputError
from robust_backbones.threat_models import NORMS, ThreatModel

threat_models = st.one_of(
    st.builds(ThreatModel, st.just("L2"), st.floats(1e-3, 10)),
    st.builds(ThreatModel, st.just("Linf"), st.floats(1e-3, 1)),
)
seeds = st.integers(0, 2**32 - 1)


def perturbations(seed: int, scale: float = 1.0) -> Tensor:
    """Shape (5, 3, 4, 4): normal, one all zero, one tiny, one huge."""
    delta = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * scale
    delta[1] = 0
    delta[2] *= 1e-6
    delta[3] *= 1e6
    return delta


@given(threat_models, seeds)
def test_projection_is_the_nearest_point_of_the_ball(threat_model: ThreatModel, seed: int) -> None:
    delta = perturbations(seed)
    projected = threat_model.project(delta)
    assert (threat_model.size(projected) <= threat_model.epsilon * (1 + 1e-5)).all()
    torch.testing.assert_close(threat_model.project(projected), projected)
    # No other point of the ball is nearer (beyond rounding).
    other = threat_model.project(perturbations(seed + 1, threat_model.epsilon))
    distance = (delta - projected).flatten(1).norm(dim=1)
    assert (distance <= (delta - other).flatten(1).norm(dim=1) * (1 + 1e-5)).all()


@given(threat_models, seeds)
def test_projection_leaves_the_inside_alone(threat_model: ThreatModel, seed: int) -> None:
    delta = perturbations(seed)
    inside = 0.99 * threat_model.epsilon * delta / threat_model.size(delta).clamp_min(1e-30)[:, None, None, None]
    torch.testing.assert_close(threat_model.project(inside), inside, rtol=0, atol=0)


@given(st.sampled_from(NORMS), seeds)
def test_ascent_direction_attains_the_dual_norm(norm: str, seed: int) -> None:
    """max over ‖s‖ <= 1 of <g, s> is ‖g‖ in the dual norm: l2 for l2, l1 for linf."""
    threat_model = ThreatModel(norm, 1)
    gradient = perturbations(seed).double()
    step = threat_model.ascent_direction(gradient)
    dual = gradient.flatten(1).norm(p=2 if norm == "L2" else 1, dim=1)
    torch.testing.assert_close((gradient * step).flatten(1).sum(1), dual)
    assert (threat_model.size(step) <= 1 + 1e-9).all()
    assert (step[1] == 0).all()


@given(threat_models, seeds)
def test_random_start_lies_in_the_ball(threat_model: ThreatModel, seed: int) -> None:
    start = threat_model.random_start(torch.zeros(4, 3, 8, 8), torch.Generator().manual_seed(seed))
    assert (threat_model.size(start) <= threat_model.epsilon * (1 + 1e-5)).all()


def test_random_start_is_uniform_in_the_ball() -> None:
    """In d dimensions the mean radius of the uniform l2 ball is d / (d + 1); of linf, mean |δ_i| is 1/2."""
    images = torch.zeros(20000, 1, 1, 3)
    generator = torch.Generator().manual_seed(0)
    radius = ThreatModel("L2", 2).size(ThreatModel("L2", 2).random_start(images, generator))
    assert radius.mean().item() == pytest.approx(2 * 3 / 4, abs=0.01)
    start = ThreatModel("Linf", 1).random_start(images, generator)
    assert start.abs().mean().item() == pytest.approx(1 / 2, abs=0.005)
    assert start.mean().item() == pytest.approx(0, abs=0.01)


@given(threat_models, seeds)
def test_an_image_alone_is_a_batch_of_one(threat_model: ThreatModel, seed: int) -> None:
    delta = perturbations(seed)[:1]
    for method in (threat_model.project, threat_model.ascent_direction, threat_model.size):
        assert torch.equal(method(delta[0]), method(delta)[0])
    starts = [threat_model.random_start(x, torch.Generator().manual_seed(seed)) for x in (delta[0], delta)]
    assert torch.equal(starts[0], starts[1][0])


@given(threat_models)
def test_text_round_trip(threat_model: ThreatModel) -> None:
    again = ThreatModel.parse(str(threat_model))
    assert again.norm == threat_model.norm
    assert math.isclose(again.epsilon, threat_model.epsilon, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("text", "norm", "epsilon"),
    [("L2:3", "L2", 3), ("L2:0", "L2", 0), ("Linf:4/255", "Linf", 4 / 255), ("L2:.25", "L2", 0.25)],
)
def test_parse(text: str, norm: str, epsilon: float) -> None:
    assert ThreatModel.parse(text) == ThreatModel(norm, epsilon)


@pytest.mark.parametrize("threat_model", [ThreatModel("Linf", 4 / 255), ThreatModel("Linf", 0.5 / 255)])
def test_linf_is_written_in_levels(threat_model: ThreatModel) -> None:
    assert str(threat_model) == f"Linf:{threat_model.epsilon * 255:g}/255"


@pytest.mark.parametrize("text", ["L2", "L2:", "L1:3", "L2:-3", "Linf:4/0", "L2:nan", "L2:three", "L2:1e999", "l2:3"])
def test_what_is_no_threat_model_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        ThreatModel.parse(text)


def test_a_radius_in_levels_is_refused_with_what_was_meant() -> None:
    """Linf:1 holds every image: that is what an unbounded attack is (Carlini et al. 2019, section 3.4)."""
    with pytest.raises(InputError, match="Linf:8/255"):
        ThreatModel.parse("Linf:8")
    assert ThreatModel.parse("Linf:1").epsilon == 1
    ThreatModel.parse("L2:5").check_radius((3, 224, 224))
    with pytest.raises(InputError, match="L2:765/255"):
        ThreatModel.parse("L2:765").check_radius((3, 224, 224))


@given(seeds, st.sampled_from([1e-3, 1e-8, 1e-10, 1e-12, 1e-30]))
def test_a_vanishing_l2_gradient_still_makes_a_whole_step(seed: int, norm: float) -> None:
    """Ours is g / |g|; `robustness` has g / (|g| + 1e-10): |g| / (|g| + 1e-10) of ours, in the same direction."""
    gradient = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradient *= norm / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    ours = ThreatModel("L2", 3).ascent_direction(gradient.float())
    torch.testing.assert_close(ours.flatten(1).norm(dim=1), torch.ones(2), rtol=1e-4, atol=0)
    library = gradient / (gradient.flatten(1).norm(dim=1)[:, None, None, None] + 1e-10)
    torch.testing.assert_close(library, ours.double() * norm / (norm + 1e-10), rtol=1e-3, atol=1e-6)
