"""Reduces KubeRay's CRDs to what a manifest's structure is checked by: `kuberay_crds.json`.

    git --git-dir=KUBERAY archive v1.7.0 helm-chart/kuberay-operator/crds | tar -x -C /tmp
    python tests/cluster/reduce_crd.py --version v1.7.0 --commit 59d663aeec13760646da3db9c1cf8cfe883e30b7 \\
        --out tests/cluster/kuberay_crds.json /tmp/helm-chart/kuberay-operator/crds/ray.io_{rayclusters,rayjobs}.yaml

The committed file was made by that command, from https://github.com/ray-project/kuberay.

Only types, names and bounds are kept. The API server drops keys that it does not know, so that a misspelt setting
is silently the default; here such a key is an error. Equal parts are written once: a PodSpec stands in every group.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KEPT = ("type", "enum", "format", "minimum", "maximum", "minLength", "maxLength", "minItems", "nullable")
_OPEN = "x-kubernetes-preserve-unknown-fields"
_WORTH_SHARING = 60  # characters; a reference takes 20


def reduce_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI v3 schema of a CRD as a JSON schema that refuses unknown keys."""
    kept = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        return kept | {"type": ["integer", "string"]}
    if kept.pop("nullable", False):
        kept["type"] = [kept["type"], "null"]
    if "items" in schema:
        kept["items"] = reduce_schema(schema["items"])
    properties = schema.get("properties", {})
    if properties:
        kept["properties"] = {name: reduce_schema(inner) for name, inner in properties.items()}
    # what has a default is filled in before the API server looks at what is required
    required = [name for name in schema.get("required", ()) if "default" not in properties.get(name, {})]
    if required:
        kept["required"] = required
    others = schema.get("additionalProperties")
    if isinstance(others, dict):
        kept["additionalProperties"] = reduce_schema(others)
    elif properties and not schema.get(_OPEN):
        kept["additionalProperties"] = False
    return kept


def kind_schema(crd: dict[str, Any]) -> dict[str, Any]:
    """The schema of the stored version's whole object, without the status, which nobody writes."""
    version = next(each for each in crd["spec"]["versions"] if each["storage"])
    whole = version["schema"]["openAPIV3Schema"]
    reduced = reduce_schema(whole | {"properties": dict(whole["properties"])})
    reduced["properties"].pop("status", None)
    reduced["properties"]["apiVersion"]["enum"] = [f"{crd['spec']['group']}/{version['name']}"]
    reduced["properties"]["kind"]["enum"] = [crd["spec"]["names"]["kind"]]
    reduced["required"] = sorted({"apiVersion", "kind", "metadata", "spec"})
    return reduced


def shared(roots: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`roots` by name and, under numbers, each schema that occurs more than once."""
    counts: Counter[str] = Counter()

    def count(schema: dict[str, Any]) -> None:
        text = json.dumps(schema, sort_keys=True)
        counts[text] += 1
        if counts[text] == 1:  # what is inside an equal part is written once with it
            for inner in _inner(schema):
                count(inner)

    for root in roots.values():
        count(root)
    names: dict[str, str] = {}
    definitions: dict[str, Any] = {}

    def write(schema: dict[str, Any], *, named: str | None = None) -> dict[str, Any]:
        text = json.dumps(schema, sort_keys=True)
        reference = named is None and counts[text] > 1 and len(text) > _WORTH_SHARING
        if reference and text in names:
            return {"$ref": f"#/$defs/{names[text]}"}
        name = named or (names.setdefault(text, str(len(names))) if reference else None)
        written = dict(schema)
        for key in ("items", "additionalProperties"):
            if isinstance(written.get(key), dict):
                written[key] = write(written[key])
        if "properties" in written:
            written["properties"] = {
                key: write(inner) for key, inner in sorted(written["properties"].items())
            }
        if name is None:
            return written
        definitions[name] = written
        return {"$ref": f"#/$defs/{name}"}

    for name, root in roots.items():
        write(root, named=name)
    return definitions


def _inner(schema: dict[str, Any]) -> list[dict[str, Any]]:
    single = [schema[key] for key in ("items", "additionalProperties") if isinstance(schema.get(key), dict)]
    return single + list(schema.get("properties", {}).values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("crds", nargs="+", type=Path, help="files of CRDs")
    parser.add_argument("--version", required=True, help="KubeRay's tag")
    parser.add_argument("--commit", required=True, help="its commit")
    parser.add_argument("--out", required=True, type=Path, help="JSON to write")
    arguments = parser.parse_args()
    crds = [yaml.load(path.read_text(), yaml.CSafeLoader) for path in arguments.crds]
    definitions = shared({crd["spec"]["names"]["kind"]: kind_schema(crd) for crd in crds})
    made = f"by tests/cluster/reduce_crd.py from KubeRay {arguments.version} ({arguments.commit})"
    lines = [f"{json.dumps(name)}: {json.dumps(schema)}" for name, schema in sorted(definitions.items())]
    body = ",\n".join(lines)
    arguments.out.write_text(f'{{"$comment": {json.dumps(made)},\n"$defs": {{\n{body}\n}}}}\n')


if __name__ == "__main__":
    main()
