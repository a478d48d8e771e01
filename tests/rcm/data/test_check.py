"""The checker names every bad sample of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcm.data.check import check_latents, main
from rcm.data.samples import LATENTS, SampleShapes
from tests.rcm.data.folders import (
    COUNT,
    SHAPES,
    WRITERS,
    random_samples,
    stacked,
    write_safetensors,
)

OPTIONS = ["--latents", "2,3,4,5", "--condition", "text=6,7"]


@pytest.fixture(params=WRITERS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def test_good_samples_are_counted_and_measured(layout: str, tmp_path: Path) -> None:
    samples = random_samples()
    WRITERS[layout](tmp_path, samples)
    report = check_latents(tmp_path, SHAPES)
    latents = stacked(samples)[LATENTS].double()
    assert report.problems == []
    assert report.good == COUNT
    assert report.mean == pytest.approx(latents.mean().item(), abs=1e-12)
    assert report.std == pytest.approx(latents.std(correction=0).item(), abs=1e-12)
    assert "Normalised" not in str(report)


def test_every_bad_sample_is_named(layout: str, tmp_path: Path) -> None:
    samples = random_samples()
    samples[1][LATENTS][0, 0, 0, 0] = torch.nan
    samples[4]["text"][2, 3] = torch.inf
    samples[7][LATENTS][:] = torch.nan
    WRITERS[layout](tmp_path, samples)
    told: list[str] = []
    report = check_latents(tmp_path, SHAPES, on_problem=told.append)
    assert told == report.problems
    assert report.good == COUNT - 3
    row = {"tar": "key {shard}{row}"}.get(layout, "row {row_number}")
    for problem, (shard, number, name) in zip(
        told, [("00", 1, LATENTS), ("01", 1, "text"), ("02", 1, LATENTS)], strict=True
    ):
        place = row.format(shard=shard, row=f"{number:02d}", row_number=number)
        assert problem.startswith(f"{tmp_path}/{shard}.{layout}, {place}: {name} have ")
    good = stacked([samples[i] for i in (0, 2, 3, 4, 5, 6)])[LATENTS][[0, 1, 2, 4, 5]]
    assert report.std == pytest.approx(good.double().std(correction=0).item())


def test_bad_files_are_named_beside_good_ones(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_samples())
    (tmp_path / "01.safetensors").write_bytes(b"")
    save_file({"text": torch.zeros(3)}, tmp_path / "negative.safetensors")
    shard, negative = check_latents(tmp_path, SHAPES).problems
    assert shard.startswith(f"{tmp_path}/01.safetensors: cannot be read")
    assert negative.startswith(f"{tmp_path}/negative.safetensors: text have shape (3,)")


def test_only_the_first_samples_are_read(layout: str, tmp_path: Path) -> None:
    samples = random_samples()
    samples[5][LATENTS][:] = torch.nan
    WRITERS[layout](tmp_path, samples)
    assert check_latents(tmp_path, SHAPES, first=5).problems == []
    assert len(check_latents(tmp_path, SHAPES, first=6).problems) == 1


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_latents_that_are_not_normalised_are_told(scale: float, tmp_path: Path) -> None:
    samples = random_samples()
    for sample in samples:
        sample[LATENTS] *= scale
    write_safetensors(tmp_path, samples)
    report = check_latents(tmp_path, SHAPES)
    assert report.problems == []
    assert "Normalised latents have about 1: apply the VAE's latents_mean" in str(report)


def test_a_folder_without_samples_is_a_problem(tmp_path: Path) -> None:
    report = check_latents(tmp_path, SampleShapes((1,), {}))
    assert report.good == 0
    assert report.problems == [
        f"{tmp_path} has no shards: no *.safetensors, no *.npz, no *.tar",
    ]


def test_the_command_prints_problems_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = random_samples()
    write_safetensors(tmp_path, samples)
    assert main([str(tmp_path), *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 good samples, 0 problems; latents: mean ")
    samples[4]["text"][2, 3] = torch.inf
    write_safetensors(tmp_path, samples)
    assert main([str(tmp_path), *OPTIONS]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        f"{tmp_path}/01.safetensors, row 1: text have 1 values that are NaN or infinite, of 42"
    )
    assert second.startswith("7 good samples, 1 problems; ")
    assert main([str(tmp_path), *OPTIONS, "--first", "4"]) == 0


def test_conditions_that_guidance_keeps_are_not_in_the_negative_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = SampleShapes(SHAPES.latents, {**SHAPES.condition, "image": (5, 3)})
    write_safetensors(tmp_path, random_samples(shapes=shapes))
    save_file({"text": torch.zeros(6, 7)}, tmp_path / "negative.safetensors")
    command = [str(tmp_path), *OPTIONS, "--condition", "image=5,3"]
    assert main(command) == 1
    assert "there is no tensor 'image', only text" in capsys.readouterr().out
    assert main([*command, "--fixed", "image"]) == 0


def test_a_fixed_condition_must_be_one_of_the_conditions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), *OPTIONS, "--fixed", "image"])
    message = "--fixed image: there is no --condition image=SHAPE, only text\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--latents", "2,x"],
        ["--latents", "0,1"],
        ["--latents", "2,3", "--condition", "text"],
        ["--latents", "2,3", "--first", "0"],
    ],
    ids=str,
)
def test_invalid_options_of_the_command(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), *options])
