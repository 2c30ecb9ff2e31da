"""The files in deploy/, and what docs/deploying.md says about them."""

import json
import re
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "deploying.md").read_text()
BOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
RULES = [
    rule for group in yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
EXPRESSIONS += [rule["expr"] for rule in RULES]
BY_PROMETHEUS = {"up": {"job", "instance"}}


@pytest.fixture
def metrics(http, picture) -> dict[str, set[str]]:
    """The samples of /metrics, each with its labels, those that Prometheus adds among them."""
    http.post("/embed", content=picture(0))
    http.app.state.metrics.drifts = lambda: [("pictures", "means", 0.1, 0.5, 500)]
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {sample.name: {*sample.labels, "job", "instance"} for family in families for sample in family.samples}
    return samples | BY_PROMETHEUS


def test_every_expression_parses_and_names_metrics_and_labels_that_exist(metrics):
    assert len(EXPRESSIONS) > 15
    for expression in EXPRESSIONS:
        promql_parser.parse(expression.replace("$__rate_interval", "5m"))
        names = re.findall(r"(\w+)\{", expression)
        labels = set(re.findall(r'(\w+)(?:=|=~)"', expression))
        labels |= {name for grouped in re.findall(r"by \(([^)]*)\)", expression) for name in grouped.split(", ")}
        assert names and labels
        assert set(names) <= metrics.keys(), expression
        assert labels <= set.intersection(*(metrics[name] for name in names)), expression


def test_the_legends_and_summaries_name_labels_that_are_there(metrics):
    for expression, text in [
        *((target["expr"], target["legendFormat"]) for panel in BOARD["panels"] for target in panel["targets"]),
        *((rule["expr"], rule["annotations"]["summary"]) for rule in RULES),
    ]:
        named = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", text))
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        left = set(grouped[0].split(", ")) if grouped else metrics[re.findall(r"(\w+)\{", expression)[0]]
        assert named <= left, (expression, text)


def test_the_document_lists_the_alerts_and_scrapes_the_job_that_they_name():
    section = DOCUMENT.partition("## Prometheus and Grafana")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [rule["alert"] for rule in RULES]
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    (scrape,) = yaml.safe_load(block)["scrape_configs"]
    assert all(f'job="{scrape["job_name"]}"' in rule["expr"] for rule in RULES)
    panels = [panel["title"] for panel in BOARD["panels"]]
    assert len(set(panels)) == len({panel["id"] for panel in BOARD["panels"]}) == len(panels) == 12
