"""What representations show: exact gradients, points that stay where they may, numbers equal to slow computations."""

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust_backbones.attacks import loss_values
from robust_backbones.classification.visualization import (
    LOGITS,
    PENULTIMATE,
    AscentConfig,
    activation_losses,
    activations,
    gradients_as_images,
    inversion_losses,
    invert,
    maximize_activation,
    noise,
    pixel_correlation,
    saliency,
    saliency_alignment,
    ssim,
)
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.conftest import randomize_batch_norms, resnet_stages
from tests.transfer.conftest import narrow_resnet18  # noqa: F401

pytestmark = pytest.mark.usefixtures("narrow_resnet18")

SPEC = BackboneSpec("resnet18", 5)
FEW = AscentConfig(steps=4, step_size=0.02)


def smooth_model(size: int = 6) -> NormalizedModel:
    """A convolution, tanh and two linear layers, in float64: differentiable everywhere."""
    layers = {
        "conv": nn.Conv2d(3, 4, 3, padding=1),
        "act": nn.Tanh(),
        "flat": nn.Flatten(),
        "mix": nn.Linear(4 * size * size, 7),
        "fc": nn.Linear(7, 5),
    }
    return seeded(layers)


def linear_model(size: int = 4) -> NormalizedModel:
    """Logits that are linear in the pixels after an orthogonal map, which loses nothing; in float64."""
    pixels = 3 * size * size
    model = seeded({"flat": nn.Flatten(), "mix": nn.Linear(pixels, pixels), "fc": nn.Linear(pixels, 5)})
    nn.init.orthogonal_(model.backbone.mix.weight, generator=torch.Generator().manual_seed(0))
    return model


def seeded(layers: dict[str, nn.Module]) -> NormalizedModel:
    model = NormalizedModel(nn.Sequential(OrderedDict(layers)), SPEC).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.4, 0.4, generator=generator)
    return model


def points(count: int, size: int, seed: int = 0) -> Tensor:
    """Images in float64 away from 0 and 1."""
    return 0.1 + 0.8 * torch.rand(count, 3, size, size, dtype=torch.float64, generator=generator_of(seed))


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def trained_like(small_model: NormalizedModel) -> NormalizedModel:
    randomize_batch_norms(small_model)
    return small_model


# ---------------------------------------------------------------------------------------------- layers


def test_layers_are_what_the_network_computes(trained_like: NormalizedModel, images: Tensor) -> None:
    model = trained_like.eval()
    net, normalized = model.backbone, model.normalize(images)
    with torch.no_grad():
        stages = resnet_stages(model, images)
        expected = {
            **stages,
            "bn1": net.bn1(net.conv1(normalized)),  # the ReLU after it works in place
            "layer1.0.relu": net.layer1[0].relu(
                net.layer1[0].bn1(net.layer1[0].conv1(net.maxpool(net.relu(net.bn1(net.conv1(normalized))))))
            ),
            PENULTIMATE: stages["layer4"].mean((2, 3)),
            "fc": model(images),
            LOGITS: model(images),
        }
        for layer, output in expected.items():
            torch.testing.assert_close(activations(model, images, layer), output)
    assert expected["bn1"].min() < 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("arch", [pytest.param("vgg16_bn", marks=pytest.mark.slow), "mobilenet_v2"])
def test_the_penultimate_layer_of_any_architecture_is_the_classifiers_input(arch: str, images: Tensor) -> None:
    model = NormalizedModel(build_backbone(BackboneSpec(arch, 3)), BackboneSpec(arch, 3)).eval()
    *_, classifier = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        torch.testing.assert_close(classifier(activations(model, images[:1])), model(images[:1]))


def test_a_backbone_without_a_classifier_has_features_and_no_logits(images: Tensor) -> None:
    spec = BackboneSpec("resnet18", 0)
    model = NormalizedModel(build_backbone(spec), spec).eval()
    torch.testing.assert_close(activations(model, images), resnet_stages(model, images)["layer4"].mean((2, 3)))
    labels = torch.zeros(4, dtype=torch.long)
    for call in (
        lambda: activations(model, images, LOGITS),
        lambda: saliency(model, images, labels),
        lambda: saliency_alignment(model, images),
    ):
        with pytest.raises(InputError, match="no classifier"):
            call()


def test_an_unknown_layer_is_refused(small_model: NormalizedModel, images: Tensor) -> None:
    with pytest.raises(InputError, match=r"no layer 'layer5': choose penultimate, logits, or a module such as layer\d"):
        activations(small_model, images, "layer5")
    with pytest.raises(InputError, match="no layer ''"):
        activations(small_model, images, "")
    small_model.backbone.spare = nn.ReLU()
    with pytest.raises(InputError, match="no image goes through it"):
        activations(small_model.eval(), images, "spare")


# ---------------------------------------------------------------------------------------------- objectives


def objectives(layer: str) -> dict[str, Callable[[Tensor], Tensor]]:
    model = smooth_model()
    return {
        "activation": activation_losses(model, torch.tensor([3, 0]), layer),
        "inversion": inversion_losses(model, points(2, 6, seed=7), layer),
    }


@pytest.mark.parametrize("objective", ["activation", "inversion"])
@pytest.mark.parametrize("layer", [LOGITS, PENULTIMATE, "conv"])
def test_gradients_of_the_objectives_are_those_of_finite_differences(layer: str, objective: str) -> None:
    losses, images = objectives(layer)[objective], points(2, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(losses(images).sum(), images)
    assert gradient.abs().max() > 1e-4
    step = 1e-6
    slow = torch.zeros_like(gradient)
    with torch.no_grad():
        for place in np.ndindex(*images.shape):
            moved = torch.zeros_like(images)
            moved[place] = step
            slow[place] = (losses(images + moved).sum() - losses(images - moved).sum()) / (2 * step)
    torch.testing.assert_close(gradient, slow, rtol=1e-6, atol=1e-8)


def test_the_objectives_are_what_they_say() -> None:
    """A channel's mean, a component, and ‖R(x) - R(t)‖ / ‖R(t)‖, each by hand, image by image."""
    model, images, targets = smooth_model(), points(2, 6), points(2, 6, seed=7)
    with torch.no_grad():
        maps = model.backbone.conv(model.normalize(images)).numpy()
        means = [maps[0, 3].mean(), maps[1, 0].mean()]
        found = activation_losses(model, torch.tensor([3, 0]), "conv")(images)
        np.testing.assert_allclose(found, means, rtol=1e-12)
        found = activation_losses(model, torch.tensor([4, 2]))(images)
        np.testing.assert_allclose(found, [model(images)[0, 4], model(images)[1, 2]], rtol=1e-12)
        of_targets = model.backbone.conv(model.normalize(targets)).numpy()
        distances = [np.sqrt(((x - t) ** 2).sum() / (t**2).sum()) for x, t in zip(maps, of_targets, strict=True)]
        np.testing.assert_allclose(-inversion_losses(model, targets, "conv")(images), distances, rtol=1e-12)


@pytest.mark.parametrize("units", [[5, 0], [0, -1]])
def test_a_unit_that_the_layer_does_not_have_is_refused(units: list[int]) -> None:
    with pytest.raises(InputError, match="logits has the units 0 to 4"):
        maximize_activation(smooth_model(), points(2, 6), torch.tensor(units), ascent=FEW)


# ---------------------------------------------------------------------------------------------- ascent


@pytest.mark.parametrize("ball", [None, ThreatModel("L2", 0.3), ThreatModel("Linf", 0.03)], ids=str)
@pytest.mark.parametrize("kind", ["activation", "inversion"])
def test_points_stay_in_the_ball_and_get_no_worse(
    trained_like: NormalizedModel, images: Tensor, kind: str, ball: ThreatModel | None
) -> None:
    starts, ascent = images.flip(0), AscentConfig(steps=5, step_size=0.05, ball=ball)
    units, ticks = torch.tensor([0, 1, 2, 3]), []
    if kind == "activation":
        found = maximize_activation(trained_like, starts, units, ascent=ascent, progress=ticks.append)
        gains = found.values - found.start_values
        losses, sign = activation_losses(trained_like.eval(), units), 1
    else:
        found = invert(trained_like, images, starts, layer="layer3", ascent=ascent, progress=ticks.append)
        gains = found.start_values - found.values
        losses, sign = inversion_losses(trained_like.eval(), images, "layer3"), -1
    assert (gains >= 0).all()
    assert (gains > 0).any()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    if ball is not None:
        assert (ball.size(found.images - starts) <= ball.epsilon * (1 + 1e-5) + 1e-6).all()
    torch.testing.assert_close(sign * loss_values(losses, found.images), found.values)
    torch.testing.assert_close(sign * loss_values(losses, starts), found.start_values)
    assert ticks == [4] * 5


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_one_step_has_the_length_that_is_asked_for(norm: str) -> None:
    """The root mean square of the change over the pixels, in either norm, at any size."""
    for size in (4, 6):
        model, starts = linear_model(size), points(3, size)
        units = torch.tensor([0, 1, 2])
        ascent = AscentConfig(steps=1, step_size=0.02, ball=ThreatModel(norm, 1))
        change = maximize_activation(model, starts, units, ascent=ascent).images - starts
        torch.testing.assert_close(change.flatten(1).pow(2).mean(1).sqrt(), torch.full((3,), 0.02).double())


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_the_maximum_of_a_linear_unit_in_a_ball_is_that_of_the_dual_norm(norm: str) -> None:
    """max over ‖δ‖ <= eps of <w, x + δ> is <w, x> + eps ‖w‖ in the dual norm."""
    model, starts, ball = linear_model(), points(3, 4), ThreatModel(norm, 0.05)
    units = torch.tensor([4, 0, 2])
    found = maximize_activation(model, starts, units, ascent=AscentConfig(steps=30, step_size=0.01, ball=ball))
    weights = effective_weights(model)[units]
    lengths = torch.linalg.vector_norm(weights, ord=2 if norm == "L2" else 1, dim=1)
    torch.testing.assert_close(found.values, found.start_values + 0.05 * lengths)


def test_a_representation_that_loses_nothing_gives_the_image_back() -> None:
    model, targets = linear_model(), points(3, 4, seed=3)
    starts = noise(3, 4, seed=0).double()
    found = invert(model, targets, starts, ascent=AscentConfig(steps=300, step_size=0.002))
    assert (found.start_values > 0.2).all()
    assert (found.values < 0.02).all()
    assert (found.images - targets).abs().max() < 0.02
    assert (pixel_correlation(found.images, targets) > 0.999).all()


def test_steps_that_overshoot_leave_the_best_point_and_not_the_last() -> None:
    model, targets = linear_model(), points(3, 4, seed=3)
    starts = targets + 1e-3 * torch.randn(targets.shape, dtype=torch.float64, generator=generator_of(0))
    found = invert(model, targets, starts, ascent=AscentConfig(steps=4, step_size=0.2))
    assert torch.equal(found.images, starts)
    assert torch.equal(found.values, found.start_values)


def test_images_do_not_depend_on_their_neighbours_and_results_repeat(
    trained_like: NormalizedModel, images: Tensor
) -> None:
    starts = noise(4, 32, seed=5)
    together = invert(trained_like, images, starts, ascent=FEW)
    again = invert(trained_like, images, starts, ascent=FEW)
    assert torch.equal(together.images, again.images)
    assert torch.equal(together.values, again.values)
    alone = invert(trained_like, images[2:3], starts[2:3], ascent=FEW)
    torch.testing.assert_close(alone.values, together.values[2:3], rtol=1e-3, atol=1e-4)


def test_noise_is_the_seeds_alone() -> None:
    state = torch.get_rng_state()
    starts = noise(5, 8, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(starts[:3], noise(3, 8, seed=2))
    assert not torch.equal(starts, noise(5, 8, seed=3))
    assert starts.dtype == torch.float32
    many = noise(40, 32, seed=0)
    assert not torch.equal(many[0], many[1])
    assert abs(many.mean() - 0.5) < 0.001
    assert abs(many.std() - 0.05) < 0.001


def test_the_network_is_given_back_as_it_was(trained_like: NormalizedModel, images: Tensor, labels: Tensor) -> None:
    model = trained_like.train()
    model.backbone.layer2.eval()
    model.backbone.conv1.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    maximize_activation(model, images, labels, ascent=FEW)
    invert(model, images.flip(0), images, ascent=FEW)
    saliency(model, images, labels)
    saliency_alignment(model, images)
    with pytest.raises(InputError):
        invert(model, images.flip(0), images, layer="layer9", ascent=FEW)
    assert modes == [module.training for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"step_size": 0.0}, {"step_size": -1.0}, {"ball": ThreatModel("L2", 0)}], ids=str
)
def test_an_ascent_that_goes_nowhere_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        AscentConfig(**options)


# ---------------------------------------------------------------------------------------------- saliency


def effective_weights(model: NormalizedModel) -> Tensor:
    """d logits / d pixels of ``linear_model``, row by row; shape (5, pixels)."""
    net = model.backbone
    pixels = net.mix.in_features
    deviation = model.std.flatten().repeat_interleave(pixels // 3)
    return (net.fc.weight @ net.mix.weight / deviation).detach()


def test_saliency_of_a_linear_network_is_that_of_softmax_regression() -> None:
    """d cross-entropy / dx = (softmax(z) - onehot) W."""
    model, images, labels = linear_model(), points(4, 4), torch.tensor([0, 4, 2, 2])
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    expected = (probabilities - nn.functional.one_hot(labels, 5)) @ effective_weights(model)
    torch.testing.assert_close(saliency(model, images, labels).flatten(1), expected)


def test_alignment_of_a_linear_network_in_closed_form() -> None:
    """The winning logit's gradient is its row of weights; sums by hand."""
    model, images = linear_model(), points(4, 4)
    weights = effective_weights(model).numpy()
    with torch.no_grad():
        winners = model(images).argmax(1).tolist()
    assert len(set(winners)) > 1
    alpha, cosine = saliency_alignment(model, images)
    for place, winner in enumerate(winners):
        x = images[place].flatten().tolist()
        product = abs(math.fsum(a * b for a, b in zip(x, weights[winner], strict=True)))
        length = math.sqrt(math.fsum(w * w for w in weights[winner]))
        assert alpha[place].item() == pytest.approx(product / length, rel=1e-10)
        size = math.sqrt(math.fsum(a * a for a in x))
        assert cosine[place].item() == pytest.approx(product / length / size, rel=1e-10)


def test_alignment_knows_its_limits() -> None:
    """An image along the gradient has cosine 1 and alpha its own length; no gradient is no alignment."""
    model = linear_model()
    weights = effective_weights(model)
    with torch.no_grad():
        model.backbone.fc.weight.copy_(model.backbone.fc.weight[:1].repeat(5, 1))
    images = weights[0].view(1, 3, 4, 4) * 0.01
    alpha, cosine = saliency_alignment(model, images)
    torch.testing.assert_close(cosine, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(alpha, torch.linalg.vector_norm(images).view(1))
    with torch.no_grad():
        model.backbone.fc.weight.zero_()
    alpha, cosine = saliency_alignment(model, images)
    assert alpha.tolist() == [0]
    assert cosine.tolist() == [0]


def test_gradients_become_images_around_grey() -> None:
    gradients = torch.randn(2, 3, 8, 8, generator=generator_of(0)) * torch.tensor([1e-6, 1e6])[:, None, None, None]
    shown = gradients_as_images(gradients)
    assert shown.min() >= 0
    assert shown.max() <= 1
    torch.testing.assert_close(shown, gradients_as_images(gradients * 1000))
    assert torch.equal(shown > 0.5, gradients > 0)
    assert torch.equal(gradients_as_images(torch.zeros(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 0.5))


# ---------------------------------------------------------------------------------------------- likeness


def slow_ssim(a: Tensor, b: Tensor) -> float:
    """Wang et al. 2004, eq. 13 to 16, window by window, for every window that lies in the image."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                p, q = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                covariance = (window * (p - mean_p) * (q - mean_q)).sum()
                top_line = (2 * mean_p * mean_q + c1) * (2 * covariance + c2)
                values.append(top_line / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)))
    return float(np.mean(values))


def test_ssim_is_that_of_the_paper() -> None:
    pytest.importorskip("skimage")
    a = torch.rand(3, 3, 14, 17, generator=generator_of(0))
    b = (a + 0.2 * torch.randn(a.shape, generator=generator_of(1))).clamp(0, 1)
    found = ssim(a, b)
    np.testing.assert_allclose(found, [slow_ssim(x, y) for x, y in zip(a, b, strict=True)], rtol=1e-6)
    assert ssim(a, a).tolist() == pytest.approx([1, 1, 1])
    torch.testing.assert_close(ssim(b, a), found)
    assert (found < 0.95).all()


def test_pixel_correlation_is_pearsons() -> None:
    a, b = points(3, 5), points(3, 5, seed=1)
    expected = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(pixel_correlation(a, b), expected, rtol=1e-10)
    np.testing.assert_allclose(pixel_correlation(a, 0.3 - 0.2 * a), [-1, -1, -1])
    assert pixel_correlation(a.float(), torch.full_like(a, 0.3).float()).abs().max() < 1e-6
