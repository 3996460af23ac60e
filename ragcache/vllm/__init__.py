"""vLLM integration: a KV connector inside vLLM, and an engine that sends requests to its servers.

vLLM loads ``connector`` and the worker classes (``cpu`` and ``gpu``, with ``worker``). ``jobs``
runs before a forward pass, and ``model`` drives vLLM's layers.

These modules do not import vLLM: ``manifest`` (the request format), ``salt`` (isolation of the
prefix cache), ``slots`` (rows in paged memory), ``planner`` (the scheduler's decisions),
``support`` (what is not supported) and ``handoff`` (replies of workers). On the client's side,
``engine`` precomputes, ``stream`` generates answers, ``http`` is the client and ``router`` chooses
a server.
"""
