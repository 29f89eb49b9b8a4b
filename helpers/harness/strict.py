"""YAML in which nothing is dropped or means nothing."""

import math

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
