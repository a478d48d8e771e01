"""The flat arguments and results of the primitives, generated from the fields of `jvp_attn.types`.

torch's Functions and operators take tensors one by one. A `Signature` says which groups of tensors
a primitive takes, one after another, and converts between the groups and the flat list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import Tensor

from jvp_attn.types import (
    Cotangents,
    Gradients,
    Inputs,
    JvpCotangents,
    JvpOutputs,
    Needs,
    Outputs,
    Tangents,
)

# What the operators' schemas put before the name of a field.
_PREFIXES: dict[type, str] = {Tangents: "t", Cotangents: "grad_", JvpCotangents: "grad_"}


@dataclass(frozen=True)
class Signature:
    """What one primitive takes and returns.

    Attributes:
        arguments: groups of tensors, NamedTuples of `jvp_attn.types`. Other arguments follow:
            the needs, if the results are gradients, and the options.
        results: groups of tensors.
    """

    arguments: tuple[type[Any], ...]
    results: tuple[type[Any], ...]

    def unpack(self, flat: Sequence[Any]) -> list[Any]:
        """From flat arguments to groups; other arguments follow as they are.

        Also for what has one entry per argument, such as `ctx.needs_input_grad`.
        """
        groups, start = [], 0
        for group in self.arguments:
            stop = start + len(group._fields)
            groups.append(group(*flat[start:stop]))
            start = stop
        return [*groups, *flat[start:]]

    def position(self, group: type, field: str) -> int | None:
        """Where a field is among the flat arguments; None if the primitive does not take it."""
        fields = [(g, name) for g in self.arguments for name in g._fields]
        return fields.index((group, field)) if (group, field) in fields else None

    def needs(self, needs_input_grad: Sequence[bool]) -> Needs:
        """Which gradients of the inputs, and of the tangents if it takes some, are needed."""
        needed = dict(zip(self.arguments, self.unpack(needs_input_grad), strict=False))
        return *needed[Inputs].primals, *needed.get(Tangents, ())

    def gradients(
        self, gradients: Mapping[type, tuple[Any, ...]], n_arguments: int
    ) -> tuple[Tensor | None, ...]:
        """What a backward rule returns: a gradient for each flat argument, None for most.

        Args:
            gradients: for groups of arguments, a NamedTuple with some of the same fields.
            n_arguments: how many flat arguments there are, with those that are no tensors.
        """
        flat = [
            getattr(gradients.get(group), field, None)
            for group in self.arguments
            for field in group._fields
        ]
        return (*flat, *(n_arguments - len(flat)) * (None,))

    def schema(self, options: str) -> str:
        """The schema of the operator, which takes the options as scalars."""
        arguments = [
            f"{_schema_type(hint)} {_PREFIXES.get(group, '')}{name}"
            for group in self.arguments
            for name, hint in get_type_hints(group).items()
        ]
        n_results = sum(len(group._fields) for group in self.results)
        if self.results[0] is Gradients:
            arguments.append(f"bool[{n_results}] needs")
        # Absent results are None all the same: torch takes "Tensor?" for a result that it cannot
        # batch by itself.
        results = ", ".join(["Tensor"] * n_results)
        return f"({', '.join(arguments)}, {options}) -> ({results})"


def _schema_type(hint: Any) -> str:
    return "Tensor" if hint is Tensor else "Tensor?"


FORWARD = Signature((Inputs,), (Outputs,))
FORWARD_JVP = Signature((Inputs, Tangents), (JvpOutputs,))
BACKWARD = Signature((Inputs, Outputs, Cotangents), (Gradients,))
JVP_BACKWARD = Signature((Inputs, Tangents, JvpOutputs, JvpCotangents), (Gradients, Gradients))
