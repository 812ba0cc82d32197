import json
from dataclasses import replace

import pytest

from crosslmm.evaluate import report
from crosslmm.evaluate.scores.judging import Reply
from tests.support.browser_page import console_errors, resize
from tests.support.evaluations import evaluated, replies, source

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'"\u202e\x1b[31m'


def open_page(browser, folder, data, given, width=1280):
    page = report.write(evaluated(data, folder, given), None, None, data)
    resize(browser, width)
    browser.get(f"file://{page}")
    return browser


def visible(browser) -> list[str]:
    return [
        one.get_attribute("data-verdict")
        for one in browser.find_elements("css selector", ".question")
        if one.is_displayed()
    ]


def choose(browser, name: str, value: str) -> None:
    browser.find_element("css selector", f'#{name} option[value="{value}"]').click()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["videomme", "tempcompass"])
def test_page_fits_the_window(browser, tmp_path, width, name):
    data = source(name, tmp_path / "data")
    open_page(browser, tmp_path, data, replies(data), width)
    size = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert size == [width, width]
    images = browser.find_elements("css selector", "article img")
    shown = [image for image in images if image.is_displayed()]
    assert shown
    assert all(browser.execute_script("return arguments[0].naturalWidth", image) == 4 * 96 for image in shown)
    assert console_errors(browser) == []


def test_answers_are_filtered(browser, tmp_path):
    data = source("videomme", tmp_path / "data")
    given = replies(data, ["A", "B", "", "!!!!"], unreadable=[23])
    open_page(browser, tmp_path, data, given)
    assert set(visible(browser)) == {"wrong"}
    choose(browser, "what", "all")
    assert len(visible(browser)) == 24
    choose(browser, "what", "right")
    assert set(visible(browser)) == {"right"}
    for status, count in {"empty": 6, "unparsable": 5, "unreadable": 1}.items():
        choose(browser, "what", status)
        assert len(visible(browser)) == count
    choose(browser, "what", "all")
    choose(browser, "group", "duration=long")
    assert len(visible(browser)) == 6
    assert browser.find_element("id", "number").text == "6 answers"
    assert len([a for a in browser.find_elements("css selector", "article") if a.is_displayed()]) == 2


def test_foreign_text_never_becomes_markup(browser, tmp_path):
    data = source("videomme", tmp_path / "data")
    questions = [
        replace(
            question, id=f"{HOSTILE}{i}", options=(HOSTILE, "y"), groups=((HOSTILE, HOSTILE),),
            messages=[{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": HOSTILE}]}],
        )
        for i, question in enumerate(data.questions)
    ]  # fmt: skip
    hostile = replace(data, questions=questions, uri=HOSTILE)
    given = [Reply(HOSTILE, error=HOSTILE if i % 2 else None) for i in range(24)]
    open_page(browser, tmp_path, hostile, given)
    choose(browser, "what", "all")
    assert len(visible(browser)) == 24
    assert browser.execute_script("return window.hacked") is None
    assert len(browser.find_elements("css selector", "script")) == 2
    groups = browser.find_element("css selector", ".question").get_attribute("data-groups")
    assert json.loads(groups)[0].startswith("</script>")
    assert console_errors(browser) == []
