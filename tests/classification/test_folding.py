"""The folded twin is the same function as the network in eval mode, and an attack on it is an attack on the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.classification.folding import FoldedTwin, _MaxPool
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.conftest import randomize_batch_norms

# architecture -> batch norms that stay, because something else reads the convolution or none comes before
LEFT_OVER = {
    "resnet18": 0,
    "resnext50_32x4d": 0,
    "densenet161": 82,
    "mnasnet1_0": 0,
    "mobilenet_v2": 0,
    "shufflenet_v2_x1_0": 0,
    "vgg16_bn": 0,
}
LARGE = ("resnext50_32x4d", "densenet161", "vgg16_bn")


def network(arch: str = "resnet18", stem: str = "imagenet") -> NormalizedModel:
    spec = BackboneSpec(arch, 4, stem=stem)
    model = NormalizedModel(build_backbone(spec), spec)
    randomize_batch_norms(model)
    return model


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    assert images.grad is not None
    return images.grad


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Of each row; torch's own takes small gradients for zero."""
    first, second = first.flatten(1).double(), second.flatten(1).double()
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) if arch in LARGE else arch for arch in LEFT_OVER]
)
def test_it_is_the_network_in_eval_mode(arch: str, images: Tensor, labels: Tensor) -> None:
    """Logits and input gradients in float32, up to rounding; every batch norm after a convolution is gone."""
    model = network(arch).eval()
    twin = FoldedTwin(model)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in twin.modules()) == LEFT_OVER[arch]
    expected = model(images).detach()
    torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert cosine(*(input_gradient(net, images, labels) for net in (twin, model))).min() > 0.9999


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_refreshing_follows_steps_and_statistics(stem: str, images: Tensor, labels: Tensor) -> None:
    model = network(stem=stem).train()
    twin = FoldedTwin(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    model.eval()
    expected = model(images).detach()
    assert not torch.allclose(twin(images), expected, rtol=1e-2)  # stale
    twin.refresh()
    torch.testing.assert_close(twin(images), expected, rtol=1e-4, atol=1e-4)


def test_it_is_apart_from_the_network(images: Tensor, labels: Tensor) -> None:
    """Nothing that happens to the twin reaches the network: no gradient, no mode, no statistic, no tensor."""
    model = network().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = FoldedTwin(model)
    twin.train()
    input_gradient(twin, images, labels)
    assert not any(module.training for module in twin.network.modules())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *twin.parameters()])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in twin.state_dict().values())


class TwoReaders(nn.Module):
    """A convolution whose output is read before its batch norm as well: folding it would change the other path."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return (x + self.norm(x)).mean((2, 3))


def test_a_convolution_with_two_readers_is_left_alone(images: Tensor) -> None:
    model = NormalizedModel(TwoReaders(), BackboneSpec("resnet18", 4)).eval()
    randomize_batch_norms(model)
    twin = FoldedTwin(model)
    assert isinstance(twin.network.norm, nn.BatchNorm2d)
    torch.testing.assert_close(twin(images), model(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["resnet18", pytest.param("densenet161", marks=pytest.mark.slow)])
def test_low_precision_changes_digits_not_answers(
    arch: str, dtype: torch.dtype, images: Tensor, labels: Tensor
) -> None:
    """8 and 11 bits of mantissa: relative error of the logits in per cents; images and gradients stay float32."""
    model = network(arch).eval()
    twin = FoldedTwin(model, dtype)
    logits, expected = twin(images), model(images).detach()
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert input_gradient(twin, images, labels).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "least_cosine", "points"), [(torch.float32, 0.9999, 0.0), (torch.bfloat16, 0.9, 2.5)]
)
def test_attacks_on_a_trained_network_are_as_strong(
    trained: tuple[NormalizedModel, Tensor, Tensor], dtype: torch.dtype, least_cosine: float, points: float
) -> None:
    """On random weights rounding alone moves an attack; on a trained network the twin's is as good as the network's.

    Gradients point the same way for the median image, and robust accuracy under each other's perturbation agrees:
    exactly in float32, within ``points`` per cent in bfloat16 (one image of these is 1.25 points).
    """
    model, images, labels = trained
    twin = FoldedTwin(model, dtype)
    assert cosine(*(input_gradient(net, images, labels) for net in (twin, model))).median() > least_cosine
    threat_model, attack = ThreatModel("L2", 0.5), AttackConfig()
    accuracies = []
    for adversary in (twin, model):
        adversarial = pgd(adversary, images, labels, threat_model, attack)
        with torch.no_grad():
            accuracies.append(100 * (model(adversarial).argmax(1) == labels).float().mean().item())
    assert 20 < accuracies[1] < 95  # the attack does something, and not everything
    assert abs(accuracies[0] - accuracies[1]) <= points


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_pooling_that_holds_no_indices_has_the_same_gradient(dtype: torch.dtype, window: tuple[int, int, int]) -> None:
    """Ties included: of equal pixels, both give the gradient to the same one."""
    pool = nn.MaxPool2d(*window)
    inputs = torch.randint(0, 4, (2, 3, 9, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.rand(pool(inputs).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients, kept, held = [], [], []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor.dtype)
        return tensor

    for layer in (pool, _MaxPool(pool)):
        points = inputs.clone().requires_grad_()
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            output = layer(points)
        assert torch.equal(output, pool(inputs))
        kept.append(torch.int64 in held)
        gradients.append(torch.autograd.grad(output, points, weight)[0])
    assert torch.equal(*gradients)
    assert kept == [True, False]
