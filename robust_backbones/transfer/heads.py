"""Linear classifiers on fixed features: many at once by SGD, each as if alone, or each to its optimum by L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from robust_backbones.transfer.config import Penalty, Setting


class Heads:
    """A linear head for every seed and setting.

    Shapes here and below: S seeds, G settings, C outputs, D features, N images, B images per batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor, settings: Sequence[object]) -> None:
        self.weight = weight  # (S, G, C, D)
        self.bias = bias  # (S, G, C)
        self.settings = list(settings)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Features (N, D) -> the most likely class of every head, (S, G, N)."""
        flat = zip(self.weight.flatten(0, 1), self.bias.flatten(0, 1), strict=True)
        predicted = torch.stack([F.linear(features, weight, bias).argmax(1) for weight, bias in flat])
        return predicted.view(*self.bias.shape[:2], -1)

    @property
    def finite(self) -> Tensor:
        """Which heads have not diverged, (S, G)."""
        return self.weight.isfinite().flatten(2).all(-1) & self.bias.isfinite().all(-1)

    def classifier(self, trial: int, setting: object) -> nn.Linear:
        """The head of the ``trial``-th seed, as a layer."""
        place = trial, self.settings.index(setting)
        return linear_layer(self.weight[place], self.bias[place])


class HeadBank(Heads):
    """Heads in training: all at once, each as ``torch.optim.SGD`` would train it alone.

    A seed determines its heads' initial weights and the order of their images; a setting is a learning rate and a
    weight decay (of weights and biases). Heads of one seed see the same batches, so a step is one matrix product per
    seed instead of one per head; the gradient of the cross-entropy is written out, as p - y.

    Args:
        classifiers: the initial weights, one layer per seed.
        momentum: of SGD, without dampening.
    """

    def __init__(
        self, classifiers: Sequence[nn.Linear], settings: Sequence[Setting], *, momentum: float, device: torch.device
    ) -> None:
        def a_setting_each(tensors: list[Tensor]) -> Tensor:
            return torch.stack(tensors).detach().to(device)[:, None].repeat_interleave(len(settings), dim=1)

        weight = a_setting_each([layer.weight for layer in classifiers])
        super().__init__(weight, a_setting_each([layer.bias for layer in classifiers]), settings)
        self.momentum = momentum
        self._velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self._lr, self._decay = (
            torch.tensor(values, dtype=weight.dtype, device=device)[:, None]
            for values in ([s.lr for s in settings], [s.weight_decay for s in settings])
        )

    @torch.no_grad()
    def train_epoch(self, features: Tensor, labels: Tensor, orders: Tensor, *, batch_size: int, rate: float) -> Tensor:
        """One pass over the images in ``orders``; an incomplete last batch is dropped, unless it is the only one.

        Args:
            features: (N, D), float32.
            labels: (N,), class indices.
            orders: (S, n), for every seed the indices of the images in their order.
            rate: factor for every setting's learning rate.

        Returns:
            The mean loss of every head in nats, (S, G).
        """
        batch_size = min(batch_size, orders.shape[1])
        steps = orders.shape[1] // batch_size
        loss = torch.zeros_like(self.bias[..., 0])
        for batch in orders[:, : steps * batch_size].split(batch_size, dim=1):
            loss += self._step(features[batch], labels[batch], rate)
        return loss / steps

    def _step(self, features: Tensor, labels: Tensor, rate: float) -> Tensor:
        """One step of every head on its seed's batch, (S, B, D) and (S, B); returns the losses (S, G)."""
        seeds, settings, outputs, dim = self.weight.shape
        batch = labels.shape[1]
        flat = self.weight.view(seeds, settings * outputs, dim)
        logits = torch.baddbmm(self.bias.view(seeds, 1, -1), features, flat.mT).view(seeds, batch, settings, outputs)
        log_p = F.log_softmax(logits, dim=-1)
        target = labels[:, :, None, None].expand(-1, -1, settings, 1)
        loss = -log_p.gather(-1, target).mean(1).squeeze(-1)
        # d loss / d logits = (p - y) / B
        gradient = log_p.exp_().scatter_add_(-1, target, -torch.ones_like(log_p[..., :1])).div_(batch)
        gradient = gradient.view(seeds, batch, -1)
        of_weight = torch.bmm(gradient.mT, features).view_as(self.weight)
        of_bias = gradient.sum(1).view_as(self.bias)
        for value, slope, velocity in zip((self.weight, self.bias), (of_weight, of_bias), self._velocity, strict=True):
            extra = [1] * (value.dim() - 3)
            slope.addcmul_(value, self._decay.view(settings, 1, *extra))
            velocity.mul_(self.momentum).add_(slope)
            value.addcmul_(velocity, self._lr.view(settings, 1, *extra), value=-rate)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias, "velocity": self._velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        self.bias.copy_(state["bias"])
        for velocity, saved in zip(self._velocity, state["velocity"], strict=True):
            velocity.copy_(saved)


def logistic_regressions(features: Tensor, labels: Tensor, *, outputs: int, penalties: Sequence[Penalty]) -> Heads:
    """For every penalty the classifier that minimises mean cross-entropy + penalty / 2 * ‖W‖², as heads of one seed.

    By L-BFGS in float64. The bias is not penalised. The objective is convex (strictly in W), so the start only affects
    the running time.

    Args:
        features: (N, D). They are divided by their common root mean square, and the returned weights compensate for it,
            so that a penalty means the same for every backbone.
        labels: (N,), class indices below ``outputs``.
    """
    # Around their mean the problem is far better conditioned, and the same: the bias is free.
    mean = features.double().mean(0)
    scale = features.double().square().mean().sqrt()
    x = (features - mean) / scale
    weight = x.new_zeros(outputs, x.shape[1]).requires_grad_()
    bias = x.new_zeros(outputs).requires_grad_()

    def fit(penalty: Penalty) -> tuple[Tensor, Tensor]:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=2000,
            tolerance_grad=1e-6,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), labels) + penalty.value / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return (weight / scale).float(), (bias - weight / scale @ mean).float()

    # From the strongest on, as each optimum is near the one before it.
    strongest_first = sorted(penalties, key=lambda penalty: -penalty.value)
    bar = tqdm(strongest_first, desc="L-BFGS", unit="penalty", disable=None, leave=False)
    fitted = {penalty: fit(penalty) for penalty in bar}
    weights, biases = (torch.stack([fitted[penalty][part] for penalty in penalties])[None] for part in (0, 1))
    return Heads(weights, biases, penalties)


def linear_layer(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer of these weights, on the CPU."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.cpu(), "bias": bias.cpu()})
    return layer
