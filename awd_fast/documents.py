"""JSON and YAML from anywhere: what is too deep, or grows too large as it is read, is an error of the document.

This module imports no torch.
"""

import json
from typing import Any

import yaml

DEEPEST = 100
"""Levels of lists and mappings in each other."""
YAML_BYTES = 100_000
"""Of a YAML document: PyYAML reads some ten thousand bytes in a second."""
YAML_NODES = 20_000
"""Values of a YAML document, those that an alias repeats counted each time."""


def parse_json(document: bytes | str) -> Any:
    """The value of a JSON document. Raises ValueError saying what is wrong, whatever it is."""
    try:
        value = json.loads(document)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    level, depth = [value], 1
    while level:
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        mappings = [part.values() for part in level if isinstance(part, dict)]
        lists = [part for part in level if isinstance(part, list)]
        level = [part for parts in (*mappings, *lists) for part in parts if isinstance(part, (dict, list))]
        depth += 1
    return value


def parse_yaml(document: str) -> Any:
    """The value of a YAML document. Raises ValueError saying what is wrong, in one line."""
    if len(document) > YAML_BYTES:
        raise ValueError(f"it has {len(document)} characters; expected at most {YAML_BYTES}")
    loader = _Loader("")
    try:
        loader = _Loader(document)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where PyYAML would silently take the last."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # of `!!bool x`, `2024-13-45`
            what = f"{node.value!r} " if isinstance(node, yaml.ScalarNode) else "this "
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _wrong(f"{what[:100]}cannot be read as {kind}", node) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _wrong("expected a mapping", node)
        found = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in found:
                    raise _wrong(f"the key {key.value!r} stands twice", key)
                found.add(key.value)
        return super().construct_mapping(node, deep)


def _wrong(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _count(node: yaml.Node, counted: dict[int, int], above: set[int]) -> int:
    """How many values a document has when its aliases are written out; more than `YAML_NODES` are an error."""
    if not isinstance(node.value, list):
        return 1
    if id(node) in above:
        raise _wrong("this holds itself", node)
    if len(above) >= DEEPEST:
        raise _wrong(f"it is nested more than {DEEPEST} levels deep", node)
    if id(node) not in counted:
        parts = [part for each in node.value for part in (each if isinstance(each, tuple) else (each,))]
        counted[id(node)] = 1 + sum(_count(part, counted, above | {id(node)}) for part in parts)
    if counted[id(node)] > YAML_NODES:
        raise _wrong(f"with its aliases written out it has more than {YAML_NODES} values", node)
    return counted[id(node)]
