"""The dashboard draws gauges that exist, and all of them."""

import json
import re

from crosslmm.train.gauges import RUN_GAUGES, STEP_GAUGES, RunGauges
from tests.support.common import ROOT

DASHBOARD = json.loads((ROOT / "cluster/grafana.json").read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_draws_every_gauge_and_no_other():
    drawn = {name for target in TARGETS for name in re.findall(r"ray_(crosslmm_\w+)", target["expr"])}
    assert drawn == {name for name, _ in [*STEP_GAUGES.values(), *RUN_GAUGES.values()]}


def test_the_dashboard_selects_and_names_by_labels_that_the_gauges_have():
    (of_gauges,) = {gauge._tag_keys for gauge in RunGauges("first")._gauges.values()}
    selected = [re.findall(r"ray_crosslmm_\w+(?:\{([^}]*)\})?", target["expr"]) for target in TARGETS]
    for selector in (one for ones in selected for one in ones):
        labels = dict(re.findall(r'(\w+)=~"([^"]*)"', selector))
        assert labels == {"run": "$run"}, "a panel shows the runs that are chosen, and no others"
        assert labels.keys() <= set(of_gauges)
    assert {label for target in TARGETS for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} == {"run"}
    (chosen,) = [variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run"]
    assert chosen["query"] == "label_values(ray_crosslmm_step, run)"
