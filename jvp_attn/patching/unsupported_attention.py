"""What `replace_sdpa` refuses: attention that does not go through torch's function.

None of it has a forward derivative, and some would lose a tangent without a word. Most of it is
operators, which a TorchFunctionMode sees, and which are known by their names. What is no operator,
such as a Triton kernel, it does not see: that is refused by guards in the tables by which libraries
choose their attention.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

_ATTENTION = re.compile(r"attention|attn|flash|xformers")
_HARMLESS = re.compile(r"^jvp_attn\.|attention_math|backward|bwd")


class _Table(NamedTuple):
    """Where a library keeps its attention functions by their names, and which of them to refuse."""

    module: str
    owner: str
    attribute: str
    refused: re.Pattern[str]
    remedy: str


_TABLES = (
    _Table(
        "diffusers.models.attention_dispatch",
        "_AttentionBackendRegistry",
        "_backends",
        re.compile(r"(?!_?native(_cudnn|_efficient|_flash|_math)?$)"),
        "call model.set_attention_backend('native')",
    ),
    _Table(
        "transformers.modeling_utils",
        "AttentionInterface",
        "_global_mapping",
        re.compile(r".*(flash|flex|/)"),  # kernels from the hub have a slash
        "call model.set_attn_implementation('sdpa')",
    ),
)
_guarded_sizes: dict[str, int] = {}


def refuse_attention(operator: Any) -> None:
    """Check an operator of torch or of another library.

    Raises:
        NotImplementedError: it computes attention, by its name.
    """
    name = str(operator)
    if _ATTENTION.search(name) and not _HARMLESS.search(name):
        raise NotImplementedError(
            f"{name} was called inside replace_sdpa(): it computes attention, and has no forward "
            "derivative. Let the model call torch.nn.functional.scaled_dot_product_attention, or "
            "run what needs no derivative outside of replace_sdpa()"
        )


def guard_libraries(active: Callable[[], bool]) -> None:
    """Let the libraries that are imported raise NotImplementedError where `active()`.

    Cheap once they are guarded. A library may be in the middle of being imported.
    """
    for table in _TABLES:
        owner = getattr(sys.modules.get(table.module), table.owner, None)
        functions = getattr(owner, table.attribute, {})
        if len(functions) != _guarded_sizes.get(table.module, 0):
            _guarded_sizes[table.module] = len(functions)
            for name, function in functions.items():
                if table.refused.match(name) and not hasattr(function, "guarded_by_jvp_attn"):
                    functions[name] = _guarded(function, name, table, active)


def _guarded(
    function: Callable[..., Any], name: str, table: _Table, active: Callable[[], bool]
) -> Callable[..., Any]:
    library = table.module.partition(".")[0]
    message = (
        f"attention of {library} is set to {getattr(name, 'value', name)!r}, which does not go "
        "through torch.nn.functional.scaled_dot_product_attention and has no forward derivative: "
        f"{table.remedy}, or run what needs no derivative outside of replace_sdpa()"
    )

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if active():
            raise NotImplementedError(message)
        return function(*args, **kwargs)

    guarded.guarded_by_jvp_attn = True  # type: ignore[attr-defined]
    return guarded
