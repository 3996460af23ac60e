"""vLLM as the engine: fusion inside its workers, and an engine that asks its servers.

``connector`` and the workers (``cpu``, ``gpu``) are what vLLM loads; ``jobs`` is what they do
before a forward, and ``model`` drives vLLM's layers. What can be decided without vLLM has modules
without an import of it: ``manifest`` (what a request says), ``salt`` (whose prefix cache it may
share), ``slots`` (where rows lie in paged memory), ``planner`` (what is loaded, and what has
failed), ``support`` (what is refused) and ``handoff`` (what workers hand back). Import from the
modules: this package stays empty, so that it needs no vLLM.
"""
