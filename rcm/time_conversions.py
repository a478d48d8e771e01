"""Conversions between TrigFlow's t and the time variables of other papers.

TrigFlow, EDM and rectified flow are one path up to a scale. They differ in how they name a noise
level:

    TrigFlow        cos(t) x0/σd + sin(t) z   t in [0, π/2]
    EDM             x0 + σ ε                  σ = σd tan(t)
    rectified flow  (1 - u) x0 + u ε          u = σd sin(t) / (cos(t) + σd sin(t))
    VP (DDPM)       √ᾱ x0 + √(1 - ᾱ) ε        timesteps 0, 1, ... with a table of ᾱ

A conversion keeps the signal-to-noise ratio. σd is the standard deviation of the data. For VP it is
1, so that ᾱ = cos²(t).
"""

import torch
from torch import Tensor


def sigma_from_t(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """EDM noise level σ = σd tan(t) of x0 + σ ε, the same path up to the scale cos(t)."""
    return sigma_data * torch.tan(t)


def t_from_sigma(sigma: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The inverse, t = atan(σ / σd); σ = inf is π/2."""
    return torch.atan(sigma / sigma_data)


def t_from_signal_noise(signal: Tensor, noise: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The t of the same signal-to-noise ratio as a·x0 + s·ε, ε ~ N(0, 1), x0 in data units."""
    return torch.atan2(noise, sigma_data * signal)


def t_from_u(u: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The t of rectified flow's u in [0, 1], whose path is (1 - u) x0 + u ε."""
    return t_from_signal_noise(1 - u, u, sigma_data)


def u_from_t(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """The inverse, u = σd sin(t) / (cos(t) + σd sin(t))."""
    noise = sigma_data * torch.sin(t)
    return noise / (torch.cos(t) + noise)


class VPSchedule:
    """Timesteps of a variance-preserving diffusion (DDPM, 2006.11239), and TrigFlow's t.

    Timestep i = 0, 1, ..., N - 1 has the t_i with cos²(t_i) = ᾱ_i, for data with σd = 1. In between
    t is linear in the timestep, so that both conversions are exact inverses. They take (batch,)
    tensors and return float64.

    alphas_cumprod: the ᾱ of all timesteps (N,), for example `scheduler.alphas_cumprod` of a
    diffusers scheduler. Raises ValueError unless they decrease strictly within [0, 1].
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        signal = alphas_cumprod.detach().double().cpu()
        if signal.ndim != 1 or len(signal) < 2:
            raise ValueError(
                f"alphas_cumprod has shape {tuple(signal.shape)}; expected (timesteps,), at least 2"
            )
        inside = bool(((signal >= 0) & (signal <= 1)).all())
        if not inside or not bool((signal.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly and lie in [0, 1]")
        self.times = torch.atan2(torch.sqrt(1 - signal), torch.sqrt(signal))

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, timesteps: int = 1000
    ) -> "VPSchedule":
        """β from beta_start to beta_end in equal steps, ᾱ_i = Π (1 - β); defaults of DDPM."""
        return cls._from_betas(torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, timesteps: int = 1000
    ) -> "VPSchedule":
        """√β in equal steps; defaults of Stable Diffusion 1, 2 and XL."""
        root = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64)
        return cls._from_betas(root.square())

    @classmethod
    def _from_betas(cls, betas: Tensor) -> "VPSchedule":
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("betas must lie in (0, 1]")
        return cls(torch.cumprod(1 - betas, dim=0))

    def t(self, timestep: Tensor) -> Tensor:
        """t of integer or real timesteps. Raises ValueError outside of [0, N - 1]."""
        steps = torch.arange(len(self.times), dtype=torch.float64)
        return _interpolate(timestep, steps, self.times, "timestep")

    def timestep(self, t: Tensor) -> Tensor:
        """The inverse, a real timestep. Raises ValueError outside of [t_0, t_(N - 1)]."""
        steps = torch.arange(len(self.times), dtype=torch.float64)
        return _interpolate(t, self.times, steps, "t")


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor, name: str) -> Tensor:
    """Piecewise linear through increasing points (xs, ys); x (batch,) -> (batch,) float64."""
    x, xs, ys = x.double(), xs.to(x.device), ys.to(x.device)
    low, high = xs[0], xs[-1]
    slack = 1e-7 * high  # the rounding of float32
    if not bool(((x >= low - slack) & (x <= high + slack)).all()):
        raise ValueError(
            f"{name} lies in [{x.min().item():.6g}, {x.max().item():.6g}]; this schedule has "
            f"{name}s in [{low.item():.6g}, {high.item():.6g}]"
        )
    left = (torch.searchsorted(xs, x.detach().contiguous(), right=True) - 1).clamp(0, len(xs) - 2)
    fraction = (x - xs[left]) / (xs[left + 1] - xs[left])
    return ys[left] + fraction * (ys[left + 1] - ys[left])
