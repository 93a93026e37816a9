"""LARS, the parameter groups and the learning-rate schedules of SimCLR."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

Group = dict[str, Any]  # an optimiser's parameters with their settings
Tensors = list[Tensor]


class LARS(torch.optim.Optimizer):
    """SGD with momentum, whose step for each tensor is scaled to the tensor's norm (You et al. 2017).

    As published by MMSelfSup (lars.py), for a parameter p with gradient g:
    local_lr = trust_coefficient·‖p‖ / (‖g‖ + weight_decay·‖p‖ + eps), or 1 where ‖p‖ or ‖g‖ is 0;
    buffer = momentum·buffer + lr·local_lr·(g + weight_decay·p); p = p − buffer. The learning rate is inside
    the buffer. In a group with `lars_exclude: True` local_lr is 1; its decay is its own `weight_decay`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            lars_exclude=False,
        )
        for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
            if defaults[name] < 0:
                raise ValueError(f"expected {name} ≥ 0, found {defaults[name]}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take one step; return the closure's loss, if one is given. Gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                gradients = [_laid_out_as(p, p.grad) for p in parameters]
                _step(group, parameters, gradients, [self._buffer(p) for p in parameters])
        return loss

    def _buffer(self, p: Tensor) -> Tensor:
        buffer = self.state[p].get("momentum_buffer")
        buffer = torch.zeros_like(p) if buffer is None else _laid_out_as(p, buffer)
        self.state[p]["momentum_buffer"] = buffer
        return buffer


def _step(group: Group, parameters: Tensors, gradients: Tensors, buffers: Tensors) -> None:
    if group["lars_exclude"]:
        _sgd(group, parameters, gradients, buffers, group["lr"])
        return
    rates = group["lr"] * _local_lrs(group, parameters, gradients)
    if rates.is_cpu:
        for p, g, buffer, rate in zip(parameters, gradients, buffers, rates.tolist(), strict=True):
            _sgd(group, [p], [g], [buffer], rate)
    else:
        _sgd_without_waiting(group, parameters, gradients, buffers, rates)


def _local_lrs(group: Group, parameters: Tensors, gradients: Tensors) -> Tensor:
    p, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, gradients))
    local = group["trust_coefficient"] * p / (g + group["weight_decay"] * p + group["eps"])
    return local.where((p > 0) & (g > 0), 1.0)


def _sgd(group: Group, parameters: Tensors, gradients: Tensors, buffers: Tensors, rate: float) -> None:
    """Take a step with lr·local_lr = `rate`, in one pass over memory.

    A rate that is inside the buffer is, in PyTorch's words, a learning rate of 1 and a dampening of 1 − rate.
    """
    lr, dampening = (1.0, 1.0 - rate) if group["momentum"] else (rate, 0.0)
    settings = {name: group[name] for name in ("momentum", "weight_decay")}
    settings |= {"lr": lr, "dampening": dampening, "nesterov": False, "maximize": False}
    sgd(parameters, gradients, buffers, fused=True, **settings)


def _sgd_without_waiting(
    group: Group, parameters: Tensors, gradients: Tensors, buffers: Tensors, rates: Tensor
) -> None:
    """Take a step with lr·local_lr = `rates`, one each, which stay on the GPU: nothing waits for it."""
    change = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_addcmul_(buffers, change, rates.unbind())
    torch._foreach_sub_(parameters, buffers)


def _laid_out_as(p: Tensor, x: Tensor) -> Tensor:
    """Return `x`, or a copy that lies in memory as `p` does: fused steps pair elements by address.

    They differ e.g. where a state was saved with other strides (`channels_last`) than it is loaded with.
    """
    same = all(a == b for a, b, n in zip(p.stride(), x.stride(), p.shape, strict=True) if n > 1)
    return x if same else torch.empty_like(p).copy_(x)


def parameter_groups(model: nn.Module, weight_decay: float, lars_exclude: str) -> list[dict[str, Any]]:
    """Split the trainable parameters into those adapted and decayed, and those that are neither.

    Excluded are all biases and BatchNorm weights ("bias_and_bn": MMSelfSup 1.x, the paper), or these but for
    the BatchNorm weights of shortcuts ("bias_and_bn_but_shortcut": MMSelfSup 0.x, whose pattern bn0 … bn3
    does not match `downsample.1`).
    """
    adapted, excluded = [], []
    for name, parameter in model.named_parameters():
        missed = lars_exclude == "bias_and_bn_but_shortcut" and name.endswith("downsample.1.weight")
        (excluded if parameter.ndim == 1 and not missed else adapted).append(parameter)
    return [
        {"params": adapted, "weight_decay": weight_decay, "lars_exclude": False},
        {"params": excluded, "weight_decay": 0.0, "lars_exclude": True},
    ]


def epoch_from_start(step: int, steps_per_epoch: int, epochs: int, lr: float, warmup_epochs: float) -> float:
    """MMSelfSup 0.x: cosine per epoch, whose phase counts from epoch 0; warm-up per step multiplies it."""
    warmup = round(warmup_epochs * steps_per_epoch)
    value = 0.5 * lr * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs))
    return value * (1 - (1 - step / warmup) * (1 - 1e-4)) if step < warmup else value


def epoch_after_warmup(
    step: int, steps_per_epoch: int, epochs: int, lr: float, warmup_epochs: float
) -> float:
    """MMSelfSup 1.x: warm-up per step, then cosine per epoch over the epochs that remain."""
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return lr * (1e-4 + (1 - 1e-4) * step / max(warmup - 1, 1))
    phase = max(step // steps_per_epoch - warmup_epochs, 0) / (epochs - warmup_epochs)
    return 0.5 * lr * (1 + math.cos(math.pi * phase))


def step_after_warmup(step: int, steps_per_epoch: int, epochs: int, lr: float, warmup_epochs: float) -> float:
    """google-research/simclr: warm-up from 0, then cosine, both per step."""
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return lr * step / warmup
    return 0.5 * lr * (1 + math.cos(math.pi * (step - warmup) / (epochs * steps_per_epoch - warmup)))


# `cosine` of a recipe → learning rate as a function of the step, counted from 0.
SCHEDULES = {
    "epoch_from_start": epoch_from_start,
    "epoch_after_warmup": epoch_after_warmup,
    "step_after_warmup": step_after_warmup,
}
