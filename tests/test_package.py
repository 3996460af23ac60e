"""The package as a whole: a light import, one version, imports that point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import ragcache
from tests.structure import (
    PACKAGE,
    ROOT,
    circles,
    declared,
    imports,
    levels,
    module_graph,
    modules,
    parse,
    public_names,
    room_graph,
    top_modules,
    used_elsewhere,
)

SOURCES = sorted(PACKAGE.rglob("*.py"))

#: What stands at the package's root, from the top down. A folder imports only from layers below its
#: own, never from its neighbours in one layer: see docs/architecture.md.
LAYERS = (
    {"__main__"},
    {"cli", "langchain"},
    {"api"},
    {"batch", "eval", "__init__"},
    {"rag"},
    {"setup", "vllm"},
    {"core", "sim"},
    {"planning", "testing"},
    {"blend"},
    {"engine", "retriever", "store"},
    {"models", "settings", "types", "util"},
    {"errors", "text"},
)
#: What else must not be imported: blend reads KV through a KVSource, and what computes and stores
#: knows no settings.
APART = {("blend", "store"), *((room, "settings") for room in ("blend", "engine", "store"))}
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}

#: These run code that they read, or can.
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load"}


def room_of(path: Path) -> str:
    """``ragcache/blend/fuse.py`` → ``blend``; ``ragcache/__init__.py`` → ``__init__``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path, tree: ast.Module) -> Iterator[str]:
    for module, name in imports(path, tree):
        names = module.split(".")
        if names[0] != "ragcache":
            continue
        if len(names) > 1:
            yield names[1]
        elif name == "RagCache":
            yield "rag"
        else:  # a folder, or a name that ``ragcache/__init__.py`` takes from types and errors
            yield name if name in RANK else "types"


def normal(distribution: str) -> str:
    """Name of a distribution, or of a requirement, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[ <>=!~;\[]", distribution)[0]).lower()


def wrong_way(room: str, imported: str) -> bool:
    up = room != imported and RANK[imported] <= RANK[room]
    return up or (room, imported) in APART


def unsafe(path: Path, tree: ast.Module) -> Iterator[str]:
    for module, name in imports(path, tree):
        if module.split(".")[0] in UNSAFE_MODULES or (module, name) == ("torch", "load"):
            yield f"imports {module}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if (called := ast.unparse(node.func)) in UNSAFE_CALLS:
            yield f"line {node.lineno} calls {called}"
        for keyword in node.keywords:
            if keyword.arg in {"trust_remote_code", "allow_pickle"} and (
                not isinstance(keyword.value, ast.Constant) or keyword.value.value
            ):
                yield f"line {node.lineno} may pass {keyword.arg}=True"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("ragcache", ("torch", "transformers", "numpy", "faiss", "pydantic", "ragcache.testing")),
        ("ragcache.cli", ("torch", "transformers", "numpy", "faiss", "sentence_transformers")),
        ("ragcache.rag, ragcache.api.app", ("pytest", "ragcache.testing")),
    ],
)
def test_import_is_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "[]"


def test_without_pytest_the_suites_say_what_to_install() -> None:
    code = "import sys; sys.modules['pytest'] = None; import ragcache.testing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "ragcache-fusion[testing]"' in done.stderr


def test_every_exported_name_is_there() -> None:
    assert [name for name in ragcache.__all__ if not hasattr(ragcache, name)] == []
    assert set(ragcache.__all__) <= set(dir(ragcache))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Ragcache'"):
        ragcache.Ragcache  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ragcache.__version__ == project["version"] == metadata.version("ragcache-fusion")


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    users = [extra for name, extra in extras.items() if name != "dev"]
    declared = {normal(line) for line in sum(users, project["dependencies"])}
    distributions = metadata.packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)} imports {top}"
        for path in SOURCES
        for module, _ in imports(path, parse(path))
        if (top := module.split(".")[0])
        not in sys.stdlib_module_names
        | {"ragcache", "vllm", "triton"}  # see docs/vllm.md; torch for CUDA has triton
        and declared.isdisjoint(map(normal, distributions.get(top, [top])))
    }
    assert undeclared == set()


@pytest.mark.parametrize("name", ["api", "blend", "retriever", "store"])
def test_root_folders_are_links_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink(), f"{name} at the root must stay a link"
    assert link.readlink() == Path("ragcache") / name


def test_nothing_imports_through_the_links() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SOURCES
        for module, _ in imports(path, parse(path))
        if module.split(".")[0] in {"api", "blend", "retriever", "store"}
    ]
    assert found == [], "import these as ragcache.*"


def test_every_folder_has_a_layer() -> None:
    assert {room_of(path) for path in SOURCES} == RANK.keys(), "say in LAYERS what it may import"


def test_imports_point_down() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports ragcache.{imported}"
        for path in SOURCES
        for imported in rooms_imported(path, parse(path))
        if wrong_way(room_of(path), imported)
    ]
    assert found == []


def test_the_package_is_small_enough_to_see() -> None:
    assert circles(module_graph()) == []
    assert len(room_graph()) <= 24
    assert max(levels(room_graph()).values()) <= 12
    assert len(top_modules(PACKAGE / "store")) <= 12
    assert sum(len(public_names(module)) for module in modules().values()) <= 420


def test_only_tests_import_the_contract_suites() -> None:
    """They need pytest, which users of the package may not have."""
    found = [
        path.relative_to(ROOT)
        for path in SOURCES
        if room_of(path) != "testing" and "testing" in rooms_imported(path, parse(path))
    ]
    assert found == []


def test_folders_import_only_what_others_declare() -> None:
    """``__all__`` of a module is what other folders may use of it; the rest is the folder's own."""
    used = used_elsewhere()
    hidden = {
        f"{name}.{missing}"
        for name, module in modules().items()
        for missing in used.get(name, set()) - declared(module) - {"__version__"}
        if f"{name}.{missing}" not in modules()
    }
    assert hidden == set(), "add them to __all__ of their module, or do without"


def test_what_is_declared_is_used_or_documented() -> None:
    used = used_elsewhere()
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("examples/**/*.py")]
    words = set(re.findall(r"\w+", " ".join(page.read_text(encoding="utf-8") for page in pages)))
    idle = {
        f"{name}.{extra}"
        for name, module in modules().items()
        if module.path.name != "__init__.py"  # what these export is for users
        for extra in declared(module) - used.get(name, set()) - words
    }
    assert idle == set(), "nobody outside their folder uses them: take them out of __all__"


def test_nothing_runs_code_that_it_reads() -> None:
    found = [
        f"{path.relative_to(ROOT)} {what}" for path in SOURCES for what in unsafe(path, parse(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("blend/x.py", "import ragcache.store.disk.store", True),
        ("blend/x.py", "from ..store.base import Store", True),
        ("blend/x.py", "from ragcache import store", True),
        ("blend/x.py", "from ragcache import RagCache", True),
        ("blend/x.py", "def f():\n    from ragcache.settings import Settings", True),
        ("engine/hf/x.py", "from ...blend import base", True),
        ("store/x.py", "from ragcache.engine import base", True),
        ("types.py", "from . import rag", True),
        ("blend/x.py", "from .base import Blender\nfrom ragcache.engine.base import Engine", False),
        ("blend/x.py", "from ragcache import Chunk, StoreError, __version__", False),
        ("rag.py", "from ragcache.settings import Settings", False),
        ("cli/x.py", "from ragcache import RagCache\nfrom ragcache.api.app import app", False),
    ],
)
def test_the_import_check_sees(file: str, code: str, expected: bool) -> None:
    path = PACKAGE / file
    found = [wrong_way(room_of(path), room) for room in rooms_imported(path, ast.parse(code))]
    assert any(found) is expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import pickle", True),
        ("from torch import load", True),
        ("torch.load(path)", True),
        ("eval('1')", True),
        ("f(trust_remote_code=True)", True),
        ("f(trust_remote_code=flag)", True),
        ("numpy.load(path, allow_pickle=True)", True),
        ("model.eval(); numpy.load(path, allow_pickle=False); f(trust_remote_code=False)", False),
    ],
)
def test_the_safety_check_sees(code: str, expected: bool) -> None:
    assert any(unsafe(PACKAGE / "x.py", ast.parse(code))) is expected
