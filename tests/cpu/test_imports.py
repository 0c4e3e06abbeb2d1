"""Imports point one way: cli, bench -> runtime -> vision -> models -> kernels; leaves know nobody above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
LEAVES = {"errors", "config", "sampling_params", "checkpoint", "text"}

# What each part of the package may import from the others. Every part may import itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "sampling_params": {"errors"},
    "checkpoint": {"errors"},
    "text": {"errors", "sampling_params"},  # GenerationDefaults checks itself as SamplingParams
    "kernels": {"errors"},
    "models": {"kernels", *LEAVES},
    "vision": {"models", "kernels", *LEAVES},
    "runtime": {"vision", "models", "kernels", *LEAVES},
    "vision_core": {"runtime", "vision", *LEAVES},
    "bench": {  # "" for the version
        *("training", "vision_core", "runtime", "vision", "models", "kernels", ""),
        *LEAVES,
    },
    "training": {"runtime", "models", "kernels", *LEAVES},
    "server": {"vision_core", "runtime", "vision", "", *LEAVES},
    "cli": {
        *("server", "bench", "training", "vision_core", "runtime", "models", "kernels", ""),
        *LEAVES,
    },
    "__main__": {"cli"},
    "": {"vision_core", "runtime", *LEAVES},  # hayate/__init__.py
}


def part_of(module: str) -> str:
    """`hayate.kernels.rope` -> `kernels`; `hayate` -> ''."""
    return module.split(".")[1] if "." in module else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def executed_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    skipped = ast.unparse(node.test) == "TYPE_CHECKING" if isinstance(node, ast.If) else False
    for child in () if skipped else ast.iter_child_nodes(node):
        yield from executed_nodes(child)


def imported_modules(path: Path) -> set[str]:
    """All hayate modules named in import statements, also those inside functions; but not those for
    annotations only (`if TYPE_CHECKING:`), which are never executed."""
    found = set()
    for node in executed_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its direction"
            # `from hayate import bench` may name a subpackage or an attribute of hayate itself.
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                is_module = (SOURCE / child.replace(".", "/")).exists() or (
                    SOURCE / (child.replace(".", "/") + ".py")
                ).exists()
                found.add(child if is_module else str(node.module))
    return {name for name in found if name.split(".")[0] == "hayate"}


FILES = sorted((SOURCE / "hayate").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_imports_point_one_way(path: Path) -> None:
    own = part_of(module_name(path))
    assert own in ALLOWED, f"{own} is a new part of the package: say what it may import"
    wrong = {m for m in imported_modules(path) if part_of(m) not in ALLOWED[own] | {own}}
    assert not wrong, f"{module_name(path)} must not import {sorted(wrong)}"


def test_the_table_has_no_cycle() -> None:
    remaining = {part: set(needs) for part, needs in ALLOWED.items()}
    while remaining:
        ready = [part for part, needs in remaining.items() if not needs & remaining.keys()]
        assert ready, f"these import each other: {sorted(remaining)}"
        for part in ready:
            del remaining[part]


def test_the_walk_sees_an_import(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from hayate.runtime import llm\n    import hayate.cli.main\n"
        "if TYPE_CHECKING:\n    import hayate.text\n"
    )
    assert imported_modules(file) == {"hayate.runtime.llm", "hayate.cli.main"}
