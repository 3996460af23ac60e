"""Test suites for implementations of ragcache's interfaces.

A suite is a class. Subclass it in a test module and name the implementation; pytest then runs all
of its tests: :class:`~ragcache.testing.store.ChunkStoreTests`,
:class:`~ragcache.testing.codec.CodecTests`, :class:`~ragcache.testing.blender.BlenderTests`,
:class:`~ragcache.testing.engine.EngineTests` and
:class:`~ragcache.testing.index.VectorIndexTests`. They compare values with a reference
implementation or with a formula, never shapes alone. A test that does not apply to an
implementation is overridden in the subclass.

Needs pytest: ``pip install "ragcache-fusion[testing]"``. Nothing else in ragcache imports it.
"""

from __future__ import annotations

try:
    import pytest
except ImportError as error:
    raise ImportError(
        'ragcache.testing needs pytest: run `pip install "ragcache-fusion[testing]"`.'
    ) from error

#: With this, a failing assert of a suite shows both sides, as in a test module.
pytest.register_assert_rewrite(
    *(f"{__name__}.{name}" for name in ("store", "codec", "blender", "engine", "index"))
)
