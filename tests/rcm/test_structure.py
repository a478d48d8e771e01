"""Imports between the parts of rcm run one way only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jvp_attn
import rcm

ROOT = Path(rcm.__file__).parent
MATHEMATICS = {
    *("trigflow", "dual_numbers", "norms", "jvp_rules", "derivatives"),
    *("time_conversions", "time_sampling", "time_pairs", "time_precision", "gaussian_mixture"),
    *("predictions", "network_conversions", "guidance", "ode", "sampling", "validation"),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(package: str) -> dict[str, set[str]]:
    """What each module of a package of rcm imports from rcm, without the leading `rcm.`."""
    return {
        name: {i.removeprefix("rcm.") for i in imports(path) if i.split(".")[0] == "rcm"}
        for name, path in MODULES.items()
        if name.split(".")[0] == package
    }


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        *((module, MATHEMATICS) for module in sorted(MATHEMATICS)),
        ("losses", MATHEMATICS | {"losses"}),
        ("models", MATHEMATICS | {"models", "errors", "named_shapes"}),
        ("data", {"data", "errors", "named_shapes", "validation"}),
        ("distributed", MATHEMATICS | {"distributed", "errors"}),
        (
            "training",
            MATHEMATICS | {"training", "losses", "data", "models", "distributed", "errors"},
        ),
        ("methods", MATHEMATICS | {"methods", "losses", "data", "training", "errors"}),
        ("evaluation", MATHEMATICS | {"evaluation", "losses", "data", "training", "errors"}),
    ],
)
def test_a_part_imports_only_from_the_parts_below_it(package: str, allowed: set[str]) -> None:
    modules = imports_of(package)
    assert modules
    for name, imported in modules.items():
        assert parts(imported) <= allowed, name


@pytest.mark.parametrize(
    ("module", "users"),
    [
        ("data.digits", {"presets.from_scratch"}),
        ("data.mnist", {"presets.from_scratch"}),
        ("data.images", {"presets.from_scratch"}),
        ("models.dit", {"presets.from_scratch", "presets.scm_paper"}),
        ("presets.from_scratch", {"presets"}),
    ],
)
def test_only_presets_choose_data_and_model(module: str, users: set[str]) -> None:
    found = {
        name
        for name, path in MODULES.items()
        if any(f"{i}.".startswith(f"rcm.{module}.") for i in imports(path))
    }
    assert found == users


def test_only_presets_and_other_methods_use_a_method() -> None:
    for name, path in MODULES.items():
        if any(i.startswith("rcm.methods.") for i in imports(path)):
            assert name.split(".")[0] in ("presets", "methods"), name


def test_only_data_and_presets_mention_digits() -> None:
    allowed = {"data.digits", "presets.from_scratch", "presets"}
    for name, path in MODULES.items():
        if name not in allowed:
            code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
            assert "digits" not in code.lower(), name


def test_few_parts_use_jvp_attn_and_only_its_public_names() -> None:
    allowed = {
        *("models.dit", "models.backbone", "run_pretrained"),
        *("distributed.context_attention", "distributed.context_parallel"),
    }
    for name, path in MODULES.items():
        used = {i for i in imports(path) if i.split(".")[0] == "jvp_attn"}
        assert used <= {f"jvp_attn.{public}" for public in jvp_attn.__all__}
        assert not used or name in allowed, name


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(0)
    return tree
