"""A mixin for vLLM's workers that hands their model to the connector."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from ragcache.errors import ConfigError


class ModelHandover:
    """A mixin before vLLM's worker class, which gives the loaded model to the connector.

    vLLM gives a connector everything but the model. Raises ConfigError without the connector.
    """

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        from ragcache.vllm.connector import RagCacheConnector

        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        connector = get_kv_transfer_group() if has_kv_transfer_group() else None
        if not isinstance(connector, RagCacheConnector):
            raise ConfigError(
                "ragcache's worker was started without its connector: see --kv-transfer-config in "
                "docs/vllm.md"
            )
        connector.attach(self.model_runner.get_model())  # type: ignore[attr-defined]
