"""The one reader of YAML, which anybody may have written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mae_scale.errors import UserError
from mae_scale.files import read_file

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
MOST_DEPTH = 30
# PyYAML raises its own errors, and passes on those of the values that it makes.
_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values, lists and dicts, which refuses what stands for too much.

    A few lines with aliases can stand for billions of values, above all below `<<`, which copies
    them, or for a dict that holds itself. Each node is counted as it is composed, an alias as all
    that it stands for, and nothing is made of the nodes before all are counted.
    """

    aliases = True
    """Whether anchors, aliases and merges are allowed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.count = self.depth = 0
        self.sizes: dict[yaml.Node, int] = {}  # values that each node stands for

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        """Compose the next node, and count it."""
        event, before = self.peek_event(), self.count
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not self.aliases and (event.anchor or node.tag == "tag:yaml.org,2002:merge"):
            raise ValueError("it has an anchor, an alias or a merge, which no run writes")
        if isinstance(event, yaml.AliasEvent) and node not in self.sizes:
            raise ValueError(f"{event.anchor!r} holds itself")
        self.count += self.sizes.get(node, 1)
        if self.count > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
        self.sizes[node] = self.count - before
        return node


class _RunLoader(_Loader):
    """The loader of what runs write."""

    aliases = False


# Unlike YAML 1.1, a date is a text, and a number that begins with 0 is not octal.
_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = _RunLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in (_INT, "tag:yaml.org,2002:timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _loader in (_Loader, _RunLoader):
    _loader.add_implicit_resolver(
        _INT, re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
    )


def read_yaml(path: Path, *, of_a_run: bool = False) -> Any:
    """Read a YAML file that holds plain values, lists and dicts, and no objects.

    Args:
        path: the file.
        of_a_run: whether a run has written it, so that it has no anchors, aliases or merges.

    Raises:
        OSError: the file cannot be read, is no regular file, or is too large for a config.
        ValueError: the file is not valid YAML, or stands for too much; the message is one line.
    """
    return parse_yaml(read_file(path, MOST_BYTES), of_a_run=of_a_run)


def load_yaml(path: Path, *, of_a_run: bool = False) -> Any:
    """Read a YAML file as `read_yaml` does, for a user who has named it.

    Raises:
        UserError: the file cannot be read, or is not valid YAML.
    """
    try:
        return read_yaml(path, of_a_run=of_a_run)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None


def parse_yaml(content: bytes | str, *, of_a_run: bool = False) -> Any:
    """Parse the content of a YAML file, see `read_yaml`.

    Raises:
        ValueError: it is not valid YAML, or stands for too much; the message is one line.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        return yaml.load(text, _RunLoader if of_a_run else _Loader)
    except (yaml.YAMLError, ValueError, *_ERRORS) as error:
        raise ValueError(" ".join(str(error).split())) from None
