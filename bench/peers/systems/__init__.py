"""One module per system. Each runs in a process and an environment of its own.

A module has ``serve()`` as its last line, with a function that takes a :class:`..protocol.Setup`
and returns a :class:`..protocol.System`.
"""
