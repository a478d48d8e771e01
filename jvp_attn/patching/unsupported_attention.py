"""Unsupported attention in `replace_sdpa`: it bypasses torch's function, so it raises.

It has no forward derivative, and some of it would drop a tangent silently. Most of it is operators,
which a TorchFunctionMode sees; their names identify them. The mode does not see Triton kernels and
the like; guards in the tables where libraries register their attention functions raise for those.
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
    """Where a library registers its attention functions, and the names of the unsupported ones."""

    module: str
    owner: str
    attribute: str
    unsupported: re.Pattern[str]
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


def raise_if_attention(name: str) -> None:
    """Raise if an operator of this name computes attention.

    Raises:
        NotImplementedError: it does.
    """
    if _ATTENTION.search(name) and not _HARMLESS.search(name):
        raise NotImplementedError(
            f"{name} was called inside replace_sdpa(): it computes attention, and has no forward "
            "derivative. Let the model call torch.nn.functional.scaled_dot_product_attention, or "
            "run what needs no derivative outside of replace_sdpa()"
        )


def guard_libraries(active: Callable[[], bool]) -> None:
    """Let unsupported attention of imported libraries raise NotImplementedError if `active()`.

    Cheap once the libraries are guarded. A library may be partially imported.
    """
    for table in _TABLES:
        owner = getattr(sys.modules.get(table.module), table.owner, None)
        functions = getattr(owner, table.attribute, {})
        if len(functions) != _guarded_sizes.get(table.module, 0):
            _guarded_sizes[table.module] = len(functions)
            for name, function in functions.items():
                if table.unsupported.match(name) and not hasattr(function, "guarded_by_jvp_attn"):
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
