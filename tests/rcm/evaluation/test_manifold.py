"""Precision and recall against their definition, and where the answer is known."""

import pytest
import torch
from torch import Tensor

from rcm.evaluation import manifold
from rcm.evaluation.manifold import Manifold, precision_and_recall


def measured(samples: Tensor, real: Tensor) -> tuple[float, float]:
    return precision_and_recall(samples, Manifold(real), real)


def covered(points: Tensor, centres: Tensor, k: int) -> float:
    """The definition, one pair at a time."""
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = [torch.dist(centre, other) for j, other in enumerate(centres) if j != i]
            if torch.dist(point, centre) <= sorted(others)[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [2**22, 24])  # one chunk, and two or three rows
def test_coverage_is_that_of_the_definition(
    k: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifold, "CHUNK", chunk)
    points, centres = torch.randn(12, 2), torch.randn(9, 2)
    found = Manifold(centres, k).coverage(points)
    assert found == covered(points, centres, k)
    assert 0 < found < 1


def test_ties_count_as_covered() -> None:
    """On a grid the third neighbour of a corner is as far as the diagonal of a cell."""
    x, y = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    grid = torch.stack([x, y], dim=-1).reshape(25, 2)
    corners = torch.tensor([[-1.0, -1.0], [5.0, 5.0], [-1.1, -1.1]])
    assert Manifold(grid).coverage(corners) == pytest.approx(2 / 3)


def test_a_set_covers_itself() -> None:
    real = torch.randn(40, 160)
    assert measured(real, real) == (1, 1)


def test_rounding_does_not_separate_equal_distances() -> None:
    """The ball of the last point of a row reaches three points further."""
    positions = torch.arange(30, dtype=torch.float64)
    for direction in torch.randn(20, 160, dtype=torch.float64):
        centres, point = positions.outer(direction), 32 * direction
        assert Manifold(centres).coverage(point[None]) == 1
        assert Manifold(centres).coverage(1.0001 * point[None]) == 0


def test_sets_far_apart_do_not_cover_each_other() -> None:
    real = torch.randn(40, 8)
    assert measured(real + 100, real) == (0, 0)


def test_a_student_with_one_of_two_modes_has_half_of_the_recall() -> None:
    modes = torch.randn(2, 200, 2) + torch.tensor([[[-50.0, 0]], [[50.0, 0]]])
    precision, recall = measured(modes[0], modes.flatten(0, 1))
    assert precision == 1
    assert recall == 0.5


def test_a_student_with_an_invented_mode_has_half_of_the_precision() -> None:
    modes = torch.randn(2, 200, 2) + torch.tensor([[[-50.0, 0]], [[50.0, 0]]])
    precision, recall = measured(modes.flatten(0, 1), modes[0])
    assert precision == 0.5
    assert recall == 1


def test_a_collapsed_student_covers_nothing() -> None:
    real = torch.randn(60, 8)
    precision, recall = measured(real.mean(0).expand(60, 8), real)
    assert precision == 1
    assert recall == 0


@pytest.mark.parametrize("norm", [1e5, 1e8])
def test_a_feature_far_away_does_not_change_what_others_cover(norm: float) -> None:
    """Neither one among the points nor one among the centres."""
    points, centres = 3 * torch.randn(24, 4).double(), torch.randn(20, 4).double()
    points[5] = centres[7] = norm * torch.tensor([1.0, -1.0, 1.0, 0.5]).double()
    points[5] *= -2
    others = torch.cat([points[:5], points[6:]])
    assert 0 < covered(others, centres, 3) < 0.5
    for some in (points, others):
        assert Manifold(centres).coverage(some) == covered(some, centres, 3)


def test_invalid_features_raise() -> None:
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"n > 3.*got \(3, 3\)"):
        Manifold(x[:3])
    with pytest.raises(ValueError, match="NaN"):
        Manifold(x / 0 * 0)
    with pytest.raises(ValueError, match="NaN"):
        Manifold(x).coverage(x / 0)
    with pytest.raises(ValueError, match=r"\(m, 3\)"):
        Manifold(x).coverage(x[:, :2])
    with pytest.raises(ValueError, match=r"\(m, 3\)"):
        Manifold(x).coverage(x[:0])
