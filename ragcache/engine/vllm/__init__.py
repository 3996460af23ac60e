"""vLLM as the engine: what its scheduler and its workers need to place stored KV.

Modules without an import of vLLM decide everything that can be decided without it: ``manifest``
(what a request says), ``salt`` (whose prefix cache it may share), ``slots`` (where rows lie in
paged memory), ``planner`` (what is loaded, and what has failed), ``support`` (what is refused) and
``mailbox`` (what workers hand back).
"""
