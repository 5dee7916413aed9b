"""Linear heads: trained together each is what SGD makes of it alone; regressions end where the gradient does."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_backbones.transfer.config import Penalty, Setting
from robust_backbones.transfer.heads import HeadBank, Heads, logistic_regressions

CPU = torch.device("cpu")


def problem(images: int, features: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features as a ReLU leaves them, around a centre for each class; labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(outputs, (images,), generator=generator)
    centres = torch.randn(outputs, features, generator=generator)
    return (centres[labels] + torch.randn(images, features, generator=generator)).relu(), labels


def layers(features: int, outputs: int, seeds: tuple[int, ...]) -> list[nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        return [torch.manual_seed(seed) and nn.Linear(features, outputs) for seed in seeds]


def alone(
    layer: nn.Linear, setting: Setting, features: Tensor, labels: Tensor, orders: list[Tensor], batch: int, lr_step: int
) -> list[float]:
    """One head by torch's own SGD, an epoch an order; the mean loss of every epoch."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, lr_step)
    means = []
    for order in orders:
        losses = []
        for rows in order[: len(order) // batch * batch].split(batch):
            loss = F.cross_entropy(layer(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        means.append(sum(losses) / len(losses))
    return means


def test_less_than_a_batch_is_a_batch() -> None:
    """As where batches are made for batch norms, and held-out images are then taken out of them."""
    x, labels = problem(12, 5, 3)
    banks = [HeadBank(layers(5, 3, (0, 1)), [Setting(0.1, 0.0)], momentum=0.9, device=CPU) for _ in range(2)]
    orders = torch.arange(12).expand(2, -1)
    losses = [
        bank.train_epoch(x, labels, orders, batch_size=size, rate=1.0)
        for bank, size in zip(banks, (12, 20), strict=True)
    ]
    assert torch.equal(*losses)
    assert torch.equal(banks[0].weight, banks[1].weight)


@settings(max_examples=8, deadline=None)
@given(
    images=st.integers(20, 70),
    features=st.integers(1, 40),
    outputs=st.integers(2, 12),
    batch=st.integers(1, 20),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
    rates=st.lists(st.sampled_from([1e-3, 1e-2, 3e-2]), min_size=1, max_size=3, unique=True),
    decays=st.lists(st.sampled_from([0.0, 5e-4, 1e-2]), min_size=1, max_size=2, unique=True),
)
def test_every_head_is_what_sgd_makes_of_it_alone(
    images: int, features: int, outputs: int, batch: int, seeds: list[int], rates: list[float], decays: list[float]
) -> None:
    x, labels = problem(images, features, outputs)
    grid = [Setting(lr, decay) for lr in rates for decay in decays]
    bank = HeadBank(layers(features, outputs, tuple(seeds)), grid, momentum=0.9, device=CPU)
    orders = [
        torch.stack(
            [torch.randperm(images, generator=torch.Generator().manual_seed(seed + 7 * epoch)) for seed in seeds]
        )
        for epoch in range(4)
    ]
    losses = [
        bank.train_epoch(x, labels, order, batch_size=batch, rate=0.1 ** (epoch // 2))
        for epoch, order in enumerate(orders)
    ]
    for (place, seed), (column, setting) in itertools.product(enumerate(seeds), enumerate(grid)):
        (layer,) = layers(features, outputs, (seed,))
        expected = alone(layer, setting, x, labels, [order[place] for order in orders], batch, lr_step=2)
        trained = bank.classifier(seeds.index(seed), setting)
        torch.testing.assert_close(trained.weight, layer.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(trained.bias, layer.bias, rtol=1e-5, atol=1e-6)
        assert [float(loss[place, column]) for loss in losses] == pytest.approx(expected, abs=1e-4)


def test_heads_train_on_the_images_named_alone() -> None:
    """Others may hold anything."""
    x, labels = problem(30, 5, 3)
    grid, order = [Setting(0.01, 0.0)], torch.arange(20)[None]
    banks = []
    for others in (0.0, float("nan")):
        bank = HeadBank(layers(5, 3, (0,)), grid, momentum=0.9, device=CPU)
        bank.train_epoch(torch.cat([x[:20], torch.full_like(x[20:], others)]), labels, order, batch_size=4, rate=1.0)
        banks.append(bank)
    assert torch.equal(banks[0].weight, banks[1].weight)


def test_a_bank_resumes_from_its_state() -> None:
    x, labels = problem(40, 6, 3)
    grid, order = [Setting(0.01, 5e-4), Setting(0.1, 0.0)], torch.arange(40).expand(2, -1)

    def bank() -> HeadBank:
        return HeadBank(layers(6, 3, (0, 1)), grid, momentum=0.9, device=CPU)

    unbroken, first, second = bank(), bank(), bank()
    for _ in range(2):
        unbroken.train_epoch(x, labels, order, batch_size=8, rate=1.0)
    first.train_epoch(x, labels, order, batch_size=8, rate=1.0)
    second.load_state_dict(first.state_dict())
    second.train_epoch(x, labels, order, batch_size=8, rate=1.0)
    assert torch.equal(second.weight, unbroken.weight)
    assert torch.equal(second.bias, unbroken.bias)


def test_a_head_that_diverges_takes_no_other_with_it() -> None:
    x, labels = problem(40, 6, 3)
    grid = [Setting(0.01, 0.0), Setting(1e30, 1.0)]
    bank = HeadBank(layers(6, 3, (0,)), grid, momentum=0.9, device=CPU)
    for _ in range(3):
        bank.train_epoch(x, labels, torch.arange(40)[None], batch_size=8, rate=1.0)
    assert bank.finite.tolist() == [[True, False]]
    (layer,) = layers(6, 3, (0,))
    alone(layer, grid[0], x, labels, [torch.arange(40)] * 3, 8, lr_step=9)
    torch.testing.assert_close(bank.classifier(0, grid[0]).weight, layer.weight)


def test_predictions_are_each_heads_own() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 5, generator=generator)
    x = torch.randn(7, 4, generator=generator)
    predicted = Heads(weight, bias, ["a", "b", "c"]).predict(x)
    for seed, setting, image in itertools.product(range(2), range(3), range(7)):
        logits = [weight[seed, setting, c] @ x[image] + bias[seed, setting, c] for c in range(5)]
        assert predicted[seed, setting, image] == int(torch.stack(logits).argmax())


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_regression_ends_where_the_gradient_is_zero(penalty: float, scale: float) -> None:
    """The gradient written out by hand, in units of features of root mean square 1, which the penalty refers to."""
    x, labels = problem(60, 8, 3)
    x = x * scale
    layer = logistic_regressions(x, labels, outputs=3, penalties=[Penalty(penalty)]).classifier(0, Penalty(penalty))
    rms = x.double().square().mean().sqrt()
    weight, bias = layer.weight.detach().double() * rms, layer.bias.detach().double()
    logits = x.double() / rms @ weight.T + bias
    error = torch.softmax(logits, 1) - F.one_hot(labels, 3)
    of_weight = error.T @ (x.double() / rms) / 60 + penalty * weight
    assert of_weight.abs().max() < 1e-5
    assert error.mean(0).abs().max() < 1e-5


def test_regressions_of_a_grid_are_those_of_each_penalty() -> None:
    x, labels = problem(60, 8, 3)
    penalties = [Penalty(1e-3), Penalty(1.0), Penalty(1e-1)]
    together = logistic_regressions(x, labels, outputs=3, penalties=penalties)
    for penalty in penalties:
        single = logistic_regressions(x, labels, outputs=3, penalties=[penalty])
        torch.testing.assert_close(together.classifier(0, penalty).weight, single.weight[0, 0], rtol=1e-3, atol=1e-4)
