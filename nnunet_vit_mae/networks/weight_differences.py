"""How saved weights differ from those of a network, by name, shape and type, and which of them are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from nnunet_vit_mae.errors import abbreviated


class WeightDifferences(NamedTuple):
    """Names of weights, in the order of the network, or for `unknown` of what was saved."""

    missing: list[str]
    unknown: list[str]
    reshaped: list[str]
    retyped: list[str]  # other numbers, such as float64; some have another shape too


def compare_weights(saved: Mapping[str, Any], expected: Mapping[str, Tensor]) -> WeightDifferences:
    """Compare saved weights with the state of a network; what is saved and no tensor counts as missing."""
    tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    common = [name for name in expected if name in tensors]
    return WeightDifferences(
        missing=[name for name in expected if name not in tensors],
        unknown=[name for name in saved if name not in expected],
        reshaped=[name for name in common if tensors[name].shape != expected[name].shape],
        retyped=[name for name in common if tensors[name].dtype != expected[name].dtype],
    )


def weights_difference(saved: Mapping[str, Any], network: nn.Module) -> str | None:
    """Return in words how saved weights differ in name or shape from what a network needs, or None if they fit."""
    expected = network.state_dict()
    found = compare_weights(saved, expected)
    if found.reshaped:
        name = found.reshaped[0]
        return f"{name} has the shape {tuple(saved[name].shape)} there, {tuple(expected[name].shape)} here"
    if found.missing:
        return f"{abbreviated(found.missing)} {'is' if len(found.missing) == 1 else 'are'} missing there"
    if found.unknown:
        return f"{abbreviated(map(str, found.unknown))} {'is' if len(found.unknown) == 1 else 'are'} unknown here"
    return None


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights with values that are NaN or infinite, or would be in fp32, as networks have them."""
    return [
        name for name, weight in weights.items() if weight.is_floating_point() and not weight.float().isfinite().all()
    ]
