"""Folders, imports and public names of the package: ``python -m tests.structure`` prints them.

Counted are folders and modules, levels of imports, circles, public names, and the package's own
stack frames between a question and the model's forward.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ragcache"

Graph = Mapping[str, set[str]]


@dataclass(frozen=True, slots=True)
class Module:
    name: str  # dotted
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder or module of the package's root that it belongs to."""
        return [*self.name.split("."), "__init__"][1]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def modules() -> dict[str, Module]:
    """Every module of the package, by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, parse(path))
    return found


@cache
def imports(path: Path, tree: ast.Module) -> list[tuple[str, str | None]]:
    """Every import, wherever it stands: (module, name), relative ones resolved."""
    return list(_imports(path, tree))


def _imports(path: Path, tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    package = ["ragcache", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def module_graph() -> Graph:
    """By module, the modules that it imports, also inside functions and for type checkers only."""
    every = modules()
    graph: dict[str, set[str]] = {}
    for name, module in every.items():
        found = graph[name] = set()
        for target, part in imports(module.path, module.tree):
            if f"{target}.{part}" in every:
                found.add(f"{target}.{part}")
            elif target in every:
                found.add(target)
        found.discard(name)
    return graph


def room_graph() -> Graph:
    """By folder or module of the root, those that it imports."""
    graph: dict[str, set[str]] = {}
    for name, found in module_graph().items():
        room = modules()[name].room
        graph.setdefault(room, set()).update(modules()[other].room for other in found)
    for room, found in graph.items():
        found -= {room, "__init__"}  # what the package itself exports comes from below
    return graph


def levels(graph: Graph) -> dict[str, int]:
    """By node, the length of the longest chain of imports that begins at it. Raises CycleError."""
    depth: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():
        depth[node] = 1 + max((depth[other] for other in graph.get(node, ())), default=0)
    return depth


def circles(graph: Graph) -> list[list[str]]:
    """Circles of imports, one after another, each without those before it."""
    left = {node: set(found) for node, found in graph.items()}
    found: list[list[str]] = []
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            circle = list(error.args[1])
            found.append(circle)
            left[circle[1]].discard(circle[0])
        else:
            return found


def declared(module: Module) -> set[str]:
    """The names in a module's ``__all__``: those that other folders, and users, may import."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def defined(module: Module) -> set[str]:
    """The functions and classes that a module defines at its top level."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return {node.name for node in module.tree.body if isinstance(node, kinds)}


def public_names(module: Module) -> set[str]:
    """The functions and classes that other folders, and users, may import from this module; of a
    package, all names that it exports."""
    exports = module.path.name == "__init__.py"
    return declared(module) if exports else declared(module) & defined(module)


def used_elsewhere() -> dict[str, set[str]]:
    """By module, the names that other folders of the package import from it or use through it."""
    every = modules()
    used: dict[str, set[str]] = {}
    for module in every.values():
        aliases: dict[str, str] = {}
        for target, name in imports(module.path, module.tree):
            if name is not None and f"{target}.{name}" in every:
                aliases[name] = f"{target}.{name}"
            elif name is not None and target in every and every[target].room != module.room:
                used.setdefault(target, set()).add(name)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                reached = aliases.get(node.value.id, "")
                if reached and every[reached].room != module.room:
                    used.setdefault(reached, set()).add(node.attr)
    return used


def top_modules(folder: Path) -> list[str]:
    """Modules and folders that stand in ``folder``, without its ``__init__``."""
    modules = [p.stem for p in folder.glob("*.py") if p.stem != "__init__"]
    return sorted([*modules, *(p.parent.name for p in folder.glob("*/__init__.py"))])


def report() -> str:
    rooms = room_graph()
    by_level: dict[int, list[str]] = {}
    for room, level in levels(rooms).items():
        by_level.setdefault(level, []).append(room)
    names = {name: public_names(module) for name, module in modules().items()}
    lines = [f"{len(modules())} modules, {len(rooms)} of them or their folders at the root", ""]
    for level in sorted(by_level, reverse=True):
        for room in sorted(by_level[level]):
            own = [module for module in modules().values() if module.room == room]
            public = sum(len(names[module.name]) for module in own)
            folder = PACKAGE / room
            top = f", {len(top_modules(folder))} at its top" if folder.is_dir() else ""
            lines.append(
                f"level {level:2}  {room:12} {len(own):3} modules{top}, {public} public names"
            )
    found = circles(module_graph())
    lines += ["", f"{len(by_level)} levels of imports between folders"]
    lines += [f"{len(found)} circles of imports between modules", *map(" -> ".join, found)]
    top_level = [name for module in modules().values() for name in defined(module)]
    named = sum(not name.startswith("_") for name in top_level)
    public = sum(map(len, names.values()))
    lines += [
        f"{public} functions and classes are public: in __all__, for other folders and for users",
        f"{named} functions and classes have no underscore, of {len(top_level)} at the top level",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{report()}\n")
