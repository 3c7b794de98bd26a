"""The YAML of configurations: PyYAML, which follows YAML 1.1, with the numbers and text of YAML 1.2."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and text: 1e-3 is a number (PyYAML requires 1.0e-3), and 2024-01-01 is text.

    A key that a mapping has twice is an error; PyYAML would keep the last value.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in keys[:number]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                )
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Dumper(yaml.SafeDumper):
    """Writes YAML that `Loader` reads back: the text 1e-3 is quoted."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # In single quotes PyYAML folds line breaks that only YAML 1.1 recognises; double quotes escape them.
        style = '"' if any(break_ in data for break_ in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


Dumper.add_representer(str, Dumper.represent_str)

for _side in (Loader, Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
