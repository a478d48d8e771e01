"""Derivatives of attention for the fuzzer, by torch.func or by leaves and dual numbers.

A derivative maps the named tensors of a problem to named results. Tensors:

    q, k, v, attn_mask          the inputs; with a t in front, their tangents
    c_out, c_lse, c_tout, c_mu  cotangents of the outputs
    h_x                         the direction along which, or the cotangent with which, the gradient
                                by x is differentiated

Results: out, lse, tout, mu; d_x is the gradient by x; t_y the tangent of a result y; dd_x the
gradient, by x, of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from tests.jvp_attn.attention_cases import Named

INPUTS = ("q", "k", "v", "attn_mask")

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class FuncTransforms:
    """jvp and vjp by torch.func."""

    @staticmethod
    def jvp(f: Function, x: Named, t: Named) -> tuple[Named, Named]:
        return torch.func.jvp(f, (x,), (t,))

    @staticmethod
    def vjp(f: Function, x: Named, c: Named) -> tuple[Named, Named]:
        y, pull = torch.func.vjp(f, x)
        return y, pull(dict(c))[0]


class Autograd:
    """jvp by dual numbers and vjp by leaves that require grad."""

    @staticmethod
    def jvp(f: Function, x: Named, t: Named) -> tuple[Named, Named]:
        with fwAD.dual_level():
            y = f({n: fwAD.make_dual(x[n], t[n]) for n in x})
            duals = {n: fwAD.unpack_dual(z) for n, z in y.items()}
            return (
                {n: d.primal for n, d in duals.items()},
                {n: torch.zeros_like(d.primal) if d.tangent is None else d.tangent
                 for n, d in duals.items()},
            )  # fmt: skip

    @staticmethod
    def vjp(f: Function, x: Named, c: Named) -> tuple[Named, Named]:
        leaves = {n: y if y.requires_grad else _leaf(y) for n, y in x.items()}
        y = f(leaves)
        used = [n for n in y if y[n].requires_grad]
        if not used:
            return y, {n: torch.zeros_like(z) for n, z in leaves.items()}
        gradients = torch.autograd.grad(
            [y[n] for n in used],
            [*leaves.values()],
            [c[n] for n in used],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return y, dict(zip(leaves, gradients, strict=True))


def _leaf(x: Tensor) -> Tensor:
    """x requiring grad, with the tangent that it has."""
    leaf = x.detach().requires_grad_()
    tangent = fwAD.unpack_dual(x).tangent if fwAD._current_level >= 0 else None
    return leaf if tangent is None else fwAD.make_dual(leaf, tangent)


class Attention:
    """An attention as a function of named tensors.

    Args:
        outputs: maps the named tensors to out and, if it has it, lse.
        outputs_and_tangents: maps them to out, lse, tout, mu; None if `outputs` is differentiated.
        transforms: `FuncTransforms` or `Autograd`.
        wrt: names of the inputs and tangents by which gradients are taken.
    """

    def __init__(
        self,
        outputs: Callable[[Named], tuple[Tensor, ...]],
        outputs_and_tangents: Callable[[Named], tuple[Tensor, ...]] | None,
        transforms: type[FuncTransforms] | type[Autograd],
        wrt: Sequence[str],
    ) -> None:
        self._outputs = outputs
        self._outputs_and_tangents = outputs_and_tangents
        self._transforms = transforms
        self._wrt = wrt

    def forward(self, x: Named) -> dict[str, Tensor]:
        return dict(zip(("out", "lse"), self._outputs(x), strict=False))

    def jvp(self, x: Named) -> dict[str, Tensor]:
        if self._outputs_and_tangents is not None:
            return dict(
                zip(("out", "tout", "lse", "mu"), self._outputs_and_tangents(x), strict=True)
            )
        names = [n for n in INPUTS if f"t{n}" in x]
        if not names:
            out, lse = self._outputs(x)
            return {"out": out, "lse": lse, "tout": 0 * out, "mu": torch.zeros_like(lse)}
        y, t = self._transforms.jvp(
            lambda p: self.forward({**x, **p}), part(x, names), {n: x[f"t{n}"] for n in names}
        )
        return {**y, **{{"out": "tout", "lse": "mu"}[n]: z for n, z in t.items()}}

    def backward(self, x: Named) -> dict[str, Tensor]:
        return self._gradients(self.forward, x)

    def backward_of_jvp(self, x: Named) -> dict[str, Tensor]:
        return self._gradients(self.jvp, x)

    def jvp_of_backward(self, x: Named) -> dict[str, Tensor]:
        names = [n.removeprefix("h_") for n in x if n.startswith("h_")]
        y, t = self._transforms.jvp(
            lambda p: self.backward({**x, **p}), part(x, names), {n: x[f"h_{n}"] for n in names}
        )
        return {**y, **{f"t_{n}": z for n, z in t.items()}}

    def backward_of_backward(self, x: Named) -> dict[str, Tensor]:
        names = [*self._wrt, *_cotangents(x)]
        directions = {f"d_{n}": x[f"h_{n}"] for n in self._wrt if f"h_{n}" in x}
        y, gradients = self._transforms.vjp(
            lambda p: part(self.backward({**x, **p}), directions), part(x, names), directions
        )
        return {**y, **{f"dd_{n}": z for n, z in gradients.items()}}

    def _gradients(self, f: Function, x: Named) -> dict[str, Tensor]:
        """The outputs that have a cotangent, and their gradients."""
        cotangents = {n.removeprefix("c_"): x[n] for n in _cotangents(x)}
        y, gradients = self._transforms.vjp(
            lambda p: part(f({**x, **p}), cotangents), part(x, self._wrt), cotangents
        )
        return {**y, **{f"d_{n}": z for n, z in gradients.items()}}


def _cotangents(x: Named) -> list[str]:
    return [n for n in x if n.startswith("c_")]


def part(x: Named, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors with these names."""
    return {n: x[n] for n in names}
