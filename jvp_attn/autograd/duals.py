"""Dual numbers: the inputs of attention and their tangents, apart."""

from __future__ import annotations

import torch.autograd.forward_ad as fwAD
from torch import Tensor

from jvp_attn.types import Inputs, Tangents
from jvp_attn.validation import check_tangents


def unpack_duals(inputs: Inputs, *, level: int | None = None) -> tuple[Inputs, Tangents]:
    """The primals and the tangents, None without one, of the current forward-mode level."""
    duals = {
        name: fwAD.unpack_dual(x, level=level) for name, x in differentiable_inputs(inputs).items()
    }
    primals = inputs._replace(**{name: dual.primal for name, dual in duals.items()})
    tangents = Tangents(**{name: dual.tangent for name, dual in duals.items()})
    check_tangents(primals, tangents)
    return primals, tangents


def differentiable_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that may have a tangent, by name."""
    present = {name: getattr(inputs, name) for name in Tangents._fields}
    return {x: t for x, t in present.items() if t is not None and t.is_floating_point()}
