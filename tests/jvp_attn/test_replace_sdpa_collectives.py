"""Inside `replace_sdpa()`, a collective on a tensor with a tangent raises: it would drop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.func import grad, jvp, vmap

from jvp_attn import replace_sdpa
from tests.jvp_attn.attention_cases import Tensors, assert_close, named, randn
from tests.jvp_attn.compile_cases import in_one_graph

pytestmark = [
    pytest.mark.xdist_group("ranks"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

X, TX = randn(4, 3, seed="x"), randn(4, 3, seed="tx")
Function = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """This process is the only rank, so that each collective is the identity."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def waited(y: Tensor) -> Tensor:
    return y.wait() if isinstance(y, funcol.AsyncCollectiveTensor) else y


def into(collective: Callable[[Tensor, Tensor], Any]) -> Function:
    """Of a collective that writes its result to its first argument."""

    def f(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        collective(out, x.contiguous())
        return out

    return f


def in_place(collective: Callable[[Tensor], Any]) -> Function:
    def f(x: Tensor) -> Tensor:
        x = x.clone()
        collective(x)
        return x

    return f


def world() -> Any:
    return dist.group.WORLD


COLLECTIVES: dict[str, Function] = {
    "functional all_reduce": lambda x: waited(funcol.all_reduce(x, "sum", world())),
    "functional all_gather_tensor": lambda x: waited(funcol.all_gather_tensor(x, 0, world())),
    "functional all_gather_tensor_autograd": (
        lambda x: waited(funcol.all_gather_tensor_autograd(x, 0, world()))
    ),
    "functional reduce_scatter_tensor": (
        lambda x: waited(funcol.reduce_scatter_tensor(x, "sum", 0, world()))
    ),
    "functional reduce_scatter_tensor_autograd": (
        lambda x: waited(funcol.reduce_scatter_tensor_autograd(x, "sum", 0, world()))
    ),
    "functional all_to_all_single": (
        lambda x: waited(funcol.all_to_all_single(x, None, None, world()))
    ),
    "functional all_to_all_single_autograd": (
        lambda x: waited(funcol.all_to_all_single_autograd(x, [4], [4], world()))
    ),
    "functional broadcast": lambda x: waited(funcol.broadcast(x, 0, world())),
    "functional all_reduce_coalesced": (
        lambda x: waited(funcol.all_reduce_coalesced([x], "sum", world())[0])
    ),
    "all_reduce": in_place(dist.all_reduce),
    "broadcast": in_place(lambda x: dist.broadcast(x, 0)),
    "reduce": in_place(lambda x: dist.reduce(x, 0)),
    "all_gather": into(lambda out, x: dist.all_gather([out], x)),
    "gather": into(lambda out, x: dist.gather(x, [out])),
    "scatter": into(lambda out, x: dist.scatter(out, [x])),
    "reduce_scatter": into(lambda out, x: dist.reduce_scatter(out, [x])),
    "all_to_all": into(lambda out, x: dist.all_to_all([out], [x])),
    "all_to_all_single": into(dist.all_to_all_single),
    "all_gather_into_tensor": into(dist.all_gather_into_tensor),
    "reduce_scatter_tensor": into(dist.reduce_scatter_tensor),
}
# These need two ranks.
OF_TWO_RANKS: dict[str, Function] = {
    "functional permute_tensor": lambda x: waited(funcol.permute_tensor(x, [0], world())),
    "send": in_place(lambda x: dist.send(x, 1)),
    "isend": in_place(lambda x: dist.isend(x, 1)),
    "recv": in_place(lambda x: dist.recv(x, 1)),
    "irecv": in_place(lambda x: dist.irecv(x, 1)),
}
ALL = COLLECTIVES | OF_TWO_RANKS
if torch.__version__ < "2.13":
    ALL = {name: f for name, f in ALL.items() if name.startswith("functional")}


def by_jvp(f: Function) -> Any:
    return jvp(f, (X,), (TX,))


def by_dual_numbers(f: Function) -> Any:
    with fwAD.dual_level():
        return f(fwAD.make_dual(X, TX))


@pytest.mark.parametrize("collective", ALL)
@pytest.mark.parametrize("along", [by_jvp, by_dual_numbers])
def test_a_collective_on_a_tangent_raises(
    collective: str, along: Callable[[Function], Any]
) -> None:
    with (
        replace_sdpa(),
        pytest.raises(NotImplementedError, match=r"with a tangent, which it would drop"),
    ):
        along(ALL[collective])


NESTED: dict[str, Callable[[Function], Any]] = {
    "vmap of jvp": lambda f: vmap(lambda tx: jvp(f, (X,), (tx,)))(torch.stack([TX, X])),
    "jvp of vmap": lambda f: jvp(vmap(f), (torch.stack([X, X]),), (torch.stack([TX, X]),)),
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (TX,))[1].sum())(X),
    "jvp of grad": lambda f: jvp(grad(lambda x: f(x).sum()), (X,), (TX,)),
    "jvp of jvp": lambda f: jvp(lambda x: jvp(lambda y: f(x) + y, (X,), (TX,))[0], (X,), (TX,)),
}


@pytest.mark.parametrize("transforms", NESTED)
def test_a_tangent_of_any_transform_raises(transforms: str) -> None:
    with replace_sdpa(), pytest.raises(NotImplementedError, match="with a tangent"):
        NESTED[transforms](COLLECTIVES["functional all_reduce"])


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_collective_without_a_tangent_works(collective: str) -> None:
    with replace_sdpa():
        assert torch.equal(COLLECTIVES[collective](X), X)


@pytest.mark.parametrize("collective", ["all_gather_into_tensor", "functional all_reduce"])
def test_a_collective_without_a_tangent_works_inside_of_a_jvp(collective: str) -> None:
    """FSDP2 gathers parameters there."""

    def f(x: Tensor) -> Tensor:
        return x * COLLECTIVES[collective](X.sin())

    with replace_sdpa():
        outputs = jvp(f, (X,), (TX,))
    assert_close(named(outputs), {"[0]": X * X.sin(), "[1]": TX * X.sin()})


class Reduced(torch.autograd.Function):
    """The sum over all ranks, with its derivatives."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return COLLECTIVES["functional all_reduce"](x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return Reduced.apply(cotangent)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return Reduced.apply(tangent)


@pytest.mark.parametrize("around", [nullcontext, replace_sdpa])
def test_a_function_with_a_jvp_rule_may_call_it(around: Any) -> None:
    with around():
        outputs = jvp(Reduced.apply, (X,), (TX,))
        with fwAD.dual_level():
            duals = fwAD.unpack_dual(Reduced.apply(fwAD.make_dual(X, TX)))
        hessian = jvp(grad(lambda x: (Reduced.apply(x) ** 3).sum()), (X,), (TX,))
    assert_close(named(outputs), {"[0]": X, "[1]": TX})
    assert_close(named(tuple(duals)), {"[0]": X, "[1]": TX})
    assert_close(named(hessian), {"[0]": 3 * X**2, "[1]": 6 * X * TX})


@pytest.mark.parametrize("collective", ["functional all_reduce", "all_gather_into_tensor"])
def test_a_compiled_collective_raises_or_works(collective: str, fresh_compiler: None) -> None:
    f = COLLECTIVES[collective]

    def along(x: Tensor, tx: Tensor) -> Tensors:
        return jvp(f, (x,), (tx,))

    with replace_sdpa():
        assert torch.equal(in_one_graph(f)(X), X)
        with pytest.raises(NotImplementedError, match="with a tangent"):
            torch.compile(along, backend="aot_eager")(X, TX)


def test_outside_of_the_block_nothing_changes() -> None:
    """If torch gets derivatives here, the guard is no longer needed."""
    _, tangent = by_jvp(COLLECTIVES["functional all_reduce"])
    assert not tangent.any()
