"""The dashboard draws gauges that exist, and all of them."""

import json
import re

from crosslmm.train.gauges import OF_RUN, OF_STEP
from tests.support.common import ROOT


def test_the_dashboard_draws_every_gauge_and_no_other():
    text = (ROOT / "cluster/grafana.json").read_text()
    panels = json.loads(text)["panels"]
    drawn = {name for p in panels for t in p["targets"] for name in re.findall(r"ray_(crosslmm_\w+)", t["expr"])}
    assert drawn == {name for name, _ in [*OF_STEP.values(), *OF_RUN.values()]}
