"""A backend is chosen by `backend(name)` or by JVP_ATTN_BACKEND; backward passes keep it."""

import pytest
import torch
from attention_cases import Case
from torch import Tensor

import jvp_attn
from jvp_attn import flash_attn_jvp


def attention_of_q() -> tuple[Tensor, Tensor]:
    """Attention, and the q that it is differentiable in."""
    data = Case().primals()
    q = data["q"].requires_grad_()
    return flash_attn_jvp(q, data["k"], data["v"]), q


def thrice_differentiated(out: Tensor, q: Tensor) -> Tensor:
    """Only the backend `math` can be differentiated so often."""
    y = (out**3).sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y, q, create_graph=True)
        y = y.square().sum()
    return y


def test_blockwise_is_what_runs_automatically() -> None:
    assert jvp_attn.current_backend() == "automatic"
    assert jvp_attn.available_backends() == ("blockwise", "math")
    with pytest.raises(NotImplementedError):
        thrice_differentiated(*attention_of_q())


def test_backward_passes_keep_the_backend_of_their_forward_pass() -> None:
    with jvp_attn.backend("math"):
        by_math = attention_of_q()
    thrice_differentiated(*by_math)

    by_blocks = attention_of_q()
    with jvp_attn.backend("math"), pytest.raises(NotImplementedError):
        thrice_differentiated(*by_blocks)


def test_blocks_nest_and_end_also_where_one_raises() -> None:
    with jvp_attn.backend("math"):
        with jvp_attn.backend("blockwise"):
            assert jvp_attn.current_backend() == "blockwise"
        with pytest.raises(ZeroDivisionError), jvp_attn.backend("automatic"):
            raise ZeroDivisionError
        assert jvp_attn.current_backend() == "math"
    assert jvp_attn.current_backend() == "automatic"


def test_the_environment_chooses_where_no_block_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_BACKEND", "math")
    assert jvp_attn.current_backend() == "math"
    thrice_differentiated(*attention_of_q())
    with jvp_attn.backend("blockwise"), pytest.raises(NotImplementedError):
        thrice_differentiated(*attention_of_q())


def test_an_empty_environment_variable_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_BACKEND", "")
    assert jvp_attn.current_backend() == "automatic"


ALLOWED = "it must be one of automatic, blockwise, math"


def test_an_unknown_backend_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=f"backend is 'cuda9'; {ALLOWED}"),
        jvp_attn.backend("cuda9"),
    ):
        pass
    assert jvp_attn.current_backend() == "automatic"


def test_an_unknown_backend_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JVP_ATTN_BACKEND", "cuda9")
    with pytest.raises(ValueError, match=f"variable JVP_ATTN_BACKEND is 'cuda9'; {ALLOWED}"):
        attention_of_q()


def test_a_backend_without_maps_has_no_functions() -> None:
    options = jvp_attn.AttentionOptions(1.0, backend="math")
    with pytest.raises(ValueError, match="backend 'math' has no attention maps"):
        jvp_attn.FlashAttention.apply(*Case().primals().values(), options)
