"""The JVP of a DiT: what a training step costs with PyTorch's, with rcm's rules, written by hand.

    python benchmarks/dit_jvp.py [--repeats 31] [--out FOLDER]

Every part is timed for the DiT of the digits and for one of 49 tokens, batch 64, float32, on one
thread, in milliseconds of CPU time; the variants alternate. "one pass" is a JVP whose value carries
gradients and whose derivative is detached, and the backward pass; "through both" also goes back
through the derivative. Each is torch.func.jvp alone ("torch"), with rcm.jvp_rules ("rules"), and
a JVP of the same network written by hand with the fewest operations ("hand"). The cost that is
proportional to FLOPs is that of a forward pass for a JVP twice, and for one pass a forward pass
more than forward and backward. Also the time of operators in a profile, and of one iteration of
methods of the preset `digits` after their warm-up. Takes minutes. Writes dit_jvp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import environment
from rcm.presets.digits import config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from jvp_attn import flash_attn_with_tangent
from rcm.derivatives import exact_jvp, one_pass_jvp
from rcm.models.dit import Block, DiT
from rcm.training.trainer import Trainer, build_networks

BATCH = 64
SIZES: dict[str, dict[str, int]] = {
    "16 tokens": {"size": 8, "dim": 64, "depth": 3},
    "49 tokens": {"size": 14, "dim": 96, "depth": 4},
}
METHODS = ("scm", "rcm", "meanflow", "tvm")
PROFILED = ("jvp, torch", "jvp, rules", "one pass, torch", "one pass, rules")
Pair = tuple[Tensor, Tensor]
Tangents = Callable[[], AbstractContextManager[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {name: measured(size, options.repeats) for name, size in SIZES.items()}
    report = {
        **environment(),
        "batch": BATCH,
        "dtype": "float32",
        "sizes": sizes,
        "milliseconds_per_iteration": iterations(options.repeats),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "dit_jvp.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measured(size: dict[str, int], repeats: int) -> dict[str, Any]:
    """Medians, ratios to a forward pass, FLOPs and operators of each variant."""
    parts = variants(DiT(**size))
    milliseconds = medians(parts, repeats)
    forward = milliseconds["forward"]
    flops = {"jvp": 2 * forward, "one pass": milliseconds["forward, backward"] + forward}
    above = {
        name: round(value - flops[name.partition(",")[0]], 2)
        for name, value in milliseconds.items()
        if name.partition(",")[0] in flops
    }
    return {
        "size": size,
        "milliseconds": milliseconds,
        "ratio_to_forward": {name: round(x / forward, 2) for name, x in milliseconds.items()},
        "milliseconds_above_flops": above,
        "flops": {name: counted_flops(part) for name, part in parts.items()},
        "operators": {name: operators(parts[name]) for name in PROFILED},
    }


# ---- the parts ---------------------------------------------------------------------------------


def variants(net: DiT) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    x, tx = torch.randn(2, BATCH, 1, net.size, net.size)
    t, tt = torch.rand(2, BATCH)
    labels = torch.randint(10, (BATCH,))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, labels)

    def torchs() -> Pair:
        return torch.func.jvp(network, (x, t), (tx, tt))  # type: ignore[no-any-return]

    def rules() -> Pair:
        return exact_jvp(network, (x, t), (tx, tt))

    def rules_once() -> Pair:
        return one_pass_jvp(network, (x, t), (tx, tt))

    def hand(tangents: Tangents = nullcontext) -> Pair:
        return hand_written_jvp(net, x, t, labels, tx, tt, tangents)

    def forward_and_backward() -> None:
        network(x, t).square().sum().backward()

    require_equal(torchs(), rules(), hand())
    of_value, of_both = partial(backward, both=False), partial(backward, both=True)
    return {
        "forward": partial(without_grad, partial(network, x, t)),
        "forward, backward": forward_and_backward,
        "jvp, torch": partial(without_grad, torchs),
        "jvp, rules": partial(without_grad, rules),
        "jvp, hand": partial(without_grad, hand),
        "one pass, torch": partial(of_value, torchs),
        "one pass, rules": partial(of_value, rules_once),
        "one pass, hand": partial(of_value, partial(hand, torch.no_grad)),
        "through both, torch": partial(of_both, torchs),
        "through both, rules": partial(of_both, rules),
        "through both, hand": partial(of_both, hand),
    }


def without_grad(function: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return function()


def backward(jvp: Callable[[], Pair], *, both: bool) -> None:
    value, derivative = jvp()
    loss = value.square().sum()
    (loss + derivative.square().sum() if both else loss).backward()


def require_equal(expected: Pair, *found: Pair) -> None:
    for pair in found:
        torch.testing.assert_close(pair, expected, rtol=1e-4, atol=1e-5)


# ---- measurements ------------------------------------------------------------------------------


def medians(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time; the parts alternate."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 2):
        for name, part in parts.items():
            start = time.process_time()
            part()
            if repeat >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: round(statistics.median(x), 2) for name, x in times.items()}


def counted_flops(part: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        part()
    return int(counter.get_total_flops())


def operators(part: Callable[[], Any], repeats: int = 5) -> dict[str, Any]:
    """Shares of the time of operators in a profile; the rest is Python and autograd's engine."""
    part()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(repeats):
            part()
        total = 1e6 * (time.perf_counter() - start)
    events = profiled.key_averages()

    def share(*names: str) -> float:
        return round(sum(e.self_cpu_time_total for e in events if e.key in names) / total, 3)

    matrix_products = share("aten::mm", "aten::addmm", "aten::bmm")
    attention = [e.key for e in events if e.key.startswith("jvp_attn::")]
    elementwise = ("add", "add_", "mul", "mul_", "sub", "div", "addcmul", "gelu", "gelu_backward")
    elementwise += ("silu", "silu_backward", "sigmoid", "sum", "mean", "pow", "rsqrt", "copy_")
    elementwise += ("native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm")
    return {
        "calls": sum(e.count for e in events if e.key.startswith("aten::")) // repeats,
        "matrix_products": matrix_products,
        "attention": share(*attention),
        "elementwise_and_norms": share(*(f"aten::{name}" for name in elementwise)),
    }


def iterations(repeats: int) -> dict[str, float]:
    """Milliseconds of an iteration of each method of the digits, with every loss active."""
    return medians({name: trainer(name).step for name in METHODS}, repeats)


def trainer(method: str) -> Trainer:
    settings = config(method)
    networks = build_networks(settings.student.roles(), lambda start: settings.build_network())
    built = Trainer("student", settings.student, networks, settings.load_data(), seed=1)
    built.iteration = settings.student.iterations // 2
    return built


# ---- a JVP of the DiT written by hand ----------------------------------------------------------


def hand_written_jvp(
    net: DiT, x: Tensor, t: Tensor, labels: Tensor, tx: Tensor, tt: Tensor, tangents: Tangents
) -> Pair:
    """F and its derivative, from tensors without duals; `tangents` is entered for those."""
    p = net.patch

    def patches(x: Tensor) -> Tensor:
        h = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (b, c, rows, p, columns, q)
        return h.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    h, th = linear(net.tokens_in, (patches(x), patches(tx)), tangents)
    h = h + net.positions
    frequencies = net.time.features.frequencies
    angle, rate = t[:, None] * frequencies, tt[:, None] * frequencies
    cos, sin = angle.cos(), angle.sin()
    features = torch.cat([cos, sin], 1), torch.cat([-sin * rate, cos * rate], 1)
    e, te = mlp(net.time.mlp, features, tangents)
    e = e + net.label(labels)
    for block in net.blocks:
        assert isinstance(block, Block)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(
            block.modulation, (e, te), tangents
        )
        attended = attention(block, adaptive((h, th), shift_a, scale_a, tangents), tangents)
        h, th = fused((h, th), gate_a, attended, tangents)
        hidden = mlp(block.mlp, adaptive((h, th), shift_m, scale_m, tangents), tangents)
        h, th = fused((h, th), gate_m, hidden, tangents)
    shift, scale = modulation(net.modulation, (e, te), tangents)
    out, tout = linear(net.tokens_out, adaptive((h, th), shift, scale, tangents), tangents)
    return net._image(out), net._image(tout)


def linear(layer: nn.Module, x: Pair, tangents: Tangents) -> Pair:
    assert isinstance(layer, nn.Linear)
    with tangents():
        ty = nn.functional.linear(x[1], layer.weight)
    return nn.functional.linear(x[0], layer.weight, layer.bias), ty


def activation(layer: nn.Module, x: Pair, tangents: Tangents) -> Pair:
    with tangents():
        if isinstance(layer, nn.GELU):
            ty = torch.ops.aten.gelu_backward(x[1], x[0])
        elif torch.is_grad_enabled():
            s = torch.sigmoid(x[0])
            ty = x[1] * (s * (1 + x[0] * (1 - s)))
        else:
            ty = torch.ops.aten.silu_backward(x[1], x[0])
    return layer(x[0]), ty


def mlp(layers: nn.Sequential, x: Pair, tangents: Tangents) -> Pair:
    hidden = activation(layers[1], linear(layers[0], x, tangents), tangents)
    return linear(layers[2], hidden, tangents)


def modulation(layer: Any, e: Pair, tangents: Tangents) -> list[Pair]:
    y, ty = linear(layer.linear, activation(nn.SiLU(), e, tangents), tangents)
    chunks = (z[:, None].chunk(layer.chunks, dim=-1) for z in (y, ty))
    return list(zip(*chunks, strict=True))


def fused(a: Pair, b: Pair, c: Pair, tangents: Tangents) -> Pair:
    """a + b c."""
    with tangents():
        tangent = torch.addcmul(torch.addcmul(a[1], b[1], c[0]), b[0], c[1])
    return torch.addcmul(a[0], b[0], c[0]), tangent


def adaptive(h: Pair, shift: Pair, scale: Pair, tangents: Tangents) -> Pair:
    n, mean, rstd = torch.native_layer_norm(h[0], h[0].shape[-1:], None, None, 1e-5)
    with tangents():
        tn = torch.ops.aten.native_layer_norm_backward(
            h[1], h[0], h[0].shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
    return fused(shift, (n, tn), (1 + scale[0], scale[1]), tangents)


def rms_norm(layer: nn.RMSNorm, x: Pair, tangents: Tangents) -> Pair:
    with tangents():
        r = torch.rsqrt((x[0] * x[0]).mean(-1, keepdim=True) + layer.eps)
        n = x[0] * r
        tn = torch.addcmul(x[1], n, (n * x[1]).mean(-1, keepdim=True), value=-1)
        tn = tn * (r * layer.weight)
    return layer(x[0]), tn


def attention(block: Block, h: Pair, tangents: Tangents) -> Pair:
    layer = block.attention
    qkv = linear(layer.qkv, h, tangents)
    parts = (z.unflatten(-1, (3, layer.heads, -1)).unbind(2) for z in qkv)
    query, key, value = zip(*parts, strict=True)
    query = rms_norm(layer.norm_query, query, tangents)
    key = rms_norm(layer.norm_key, key, tangents)
    primals, directions = zip(query, key, value, strict=True)
    out, tout, *_ = flash_attn_with_tangent(*primals, *directions)
    with tangents():
        tout = tout.flatten(2)
    return linear(layer.out, (out.flatten(2), tout), tangents)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
