"""The training and evaluation loops, against slow ones and on a task they must learn."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.engine import Compute, evaluate, train_one_epoch
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel

CPU = Compute(torch.device("cpu"))


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """uint8 batches of unequal size whose class is told by the brightest channel."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for index in range(count):
        labels = torch.randint(0, 3, (8 - index,), generator=generator)
        images = torch.randint(0, 120, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
        images[torch.arange(len(labels)), labels] += 110
        out.append((images, labels))
    return out


def schedule(model: torch.nn.Module, lr: float = 0.05) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def test_one_step_is_the_gradient_of_the_adversarial_loss() -> None:
    """Against the step written out: perturb, differentiate in train mode, descend."""
    threat_model, attack, (images, labels) = ThreatModel("L2", 0.5), AttackConfig(steps=2), batches(1)[0]
    spec = BackboneSpec("resnet18", 3)
    ours, reference = (NormalizedModel(build_backbone(spec), spec) for _ in range(2))

    adversarial = pgd(reference, images / 255, labels, threat_model, attack)
    loss = F.cross_entropy(reference.train()(adversarial), labels)
    loss.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter -= 0.05 * parameter.grad

    metrics = train_one_epoch(ours, [(images, labels)], *schedule(ours), threat_model, attack, CPU)
    assert metrics["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours_parameter, parameter in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours_parameter, parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_it_learns(precision: str, epsilon: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    compute, threat_model = Compute(torch.device("cpu"), precision), ThreatModel("L2", epsilon)
    optimizer, scheduler = schedule(model, 0.1)
    attack = AttackConfig()
    for _ in range(30):
        metrics = train_one_epoch(model, batches(), optimizer, scheduler, threat_model, attack, compute)
    assert metrics["train_loss"] < 0.3
    accuracy = evaluate(model, batches(), threat_model, attack, compute)
    assert accuracy["clean_accuracy"] > 90
    assert accuracy["robust_accuracy"] > 80
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_accuracies_are_those_of_a_slow_count() -> None:
    spec = BackboneSpec("resnet18", 3)
    model = NormalizedModel(build_backbone(spec), spec)
    train_one_epoch(model, batches(), *schedule(model, 0.01), ThreatModel(), AttackConfig(), CPU)
    threat_model, attack = ThreatModel("Linf", 8 / 255), AttackConfig(steps=2)
    metrics = evaluate(model, batches(), threat_model, attack, CPU)
    assert model.training  # given back as it was

    model.eval()
    clean = robust = count = 0
    for images, labels in batches():
        for image, label in zip(images / 255, labels, strict=True):
            adversarial = pgd(model, image[None], label[None], threat_model, attack)
            right = bool(model(image[None]).argmax() == label)
            clean += right
            robust += right and bool(model(adversarial).argmax() == label)
            count += 1
    assert metrics == {"clean_accuracy": 100 * clean / count, "robust_accuracy": 100 * robust / count}


def test_robust_is_clean_at_epsilon_zero(small_model: NormalizedModel) -> None:
    metrics = evaluate(small_model, batches(), ThreatModel("L2", 0), AttackConfig(), CPU)
    assert metrics["clean_accuracy"] == metrics["robust_accuracy"]


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="fp32, bf16"):
        Compute(torch.device("cpu"), "fp8")
