"""Gradients of a model's parameters by name, and how two sets of them compare."""

import torch


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_all_close(given: dict, expected: dict, **tolerance: float) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


__all__ = ["assert_all_close", "gradients"]
