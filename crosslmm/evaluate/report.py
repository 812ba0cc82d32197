"""Writes the page of an evaluation: the scores, and answers with the frames that the model saw."""

import json
from collections.abc import Sequence
from typing import Any

from crosslmm.evaluate.asking.blocks import VideoRows
from crosslmm.evaluate.evaluated import ModelEvaluation
from crosslmm.evaluate.evaluation_folder import ANSWERS_FILE, PAGE_FILE, SCORES_FILE
from crosslmm.evaluate.questions.source import Source
from crosslmm.evaluate.scores.intervals import Estimate
from crosslmm.evaluate.scores.judging import STATUSES, Answer
from crosslmm.html_page import document, escaped

MAX_ANSWERS = 400
"""Answers on the page, the wrong ones first; answers.jsonl has all of them."""
MAX_STRIP_BYTES = 12 * 2**20
"""Pictures on the page [bytes of base64]."""
MAX_CHARACTERS = 1_500
"""Characters of a question, an option or an answer on the page."""
MAX_GROUPS = 100
"""Groups that the filter offers."""


def write(
    evaluated: ModelEvaluation, rival: ModelEvaluation | None, difference: Estimate | None, source: Source
) -> str:
    """Write answers, scores and page of an evaluation, and answers and scores of the other model; return the page's
    path or URI."""
    for one in (evaluated, rival):
        if one:
            one.folder.write_answers(one.answers)
            one.folder.write(SCORES_FILE, json.dumps(one.score.as_json(), indent=1).encode())
    return evaluated.folder.write(PAGE_FILE, page(evaluated, rival, difference, source).encode())


def page(evaluated: ModelEvaluation, rival: ModelEvaluation | None, difference: Estimate | None, source: Source) -> str:
    """Return the page."""
    score, count = evaluated.score, len(evaluated.answers)
    counts = ", ".join(f"{score.counts[status]:,} {status}" for status in STATUSES)
    identity = evaluated.begun["identity"]
    facts = {
        "Model": evaluated.model,
        "Data": source.uri,
        "Questions": f"{count:,}: {counts}",
        "Videos": f"{score.accuracy.clusters:,}",
        "Frames": f"up to {identity['num_frames']} a video, {identity['sampling']}",
        "Answers": "the most likely choice" if identity["likelihood"] else f"up to {identity['max_new_tokens']} tokens",
        **{f"SHA-256 of the {what}": digest[:16] for what, digest in _digests(source, identity).items()},
    }
    facts_html = "".join(f"<div><dt>{escaped(k)}</dt><dd>{escaped(v)}</dd></div>" for k, v in facts.items())
    shown = _shown(evaluated.answers)
    body = f"""<h1>{escaped(source.label)}</h1>
<p class="answer">{escaped(_headline(evaluated))}</p>
{_comparison(rival, difference)}<dl>{facts_html}</dl>
{_groups(evaluated)}
<section><h2>Answers</h2>
<p>{_selection(len(shown), count)} The pictures are frames that the model saw, up to eight of them.</p>
{_filters(shown)}
<div id="videos">{_videos(shown, evaluated, source)}</div>
</section>"""
    return document(f"{source.label}: {evaluated.model}", body, style=STYLE, script=FILTER)


def _digests(source: Source, identity: dict[str, Any]) -> dict[str, str]:
    return {"data": source.digest, "prompts": identity["questions_sha256"], "model": identity["model_sha256"]}


def _headline(evaluated: ModelEvaluation) -> str:
    score = evaluated.score
    if not evaluated.reliable:
        return (
            f"No score: {score.counts['unreadable']:,} of {score.questions:,} questions could not be asked, which is "
            f"{score.unreadable:.1%}."
        )
    return f"Accuracy {score.accuracy}, 95 % interval clustered by video."


def _comparison(rival: ModelEvaluation | None, difference: Estimate | None) -> str:
    if rival is None or difference is None:
        return ""
    theirs = str(rival.score.accuracy) if rival.reliable else "no score"
    text = f"{rival.model}: {theirs}. Difference, paired by question: {difference}."
    return f"<p>Against {escaped(text)}</p>\n"


def _groups(evaluated: ModelEvaluation) -> str:
    rows = "".join(
        f"<tr><td>{escaped(key)}</td><td>{escaped(value)}</td><td>{one.value:.3f}</td>"
        f"<td>{one.low:.3f} to {one.high:.3f}</td><td>{one.count:,}</td><td>{one.clusters:,}</td></tr>"
        for key, values in evaluated.score.by_group.items()
        for value, one in values.items()
    )
    if not rows or not evaluated.reliable:
        return ""
    heads = "".join(f"<th>{head}</th>" for head in ("group", "", "accuracy", "95 % interval", "questions", "videos"))
    return f"""<section><h2>By group</h2>
<div class="box"><table class="groups"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"""


def _shown(answers: Sequence[Answer]) -> list[Answer]:
    """Return the answers of the page, in the order of the benchmark: up to the limit, wrong ones before right ones."""
    chosen = sorted(answers, key=lambda answer: (answer.right, answer.number))[:MAX_ANSWERS]
    return sorted(chosen, key=lambda answer: answer.number)


def _selection(shown: int, count: int) -> str:
    if shown == count:
        return f"All {count:,} answers are on this page."
    return (
        f"{shown:,} of {count:,} answers are on this page, wrong ones rather than right ones; {ANSWERS_FILE} has all."
    )


def _filters(shown: Sequence[Answer]) -> str:
    statuses = "".join(f'<option value="{status}">{status}</option>' for status in STATUSES)
    groups = sorted({f"{key}={value}" for answer in shown for key, value in answer.question.groups})[:MAX_GROUPS]
    options = "".join(f'<option value="{escaped(group)}">{escaped(group)}</option>' for group in groups)
    return f"""<p class="filters"><label>Show <select id="what"><option value="wrong">wrong</option>
<option value="all">all</option><option value="right">right</option>{statuses}</select></label>
<label>Group <select id="group"><option value="">all</option>{options}</select></label> <span id="number"></span></p>"""


def _videos(shown: Sequence[Answer], evaluated: ModelEvaluation, source: Source) -> str:
    """Return a card for each video, with its frames and the answers about it."""
    rows = VideoRows(source.questions, source.uri, source.roots)
    row_of = {number: row for row, numbers in enumerate(rows.groups) for number in numbers}
    cards: dict[int, list[Answer]] = {}
    for answer in shown:
        # Questions that could not be asked have no row; each gets a card of its own.
        cards.setdefault(row_of.get(answer.number, -1 - answer.number), []).append(answer)
    strips = _strips(evaluated, {str(row) for row in cards})
    return "".join(_card(answers, strips.get(str(row))) for row, answers in cards.items())


def _strips(evaluated: ModelEvaluation, wanted: set[str]) -> dict[str, str]:
    """Return the pictures of these rows, as far as the page has room for them."""
    strips: dict[str, str] = {}
    size = 0
    for block in evaluated.folder.strips():
        for row, jpeg in block.items():
            if row in wanted and size + len(jpeg) <= MAX_STRIP_BYTES:
                strips[row] = jpeg
                size += len(jpeg)
    return strips


def _card(answers: Sequence[Answer], jpeg: str | None) -> str:
    first = answers[0]
    names = ", ".join("/".join(video.split("/")[-2:]) for video in first.question.videos) or "no video"
    times = [time for of_video in first.reply.times for time in of_video]
    span = f"{len(times)} frames, {min(times):g} s to {max(times):g} s" if times else "no frames"
    picture = f'<img alt="frames of the video" src="data:image/jpeg;base64,{escaped(jpeg)}">' if jpeg else ""
    questions = "".join(map(_question, answers))
    return f"""<article><h3>{escaped(_clipped(names))}</h3><p class="span">{escaped(span)}</p>
{picture}{questions}</article>
"""


def _question(answer: Answer) -> str:
    question, reply = answer.question, answer.reply
    verdict = "right" if answer.right else "wrong"
    options = "".join(_option(answer, i, option) for i, option in enumerate(question.options))
    expected = "" if options else f"<dt>expected</dt><dd>{escaped(_clipped(question.answer))}</dd>"
    reply_text = reply.error if reply.error is not None else reply.text
    label = "not asked" if reply.error is not None else "answer"
    extracted = f" &rarr; {escaped(answer.extracted)}" if answer.extracted and answer.extracted != reply.text else ""
    groups = escaped(json.dumps([f"{key}={value}" for key, value in question.groups]))
    shown = "".join(f", {value}" for _, value in question.groups)
    data = f'data-verdict="{verdict}" data-status="{answer.status}" data-groups="{groups}"'
    return f"""<div class="question {verdict}" {data}>
<p class="id"><span class="mark">{verdict}</span> {escaped(question.id)}, {answer.status}{escaped(shown)}</p>
<p class="text">{escaped(_clipped(question.text))}</p><ul>{options}</ul>
<dl>{expected}<dt>{label}</dt><dd>{escaped(_clipped(reply_text))}{extracted}</dd></dl></div>"""


def _option(answer: Answer, number: int, option: str) -> str:
    """Return an option, marked if it is the expected one, or if it was chosen."""
    choices = answer.question.choices
    letter = choices[number] if number < len(choices) else ""
    marks = [
        name
        for name, value in (("expected", answer.question.answer), ("chosen", answer.extracted))
        if value and value in (letter, option, option.split(":")[0])
    ]
    text = option if option.startswith(letter) else f"{letter}. {option}"
    note = f" <em>{' and '.join(marks)}</em>" if marks else ""
    return f'<li class="{" ".join(marks)}">{escaped(_clipped(text))}{note}</li>'


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."


STYLE = """
.groups th:nth-child(2),.groups td:nth-child(2){text-align:left}
.filters label{margin-right:18px}
select{font:inherit;max-width:100%}
article{border-top:2px solid #999;margin:24px 0 0;padding:10px 0 0}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}
.span{font-size:.8rem;color:#595959;margin:0 0 6px}
article img{max-width:100%;height:auto;display:block}
.question{border-left:4px solid #D55E00;padding:2px 0 2px 12px;margin:14px 0}
.question.right{border-color:#009E73}
.question .id{font-size:.8rem;color:#595959;margin:0}
.question .text{color:#222;white-space:pre-line;margin:0 0 4px}
.question dl{display:block}
.question dd{white-space:pre-line}
.mark{font-weight:600}
li.expected{font-weight:600}
[hidden]{display:none}
"""

FILTER = """
const what = document.querySelector("#what"), group = document.querySelector("#group");
function update() {
  let number = 0;
  for (const article of document.querySelectorAll("article")) {
    let visible = 0;
    for (const one of article.querySelectorAll(".question")) {
      const kind = ["all", one.dataset.verdict, one.dataset.status].includes(what.value);
      const member = group.value === "" || JSON.parse(one.dataset.groups).includes(group.value);
      one.hidden = !(kind && member);
      visible += !one.hidden;
    }
    article.hidden = !visible;
    number += visible;
  }
  document.querySelector("#number").textContent = number === 1 ? "1 answer" : `${number} answers`;
}
what.addEventListener("change", update);
group.addEventListener("change", update);
update();
"""
