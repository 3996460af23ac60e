"""Settings from options, the environment (``RAGCACHE_*``) and ``ragcache.toml``.

:class:`Settings` opens a :class:`RagCache`; :class:`ServiceSettings` has what ``ragcache serve``
needs in addition.
"""

from ragcache.settings.library import Ratio, Settings
from ragcache.settings.service import ServiceSettings
from ragcache.settings.units import seconds, size

__all__ = ["Ratio", "ServiceSettings", "Settings", "seconds", "size"]
