"""Makes `grafana_schema.json`, by which the dashboard is checked, from the types that Grafana publishes on npm.

    mkdir /tmp/schema && cp tests/dashboards/grafana_schema.ts /tmp/schema/dashboard.ts && cd /tmp/schema
    npm install @grafana/schema@13.2.3 ts-json-schema-generator@2.9.0
    npx ts-json-schema-generator --path dashboard.ts --type Dashboard --no-type-check --expose none --out whole.json
    python .../tests/dashboards/reduce_schema.py whole.json > .../tests/dashboards/grafana_schema.json

The committed file was made by these commands. Types, names and values that are allowed are kept, words are not;
whatever Grafana's types don't name is an error, where Grafana itself would ignore it.
"""

import json
import sys
from typing import Any

_WORDS = ("description", "default", "deprecated", "$comment")


def without_words(schema: Any, *, names: bool = False) -> Any:
    """The schema without its descriptions and defaults; names: the keys are properties of a dashboard."""
    if isinstance(schema, list):
        return [without_words(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: without_words(inner, names=key == "properties" and not names)
        for key, inner in schema.items()
        if names or key not in _WORDS
    }


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(json.dumps(without_words(json.load(file)), separators=(",", ":")))
