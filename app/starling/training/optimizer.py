"""The optimizer's three parameter groups, its learning rates and momenta, and the moving average of weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from starling.config.hyp import Hyp

Model = TypeVar("Model", bound=nn.Module)

NOMINAL_BATCH = 64
"""The batch size that learning rate and weight decay are meant for; smaller batches are accumulated up to it."""
BIASES, DECAYED, NORMS = range(3)
"""Indices of the parameter groups, in the order of results.csv's x/lr0, x/lr1, x/lr2."""


def accumulation(batch_size: int) -> int:
    """Return how many iterations make one step, so that a step sees about `NOMINAL_BATCH` images."""
    return max(round(NOMINAL_BATCH / batch_size), 1)


def build_optimizer(model: nn.Module, name: str, hyp: Hyp, batch_size: int) -> torch.optim.Optimizer:
    """Return the optimizer over biases, weights with decay, and norms.

    The weight decay is multiplied by (images that a step sees) / `NOMINAL_BATCH`.
    """
    groups: list[list[nn.Parameter]] = [[], [], []]
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            groups[BIASES].append(parameter)
        else:
            groups[NORMS if parameter.ndim <= 1 else DECAYED].append(parameter)
    decay = hyp.weight_decay * batch_size * accumulation(batch_size) / NOMINAL_BATCH
    settings = [
        {"params": parameters, "lr": hyp.lr0, "weight_decay": decay if index == DECAYED else 0.0}
        for index, parameters in enumerate(groups)
    ]
    if name == "SGD":
        return torch.optim.SGD(settings, lr=hyp.lr0, momentum=hyp.momentum, nesterov=True, foreach=True)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(settings, lr=hyp.lr0, betas=(hyp.momentum, 0.999), foreach=True)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rates, momentum and accumulation as functions of epoch and iteration: a resume restores none of them."""

    hyp: Hyp
    epochs: int
    iterations_per_epoch: int
    batch_size: int
    cosine: bool = False

    @property
    def warmup_iterations(self) -> int:
        """Length of the warm-up in iterations."""
        if self.hyp.warmup_epochs <= 0:
            return 0
        return max(round(self.hyp.warmup_epochs * self.iterations_per_epoch), 100)

    def factor(self, epoch: int) -> float:
        """Return the learning rate of an epoch as a fraction of lr0: falls to lrf linearly, or as a half cosine."""
        progress = epoch / self.epochs
        rest = (1 + math.cos(math.pi * progress)) / 2 if self.cosine else 1 - progress
        return rest * (1 - self.hyp.lrf) + self.hyp.lrf

    def accumulate(self, iteration: int) -> int:
        """Return how many iterations make one step at this iteration; the number rises from 1 during the warm-up."""
        if iteration >= self.warmup_iterations:
            return accumulation(self.batch_size)
        ramp = np.interp(iteration, [0, self.warmup_iterations], [1, NOMINAL_BATCH / self.batch_size])
        return max(1, round(float(ramp)))

    def apply(self, optimizer: torch.optim.Optimizer, epoch: int, iteration: int, scale: float = 1.0) -> None:
        """Set the learning rate (times `scale`) and momentum of each group for one iteration."""
        target = self.hyp.lr0 * self.factor(epoch)
        warmup = self.warmup_iterations
        share = min(iteration / warmup, 1.0) if warmup else 1.0
        momentum = self.hyp.warmup_momentum + share * (self.hyp.momentum - self.hyp.warmup_momentum)
        for index, group in enumerate(optimizer.param_groups):
            start = self.hyp.warmup_bias_lr if index == BIASES else 0.0
            group["lr"] = scale * (start + share * (target - start))
            if "momentum" in group:
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, group["betas"][1])


class ExponentialMovingAverage(Generic[Model]):
    """A copy of the model that holds the exponential moving average of the model's weights.

    decay(n) = 0.9999 (1 - e^(-n / 2000)) after n updates, for every floating-point tensor of the state dict.
    """

    def __init__(self, model: Model) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0
        shadow, source = self.model.state_dict(), model.state_dict()
        floating = [key for key, value in shadow.items() if value.is_floating_point()]
        # state_dict() tensors share memory with the modules, so these lists stay valid.
        self._shadow = [shadow[key] for key in floating]
        self._source = [source[key].detach() for key in floating]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present weights."""
        self.updates += 1
        decay = 0.9999 * (1 - math.exp(-self.updates / 2000))
        torch._foreach_lerp_(self._shadow, self._source, 1 - decay)
