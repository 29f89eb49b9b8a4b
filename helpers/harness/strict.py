"""YAML in which nothing is dropped or means nothing, and what a schema says of it."""

import math
from collections.abc import Mapping
from typing import Any

import jsonschema
import yaml


class Strict(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently drop one, and numbers that are not finite."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k) for k, _ in node.value]
        if twice := [k for k in keys if keys.count(k) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node):
        if not math.isfinite(number := super().construct_yaml_float(node)):
            raise yaml.constructor.ConstructorError(None, None, f"{number}: expected a finite number", node.start_mark)
        return number


Strict.add_constructor("tag:yaml.org,2002:float", Strict.construct_yaml_float)


def wrong(told: Any, schema: Mapping[str, Any]) -> str | None:
    """The first field of `told` that is not as the schema has it and what was expected there; None if all is well."""
    found = sorted(jsonschema.Draft202012Validator(schema).iter_errors(told), key=lambda e: list(map(str, e.absolute_path)))
    if not found:
        return None
    deepest = jsonschema.exceptions.best_match([found[0]])
    where = ".".join(map(str, deepest.absolute_path)) or "the file"
    known = deepest.schema.get("properties", {})
    if deepest.validator == "additionalProperties":
        unknown = next(k for k in deepest.instance if k not in known)
        return f"{where}: {unknown!r} is unknown: expected some of {', '.join(known)}"
    if deepest.validator == "required":
        return f"{where}: expected {next(k for k in deepest.schema['required'] if k not in deepest.instance)} too"
    return f"{where}: {deepest.instance!r}: expected {deepest.schema['title']}"
