"""Four metrics of sample quality. They need no network, and samples of any shape.

A distillation loss does not measure sample quality (sCM's is nearly constant by construction), so
runs are judged by these metrics.
"""

import torch
from torch import Tensor

from rcm.trigflow import check_like


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μa - μb‖² + tr(Σa + Σb - 2 (Σa Σb)^½) of two feature sets (FID's formula, 1706.08500).

    a: (n, dim), b: (m, dim), n and m ≥ 2; computed in float64. Two finite samples of one
    distribution have a positive distance; report it as a baseline. Raises ValueError for other
    shapes or non-finite features.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be (n, dim) and (m, dim) with n, m ≥ 2, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features contain NaN or infinity")
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a.double()), _moments(b.double())
    # Σa Σb has the same eigenvalues as the symmetric Σa^½ Σb Σa^½. Covariances of few samples are
    # singular, and rounding makes their zero eigenvalues negative.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


def same_noise_rmse(samples: Tensor, teacher_samples: Tensor) -> float:
    """Root mean square of samples - teacher_samples, both (n, ...), from the same noise.

    If the teacher follows its ODE accurately, this measures consistency directly, without features.
    """
    check_like("samples", samples, "teacher_samples", teacher_samples)
    return float((samples.double() - teacher_samples.double()).square().mean().sqrt())


def label_agreement(logits: Tensor, labels: Tensor) -> float:
    """Fraction of samples that a classifier assigns to the class they were generated for.

    logits: (n, classes); labels: (n,) int64.
    """
    predicted = logits.argmax(1)
    check_like("labels", labels, "predictions", predicted)
    return float((predicted == labels).double().mean())


def pairwise_diversity(samples: Tensor, condition: Tensor) -> float:
    """Mean over conditions of the mean RMS distance between two samples of one condition.

    samples: (n, ...); condition: (n,) integers. Compare it with the diversity of real data; a
    student that collapsed to one sample per condition has 0. Raises ValueError if no condition has
    two samples.
    """
    if condition.shape != samples.shape[:1]:
        raise ValueError(
            f"condition has shape {tuple(condition.shape)}; expected one integer for each of "
            f"{len(samples)} samples"
        )
    groups = [samples[condition == c].flatten(1).double() for c in condition.unique()]
    distances = [torch.pdist(g).mean() for g in groups if len(g) > 1]
    if not distances:
        raise ValueError("no condition has two samples")
    return float(torch.stack(distances).mean() / samples[0].numel() ** 0.5)
