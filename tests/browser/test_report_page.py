import pytest

from crosslmm.sweep.report import write
from tests.support import sweeps
from tests.support.browser_page import console_errors, resize

WIDTHS = (1280, 400)


def open_report(browser, folder, distributions, trials, width=1280, **changed):
    page = write(folder, sweeps.sweep(distributions, **changed), trials)
    resize(browser, width)
    browser.get(page.as_uri())
    return browser


def evaluate(browser, expression):
    return browser.execute_script(f"return {expression}")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("space", ["joint", "ablation"])
def test_all_plots_are_drawn_without_sideways_scrolling(browser, tmp_path, width, space):
    drawn, trials = {
        "joint": (sweeps.JOINT, sweeps.joint()),
        "ablation": (sweeps.ABLATION, sweeps.ablation()),
    }[space]
    open_report(browser, tmp_path / "report", drawn, trials, width)
    assert evaluate(browser, "[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    plots = browser.find_elements("css selector", ".js-plotly-plot")
    assert [plot.get_attribute("id") for plot in plots] == ["front", "importance", "parallel", "curves"]
    for plot in plots:
        svg = plot.find_element("css selector", ".main-svg")
        assert svg.size["width"] > 0.8 * min(width - 24, 1140)
        assert svg.size["height"] > 100
        # Lines or bars.
        assert plot.find_elements("css selector", ".scatterlayer path.js-line, .barlayer path")
    assert len(browser.find_elements("css selector", "#trials tbody tr")) == len(trials)
    assert console_errors(browser) == []


# The knee is close to the best trial, at the right end.
CROWDED = [
    sweeps.trial(i, accuracy, macs, tokens=16)
    for i, (accuracy, macs) in enumerate([(0.5, 10**8), (0.95, 97 * 10**7), (0.96, 10**9)])
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("trials", [sweeps.joint(), CROWDED, CROWDED[:1]], ids=["joint", "crowded", "one"])
def test_no_plot_label_is_cut_off(browser, tmp_path, width, trials):
    open_report(browser, tmp_path / "report", sweeps.JOINT, trials, width)
    outside = """[...document.querySelectorAll(".js-plotly-plot")].flatMap(plot => {
        const frame = plot.getBoundingClientRect();
        return [...plot.querySelectorAll("svg text")].filter(text => {
            const box = text.getBoundingClientRect();
            return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
                || box.bottom > frame.bottom + 1);
        }).map(text => plot.id + ": " + text.textContent);
    })"""
    assert evaluate(browser, outside) == []


def test_plots_follow_the_window(browser, tmp_path):
    open_report(browser, tmp_path / "report", sweeps.JOINT, sweeps.joint())
    resize(browser, 400)
    browser.execute_async_script("setTimeout(arguments[0], 500)")
    assert evaluate(browser, "document.querySelector('#front .main-svg').clientWidth") <= 400
    assert evaluate(browser, "document.documentElement.scrollWidth") == 400


def test_foreign_text_never_becomes_markup(browser, tmp_path):
    bad = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>&amp;"
    trials = [
        sweeps.trial(i, 0.9 + i / 100, 10**8 + i, point={"model.pooling": [bad, "max"][i % 2], "seed": i}, error=bad)
        for i in range(4)
    ]
    trials.append(sweeps.trial(4, state="failed", steps=0, error=bad))
    drawn = {
        name: sweeps.CategoricalDistribution(x) for name, x in {"model.pooling": [bad, "max"], "seed": range(4)}.items()
    }
    open_report(
        browser,
        tmp_path / "report",
        drawn,
        trials,
        1280,
        name=bad,
        facts={bad: bad},
        rejected=[({"seed": 9}, bad)],
        command=bad,
    )
    assert evaluate(browser, "window.ran") is None
    assert browser.find_elements("css selector", "img") == []
    cells = browser.find_elements("css selector", "#trials td.error")
    assert [cell.text for cell in cells] == [bad] * 5
    assert browser.find_element("css selector", "dd").text == bad
    assert browser.find_element("css selector", "dd code").text == bad
    assert [item.text for item in browser.find_elements("css selector", "li")] == [f"{bad} (1)", f"trial 4: {bad}"]
    labels = [text.text for text in browser.find_elements("css selector", "#parallel .annotation text")]
    assert bad in labels
    # The hover text of the front shows the point too.
    browser.execute_script("Plotly.Fx.hover('front', [{curveNumber: 0, pointNumber: 0}])")
    hover = browser.find_element("css selector", "#front .hovertext").text
    assert "model.pooling = <script>window.ran" in hover
    assert evaluate(browser, "window.ran") is None
    assert console_errors(browser) == []


def test_report_without_trials_is_a_valid_page(browser, tmp_path):
    open_report(browser, tmp_path / "report", sweeps.JOINT, [], 400)
    assert len(browser.find_elements("css selector", ".absent")) == 4
    assert evaluate(browser, "document.documentElement.scrollWidth") == 400
    assert console_errors(browser) == []


def test_click_on_a_heading_sorts_the_table(browser, tmp_path):
    trials = [sweeps.trial(i, accuracy, point={}) for i, accuracy in enumerate([0.5, 0.9, 0.7])]
    trials.append(sweeps.trial(3, state="failed", steps=0))
    open_report(browser, tmp_path / "report", sweeps.JOINT, trials)
    head = next(b for b in browser.find_elements("css selector", "th button") if b.text == "accuracy")
    orders = []
    for _ in range(2):
        browser.execute_script("arguments[0].click()", head)
        orders.append(
            [cell.text.split()[0] for cell in browser.find_elements("css selector", "#trials td:first-child")]
        )
    assert orders == [["0", "2", "1", "3"], ["1", "2", "0", "3"]]
