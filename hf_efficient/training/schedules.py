"""The learning rates and optimisers of the papers, as settings of transformers' `Trainer`.

Each function returns fields of `TrainingArguments`; where a paper's schedule is a function that transformers has, its
own is used. n is the number of updates made so far, d the model's hidden_size.

    settings = evolved_transformer(hidden_size=512, max_steps=100_000)
    args = PairTrainingArguments("runs/et", max_steps=100_000, **settings)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Adam of tensor2tensor's Transformers: no weight decay, no clipping.
TENSOR2TENSOR_ADAM = {
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.997,
    "adam_epsilon": 1e-9,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}
# tensor2tensor's `learning_rate_constant` and `learning_rate_warmup_steps`.
CONSTANT = 2.0
WARMUP_STEPS = 8000


def transformer(hidden_size: int, max_steps: int, warmup_steps: int = WARMUP_STEPS) -> dict[str, Any]:
    """Linear warm-up, then the inverse square root: 2 d^-1/2 min(1, n/w) max(n, w)^-1/2.

    Vaswani et al. 2017, section 5.3, with the constants of tensor2tensor. `max_steps` plays no part in it.
    """
    _check(hidden_size=hidden_size, max_steps=max_steps, warmup_steps=warmup_steps)
    return {
        **TENSOR2TENSOR_ADAM,
        "learning_rate": peak(hidden_size, warmup_steps),
        "lr_scheduler_type": "inverse_sqrt",
        "warmup_steps": warmup_steps,
    }


def evolved_transformer(hidden_size: int, max_steps: int, warmup_steps: int = WARMUP_STEPS) -> dict[str, Any]:
    """Linear warm-up, then half a cosine to 0: 2 (d w)^-1/2 min(1, n/w) (1 + cos(pi (n - w)+ / (N - w))) / 2.

    tensor2tensor's settings for base, big and deep; its authors call them a stand-in for the paper's Adafactor.
    """
    _check(hidden_size=hidden_size, max_steps=max_steps, warmup_steps=warmup_steps)
    _check_before_end(warmup_steps, max_steps)
    return {
        **TENSOR2TENSOR_ADAM,
        "learning_rate": peak(hidden_size, warmup_steps),
        "lr_scheduler_type": "cosine",
        "warmup_steps": warmup_steps,
    }


def evolved_transformer_tiny(hidden_size: int, max_steps: int, warmup_steps: int = WARMUP_STEPS) -> dict[str, Any]:
    """As `evolved_transformer` without the warm-up's factor: the peak for w updates, then half a cosine to 0."""
    _check(hidden_size=hidden_size, max_steps=max_steps, warmup_steps=warmup_steps)
    _check_before_end(warmup_steps, max_steps)
    return {
        **TENSOR2TENSOR_ADAM,
        "learning_rate": peak(hidden_size, warmup_steps),
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": max_steps - warmup_steps, "decay_type": "cosine"},
        "warmup_steps": 0,
    }


def meena(hidden_size: int, max_steps: int, warmup_steps: int = 10_000) -> dict[str, Any]:
    """Adafactor at 0.01 for w updates, then the inverse square root: 0.01 min(1, (w/n)^1/2).

    Adiwardana et al. 2020, section 3.3. Neither `hidden_size` nor `max_steps` plays a part in it.
    """
    _check(hidden_size=hidden_size, max_steps=max_steps, warmup_steps=warmup_steps)
    return {
        "optim": "adafactor",
        "learning_rate": 0.01,
        "constant_steps": warmup_steps,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }


# The papers' settings by name, from the model's width and the number of updates.
SCHEDULES: dict[str, Callable[..., dict[str, Any]]] = {
    "transformer": transformer,
    "evolved_transformer": evolved_transformer,
    "evolved_transformer_tiny": evolved_transformer_tiny,
    "meena": meena,
}


def peak(hidden_size: int, warmup_steps: int) -> float:
    """The highest learning rate: 2 (d w)^-1/2."""
    return CONSTANT * (hidden_size * warmup_steps) ** -0.5


def constant_then_inverse_sqrt(optimizer: Optimizer, num_constant_steps: int) -> LambdaLR:
    """The optimiser's learning rate times min(1, (w/n)^1/2), w being `num_constant_steps`."""
    return LambdaLR(optimizer, partial(_constant_then_inverse_sqrt, num_constant_steps=num_constant_steps))


def _constant_then_inverse_sqrt(step: int, num_constant_steps: int) -> float:
    return (num_constant_steps / max(step, num_constant_steps)) ** 0.5


def _check(**arguments: int) -> None:
    """Raises ValueError for the first that is below 1."""
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def _check_before_end(warmup_steps: int, max_steps: int) -> None:
    if warmup_steps >= max_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be less than max_steps={max_steps}, after which the learning rate is "
            "0; make more updates, or give fewer warm-up steps."
        )
