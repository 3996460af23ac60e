"""What the Jinja source of a chat template reads, without rendering it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

#: For a model without a chat template: texts one after another, then ``Answer:``.
PLAIN_LAYOUT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% if m.content %}{{ '\\nAnswer: ' + m.content + '\\n\\n' }}{% endif %}"
    "{% else %}{{ m.content }}"
    "{% if m.content and not loop.last and loop.nextitem.role != 'assistant'"
    " and not m.content.endswith('\\n\\n') %}{{ '\\n\\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """What a chat template reads. ``words`` are the strings and attribute names in its source."""

    documents: bool  # the variable ``documents``
    words: frozenset[str]


@lru_cache(maxsize=64)
def parse_source(source: str) -> TemplateSource:
    """Parse a chat template. Raises jinja2's TemplateSyntaxError, which has the line's number."""
    from jinja2 import meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag with which templates mark the assistant's text for training."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])
    tree = environment.parse(source)
    words = {node.attr for node in tree.find_all(nodes.Getattr)}
    words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateSource("documents" in meta.find_undeclared_variables(tree), frozenset(words))
