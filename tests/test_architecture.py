"""The order of the modules, and what none of them may do."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bsafusion

ROOT = Path(bsafusion.__file__).parent
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"

# Each module imports only from the rows above its own. A module that is in no row has no place yet: give it one.
ORDER = (
    {"about", "competitor_worker", "cuda", "errors", "files", "image", "memory", "samples"},
    {"colour", "competitors", "deformation", "metrics", "page", "plain_fusion"},
    {"io.formats"},
    {"io.dicom", "io.nifti", "io.pictures"},
    {"io"},
    {"preprocessing"},
    {"canonical"},
    {"models", "models.layers"},
    {"models.encoder"},
    {"models.representation"},
    {"models.assessment"},
    {"models.alignment"},
    {"models.fusion"},
    {"models.bsafusion"},
    {"fusion_losses", "refinement"},
    {"losses", "optimizer", "weights", "scoring"},
    {"datasets", "trust"},
    {"benchmark", "evidence", "failures"},
    {"report"},
    {"report_page", "request"},
    {"result"},
    {"pipeline"},
    {"batch", "evaluation"},
    {"training", "evaluation_tables"},
    {"options", "cross_validation", "evaluation_page"},
    {"viewer"},
    {"cli"},
    {"__main__", ""},
)
ROWS = {name: row for row, names in enumerate(ORDER) for name in names}

MODELS_MAY_IMPORT = {"deformation", "models"}
ABSTAINERS = (
    "cli",
    "weights",
    "image",
    "errors",
    "files",
    "samples",
    "metrics",
    "__init__",
    "__main__",
)  # import no torch when imported


def module_name(path: Path) -> str:
    """``models/layers.py`` -> ``models.layers``; the package itself is the empty name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def resolve(target: str) -> str:
    """The longest name of a module that ``target`` (``bsafusion.a.b``) starts with, without the package's name."""
    parts = target.split(".")[1:]
    while parts and ".".join(parts) not in SOURCES:
        parts.pop()
    return ".".join(parts)


def row(name: str) -> int:
    """The place of a module; those of a subpackage without rows of their own stand where the subpackage stands."""
    place = ROWS.get(name, ROWS.get(name.split(".")[0]))
    assert place is not None, f"{name} has no place in the order of the modules"
    return place


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that is imported anywhere below ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    return {resolve(target) for target in imports(SOURCES[name]) if target.split(".")[0] == "bsafusion"} - {name}


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported: none inside functions or behind ``TYPE_CHECKING``."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        yield node
        pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def test_the_walk_sees_the_package() -> None:
    """Guards the tests below against finding nothing."""
    assert {"image", "deformation", "models.alignment", "training", "weights"} <= SOURCES.keys()
    assert {"deformation", "models.encoder", "models.layers"} <= own_imports("models.alignment")
    assert "models.bsafusion" in own_imports("weights")  # inside a function


@pytest.mark.parametrize("name", SOURCES)
def test_modules_import_only_from_those_before_them(name: str) -> None:
    subpackage = None if name.startswith(("models", "io")) else name.split(".")[0]
    others = {other for other in own_imports(name) if other.split(".")[0] != subpackage}
    wrong = sorted(other for other in others if row(other) >= row(name))
    assert not wrong, f"{name} imports {wrong}, which do not come before it"


@pytest.mark.skipif(not DESIGN.is_file(), reason="docs are not installed")
def test_the_file_list_has_every_module_after_those_it_imports_from() -> None:
    listed: dict[str, int] = {}
    for number, line in enumerate(DESIGN.read_text(encoding="utf-8").splitlines()):
        if line.startswith("| `"):
            files = re.findall(r"`([a-z_/]+(?:\.py)?)`", line.split("|")[1])
            listed |= {file.removesuffix(".py").strip("/").replace("/", "."): number for file in files}

    def line_of(name: str) -> int | None:
        return listed.get(name, listed.get(name.split(".")[0]))

    assert [name for name in SOURCES if line_of(name) is None] == ["", "__main__", "models"]
    for name in SOURCES.keys() - {"", "__main__", "models"}:
        later = [other for other in own_imports(name) - {"", "models"} if (line_of(other) or 0) > (line_of(name) or 0)]
        assert not later, f"{name} imports {later}, which the file list of design.md has below it"


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("models.")])
def test_stages_see_tensors_only(name: str) -> None:
    assert {other.split(".")[0] for other in own_imports(name)} <= MODELS_MAY_IMPORT
    outside = {target.split(".")[0] for target in imports(SOURCES[name])}
    assert not outside & {"numpy", "scipy", "nibabel", "SimpleITK", "pydicom", "PIL"}


def test_metrics_stand_alone() -> None:
    assert own_imports("metrics") <= {"image"}
    assert "torch" not in {target.split(".")[0] for target in imports(SOURCES["metrics"])}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("nibabel", {"io.formats", "io.nifti"}),
        # The worker handles no files of images: it registers arrays, in an interpreter that may lack this package.
        ("SimpleITK", {"io.pictures", "competitor_worker"}),
        ("pydicom", {"io.dicom"}),
    ],
)
def test_only_io_knows_file_formats(library: str, allowed: set[str]) -> None:
    users = {name for name, tree in SOURCES.items() if library in {t.split(".")[0] for t in imports(tree)}}
    assert users == allowed


def test_the_competitors_worker_runs_without_this_package() -> None:
    standard = sys.stdlib_module_names | {"numpy"}
    assert {
        target.split(".")[0] for node in at_import(SOURCES["competitor_worker"]) for target in imports(node)
    } <= standard
    assert not own_imports("competitor_worker")


@pytest.mark.parametrize("name", ABSTAINERS)
def test_help_needs_no_torch(name: str) -> None:
    heavy = {"torch", "safetensors"}
    tree = SOURCES.get("" if name == "__init__" else name)
    if tree is None:
        pytest.skip(f"there is no {name} yet")
    for node in at_import(tree):
        assert not {target.split(".")[0] for target in imports(node)} & heavy, ast.unparse(node)


def test_there_is_no_utils() -> None:
    names = {part for name in SOURCES for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_pickled(name: str) -> None:
    tree = SOURCES[name]
    libraries = {target.split(".")[0] for target in imports(tree)}
    assert not libraries & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"torch.load", "torch.save", "eval", "exec"}
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
    assert not set(imports(tree)) & {"torch.load", "torch.save"}


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"cli", "__main__"}))
def test_only_the_command_line_prints_and_exits(name: str) -> None:
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write"}, ast.unparse(
                node
            )
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert "SystemExit" not in ast.unparse(node.exc)
