"""The pages of documentation: links lead somewhere, files exist, examples run."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from jvp_attn.backends.kernel_table import HEAD_DIMS, KERNELS, kernel_name

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = [README, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md"]  # the changelog also names files that are gone

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?<![\w/.])(?:jvp_attn|rcm|csrc|tests|benchmarks|docs)/[\w./-]*\w")
SOURCE = re.compile(r"[\w/]+\.(?:py|cuh|cu|h|cpp)")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def read(page: Path) -> str:
    return page.read_text("utf-8")


@cache
def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def source_files() -> frozenset[str]:
    folders = ("jvp_attn", "rcm", "csrc", "tests", "benchmarks", "docs")
    return frozenset(path.name for folder in folders for path in (ROOT / folder).rglob("*.*"))


def examples(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(read(page)) if language == "python"]


# ----------------------------------------------------------------------------
# Links and files


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page: Path) -> None:
    links = [x for x in LINK.findall(FENCE.sub("", read(page))) if not x.startswith("http")]
    assert [x for x in links if not resolves(page, x)] == []


def resolves(page: Path, link: str) -> bool:
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", GUIDES, ids=page_id)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = read(page)
    code = [*CODE.findall(text), *(block for _, block in FENCE.findall(text))]
    paths = {path for part in code for path in PATH.findall(part)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []

    names = {part.rpartition("/")[2] for part in CODE.findall(text) if SOURCE.fullmatch(part)}
    assert names <= source_files()


# ----------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize("page", GUIDES, ids=page_id)
def test_examples_compile(page: Path) -> None:
    for number, code in enumerate(examples(page)):
        compile(code, f"{page.name}, example {number}", "exec")


def test_the_quick_start_runs() -> None:
    code = next(code for code in examples(README) if "diffusers" not in code)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["q"].grad.isfinite().all()
    assert names["q"].grad.any()


# ----------------------------------------------------------------------------
# Tables


def test_tiles_of_sm80_are_those_of_the_kernel_table() -> None:
    text = read(ROOT / "docs" / "kernels.md")
    table = text.partition("<!-- sm80 tiles")[2].partition("<!-- end of the sm80 tiles -->")[0]
    heading, _, *rows = [line.strip("| ").split(" | ") for line in re.findall(r"\|.+\|", table)]
    assert heading == ["kernel", *map(str, HEAD_DIMS)]

    told = {}
    for kernel, *tiles in rows:
        step, _, masked = kernel.partition(", ")
        for head_dim, tile in zip(HEAD_DIMS, tiles, strict=True):
            if tile != "–":
                name = kernel_name(step, "bf16", head_dim, masked == "masked")
                told[name] = tuple(map(int, tile.split("×")))
    kernels = [x for x in KERNELS.values() if x.arch == "sm80" and x.element == "bf16" and x.tile]
    assert told == {kernel.name: kernel.tile for kernel in kernels}
