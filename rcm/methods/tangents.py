"""Settings of the methods whose loss contains a derivative of the student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from rcm.derivatives import Derivative, central_difference, exact_jvp, one_pass_jvp
from rcm.losses.loss import Norm
from rcm.training.method import Distillation
from rcm.validation import require_choice, require_integer, require_positive

Passes = Literal["one", "two"]


@dataclass(frozen=True, kw_only=True)
class WithDerivative(Distillation):
    """A method that differentiates the student in its input or in a time."""

    difference_step: float | None = None
    """Use a central difference with this step, in units of t, instead of the exact derivative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.difference_step is not None:
            require_positive(difference_step=self.difference_step)

    @property
    def derivative(self) -> Derivative:
        if self.difference_step is not None:
            return central_difference(self.difference_step)
        return exact_jvp


@dataclass(frozen=True, kw_only=True)
class WithTangent(WithDerivative):
    """A method that moves the student along a detached tangent, whose derivative is ramped up."""

    tangent_warmup: int
    """Iterations over which the second term of the tangent is ramped up."""
    passes: Passes | None = None
    """Evaluate the student once for F and its derivative, or twice, which leaves out samples on
    which it overflows. None is once where the derivative is a stopped JVP."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes is not None:
            require_choice(get_args(Passes), passes=self.passes)
        if self.passes == "one" and self.difference_step is not None:
            raise ValueError(
                "passes is 'one', but a central difference (difference_step) needs more "
                "evaluations of the student: leave out one of the two"
            )
        require_integer(0, tangent_warmup=self.tangent_warmup)

    @property
    def derivative(self) -> Derivative:
        if self.difference_step is None and self.passes != "two":
            return one_pass_jvp
        return super().derivative

    def shortened(self) -> Self:
        return replace(super().shortened(), tangent_warmup=1)

    def warmup(self, iteration: int) -> float:
        """Factor in [0, 1] of the second term of the tangent."""
        return min(1.0, iteration / max(1, self.tangent_warmup))


@dataclass(frozen=True, kw_only=True)
class WithNormalizedTangent(WithTangent):
    """A method whose tangent is normalised for each sample."""

    tangent_norm: Norm = "rms"
    """Norm that normalises the tangent: rms averages over the elements, l2 sums."""
    tangent_norm_eps: float = 0.1
    """Added to the norm of the tangent; c in the sCM paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(get_args(Norm), tangent_norm=self.tangent_norm)
        require_positive(tangent_norm_eps=self.tangent_norm_eps)
