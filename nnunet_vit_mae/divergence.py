"""Training that diverges stops before anything of it is saved, and says in which step and on which cases it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_vit_mae.errors import UserError

EXPLOSION = 100.0  # an epoch's loss, in units of the first one's, or of 1, which is about that of predicting nothing
BAD_LOSS, BAD_NORM = "The loss is {}", "The gradient norm is {}"  # clauses that begin the sentence of an error


class BadStep(NamedTuple):
    """A step, counted from 0, whose loss or gradient norm is not finite."""

    step: int
    by_gradient_alone: bool  # as on processes whose own batch was good
    clause: str


def first_bad_step(losses: Sequence[Tensor], norms: Sequence[Tensor]) -> BadStep | None:
    """Return the first bad one of some steps; their values may be on a GPU, which is waited for once."""
    values = torch.stack([torch.stack([*losses]), torch.stack([*norms])]).cpu()
    bad = (~values.isfinite()).any(dim=0).nonzero().flatten().tolist()
    if not bad:
        return None
    loss, norm = values[:, bad[0]].tolist()
    if math.isfinite(loss):
        return BadStep(bad[0], True, BAD_NORM.format(norm))
    return BadStep(bad[0], False, BAD_LOSS.format(loss))


def explosion(loss: float, first: float) -> str | None:
    """Return a clause if the mean loss of an epoch has exploded, given that of the first epoch, or of its first step.

    The step that follows in the sentence is that with the largest loss.
    """
    if loss > EXPLOSION * max(1.0, first):
        return f"The loss of an epoch was {first:.3g} and has grown to {loss:.3g}, most of all"
    return None


def divergence(
    what: str, step: str, cases: Sequence[str], volumes: Tensor | None, *, kept: str, advice: str
) -> UserError:
    """Return the error to raise.

    Args:
        what: Clause that begins the sentence.
        step: In which it was.
        cases: Names of the cases of the batch, one for each of its volumes.
        volumes: The batch (b ...), in which NaN and infinite voxels are looked for; None: it is gone.
        kept: What is kept, and where.
        advice: For volumes that hold numbers alone.
    """
    broken = []
    if volumes is not None:
        broken = [case for case, volume in zip(cases, volumes, strict=True) if not volume.isfinite().all()]
    if broken:
        advice = f"voxels of {_names(broken)} are NaN or infinite, so repair or leave out these images"
    return UserError(f"{what} in {step}, whose batch is of {_names(cases)}; {kept}: {advice}.")


def _names(cases: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(cases))
