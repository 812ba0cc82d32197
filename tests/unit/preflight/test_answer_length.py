import json

import pytest

from crosslmm.config import BadConfig
from crosslmm.data.manifest import Manifest
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.scoring import MARGIN_TOKENS
from tests.support.common import conversation

LONG = "A brown dog jumps over the fence, and then comes back."


@pytest.fixture
def write(tmp_path):
    def write(*conversations):
        rows = [{"id": f"{i}", "messages": messages} for i, messages in enumerate(conversations)]
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return Manifest(str(tmp_path / "rows.jsonl"))

    return write


def ask(answer, question="What?"):
    return conversation(question, answer, video=False)


def test_the_limit_is_the_longest_answer_and_a_margin(write, processor):
    several = [*ask(LONG), *ask("yes", "Sure?")]
    tokens = len(processor.tokenizer(LONG)["input_ids"]) + 1  # the token that ends it
    assert answer_limit(write(ask("red"), several, ask("blue")), processor) == tokens + MARGIN_TOKENS


def test_an_answer_takes_what_training_learns_of_it(processor):
    labels = processor([ask(LONG)], [[]])["labels"]
    assert processor.answer_length(LONG) == int((labels != -100).sum())


def test_a_limit_that_cuts_an_answer_is_refused(write, processor):
    manifest = write(ask("red"), ask(LONG), ask("blue"))
    length = processor.answer_length(LONG)
    assert answer_limit(manifest, processor, length) == length
    with pytest.raises(BadConfig, match=rf"train\.max_new_tokens is {length - 1}, and the answer on line 2 of .*rows"):
        answer_limit(manifest, processor, length - 1)


def test_one_endless_answer_leaves_room_for_other_prompts(write, processor):
    half = processor.max_length // 2
    manifest = write(ask("red"), ask("up " * 5000))
    assert answer_limit(manifest, processor) == half
    processor.require_room(ask("red")[:1], [], "red", half)
    with pytest.raises(ValueError, match=rf"an answer takes \d+ tokens, and at most {half} are generated"):
        processor.require_room(ask("")[:1], [], "up " * 5000, half)


def test_unusual_messages_of_a_prepared_row_do_not_stop_a_run(processor):
    class Rows:
        uri = "rows"

        def __len__(self):
            return 6

        def take(self, indices):
            bad = [None, ["red"], {"role": "user"}, [{"role": "assistant", "content": None}], [{"content": "?"}]]
            return [{"messages": messages, "line": i} for i, messages in enumerate([*bad, ask(LONG)])]

    assert answer_limit(Rows(), processor) == processor.answer_length(LONG) + MARGIN_TOKENS
