"""Settings from flags, environment (``RAGCACHE_*``) and a file, in that order of precedence.

:class:`Settings` are what a library user opens a :class:`RagCache` with; :class:`ServiceSettings`
are what ``ragcache serve`` takes beside them.
"""

from ragcache.settings.library import Ratio, Settings
from ragcache.settings.service import ServiceSettings
from ragcache.settings.units import seconds, size

__all__ = ["Ratio", "ServiceSettings", "Settings", "seconds", "size"]
