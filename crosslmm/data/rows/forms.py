"""The forms of rows that this and other projects publish, each read into a `Conversation`.

A row has the first form of `FORMS` whose `marks` are among its keys. Every key of a row is used, is one of `METADATA`,
which say nothing about the conversation, or makes the row malformed. `docs/data.md` has an example of each form.
"""

import functools
import posixpath
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from crosslmm.data.rows.conversation import Conversation, Part, Turn
from crosslmm.data.rows.media import IMAGE_SUFFIXES, KINDS, VIDEO_SUFFIXES, Kind, Media, media_of, with_time_range
from crosslmm.data.rows.messages import FRAME_HINTS, SIZE_HINTS, messages_of, pairs_of, refuse_keys, turns_of
from crosslmm.data.rows.values import BadRow, parse_json, require_few_values, shown, text_of

EXAMPLE = (
    '{"video": "a.mp4", "messages": [{"role": "user", "content": "<video>What?"}, '
    '{"role": "assistant", "content": "Red."}]}'
)
METADATA = {
    "source", "data_source", "dataset", "dataset_name", "split", "duration", "width", "height", "resolution", "license",
    "width_list", "height_list",  # InternVL
    "v_id",  # Valley
    "key", "url", "status", "error_message", "sha256", "original_width", "original_height", "exif",  # img2dataset
}  # fmt: skip
"""Keys that are known to say where a row comes from and how large its files are, and nothing that is learned."""
NOT_TRAINED = {
    "tools": "tools are not trained",
    "audio": "audio is not read", "audios": "audio is not read",
    "chosen": "preferences are not trained", "rejected": "preferences are not trained",
    "rejected_response": "preferences are not trained", "kto_tag": "preferences are not trained",
    "label": "only text is learned", "objects": "boxes are not filled in",
    "start": "write VIDEO#t=START,END for a part of a video", "end": "write VIDEO#t=START,END for a part of a video",
}  # fmt: skip
"""Key -> what to do instead. Other projects let these keys change what a sample teaches, and this one does not: a row
with one of them is malformed, unless its value is empty."""
UNUSED = (
    dict.fromkeys(FRAME_HINTS, "data.sampling, data.num_frames and data.fps choose the frames of all videos")
    | dict.fromkeys(SIZE_HINTS, "all frames get the size that the encoder takes")
    | {"QA.i": "as in VideoChat2, only the first instruction of a row is used"}
)
"""Keys that are known and not followed, and why."""
LISTS = {"messages", "conversations", "conversation", "QA", "history", "videos", "images", "times"}
"""Keys whose values are lists; in a table, they may be JSON in a text."""
MEDIA = {"video", "videos", "image", "images", "fps", "times"}
SYSTEM = {"system", "system_prompt"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form of rows."""

    marks: frozenset[str]
    """Keys that a row of this form has."""
    keys: frozenset[str]
    """Further keys that it may have, besides `id`, `sample_id`, `kind` and `METADATA`."""
    read: Callable[[Row], Conversation]

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """All keys that a row may have."""
        return self.marks | self.keys | METADATA | {"id", "sample_id", "kind"}


def conversation_of(raw: str | bytes | Row | BadRow, ignored: Collection[str] = ()) -> Conversation:
    """Return the conversation of a raw row of any form.

    Args:
        raw: as `files.read_rows` yields it; fields that are null are left out.
        ignored: further keys that are to be ignored.

    Raises:
        BadRow: it has none of the forms, or an error in its own.
    """
    if isinstance(raw, BadRow):
        raise raw
    row = parse_json(raw) if isinstance(raw, str | bytes) else require_few_values(raw)
    if not isinstance(row, dict):
        raise BadRow(f"is {shown(row)}, and should be an object, say {EXAMPLE}")
    if ignored:
        row = {key: value for key, value in row.items() if key not in ignored}
    for key in LISTS & row.keys():
        if isinstance(row[key], str) and row[key].lstrip()[:1] in ("[", "{"):
            row[key] = parse_json(row[key], f"{key}: ")
    form = next((form for form in FORMS if form.marks <= row.keys()), None)
    if form is None:
        raise BadRow(f"has none of the known forms, with {_names(row)}; a row is, say, {EXAMPLE}")
    _require_known_keys(row, form)
    conversation = form.read(row)
    _add_system(conversation, row)
    conversation.id, conversation.kind = row.get("id", row.get("sample_id")), row.get("kind")
    return conversation


def _names(row: Row) -> str:
    names = ", ".join(ascii(key[:20]) for key in sorted(row)[:5])
    return f"the keys {names}{', ...' if len(row) > 5 else ''}" if row else "no keys"


def _require_known_keys(row: Row, form: Form) -> None:
    if unknown := row.keys() - form.known:
        for key in sorted(unknown & NOT_TRAINED.keys()):
            if row[key] not in ("", [], {}):
                raise BadRow(f"the key {shown(key)} is not supported: {NOT_TRAINED[key]}")
        refuse_keys(unknown - NOT_TRAINED.keys(), "remove it, or convert the manifest with --ignore_keys")


def _add_system(conversation: Conversation, row: Row) -> None:
    """Put a row's system prompt before its messages; it may stand there already."""
    prompts = [text_of(row[key], key) for key in ("system", "system_prompt") if row.get(key)]
    first = conversation.turns[0] if conversation.turns else None
    if first and first.role == "system":
        prompts.append("".join(part.text for part in first.parts))
    if len(set(prompts)) > 1:
        raise BadRow("has two system prompts")
    if prompts and not (first and first.role == "system"):
        conversation.turns.insert(0, Turn("system", prompts[0]))


def _media(row: Row) -> dict[Kind, list[Media]]:
    """Return the videos and images that a row names outside of its messages."""
    return {kind: _media_of_kind(row, kind) for kind in KINDS}


def _media_of_kind(row: Row, kind: Kind) -> list[Media]:
    one, many = row.get(kind), row.get(f"{kind}s")
    if one and many:
        raise BadRow(f"has both {kind} and {kind}s")
    if isinstance(one, list) and not (kind == "video" and _timing(row)):
        one, many = None, one
    return [_timed(value, kind, row) for value in [one, *_as_list(many)] if value]


def _timing(row: Row) -> Row:
    """Return when the frames of a list are shown."""
    return {key: row[key] for key in ("fps", "times") if key in row}


def _timed(value: Any, kind: Kind, row: Row) -> Media:
    timing = _timing(row) if kind == "video" else {}
    if timing and not isinstance(value, list):
        raise BadRow(f"{min(timing)} belongs to a video that is a list of frame files, and this one is {shown(value)}")
    return media_of(value, kind, timing)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_messages(row: Row) -> Conversation:
    unused: set[str] = set()
    turns = messages_of(row["messages"], unused)
    several = row.keys() & {"videos", "images"}
    conversation = Conversation(turns, _media(row), unused=unused, media_first=bool(several))
    parts = [part for turn in turns for part in turn.parts]
    if several:
        conversation.form = "messages with videos or images (ms-swift, LLaMA-Factory)"
    elif unused or any(part.kind != "text" and part.media is not None for part in parts):
        conversation.form = "messages whose parts name their videos (this project, OpenAI, Qwen)"
    else:
        conversation.form = "messages (this project)"
    return conversation


def _read_conversations(row: Row) -> Conversation:
    value, unused = row["conversations"], set[str]()
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        turns, form = messages_of(value, unused, "conversations"), "conversations with role and content"
    elif row.keys() & {"videos", "images"}:
        turns, form = turns_of(value), "conversations with videos or images (LLaMA-Factory's ShareGPT)"
    else:
        turns, form = turns_of(value), "conversations (LLaVA)"
    means_video = form.endswith("(LLaVA)")
    return Conversation(turns, _media(row), form=form, unused=unused, ids_repeat=True, image_means_video=means_video)


def _read_conversation(row: Row) -> Conversation:
    value, unused = row["conversation"], set[str]()
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        turns, form = messages_of(value, unused, "conversation"), "conversations with role and content"
    else:
        turns, form = pairs_of(value, "conversation", "human", "assistant"), "conversation of pairs (ms-swift)"
    return Conversation(turns, _media(row), form=form, unused=unused, ids_repeat=True, media_first=True)


def _read_videochat2(row: Row) -> Conversation:
    turns: list[Turn] = []
    unused: set[str] = set()
    instructions: list[str] = []
    for number, item in enumerate(_as_list(row["QA"]), start=1):
        if not isinstance(item, dict) or not {"q", "a"} <= item.keys() <= {"i", "q", "a"}:
            raise BadRow(
                f'QA {number} is {shown(item)}, and should be {{"i": instruction, "q": question, "a": answer}}'
            )
        instructions.append(text_of(item.get("i", ""), f"i of QA {number}"))
        if item["q"] or not turns:  # a caption has no question
            turns.append(Turn("user", text_of(item["q"], f"q of QA {number}")))
        turns.append(Turn("assistant", text_of(item["a"], f"a of QA {number}")))
    if set(instructions) - {"", instructions[0]}:
        unused.add("QA.i")
    if instructions[0]:
        turns.insert(0, Turn("system", instructions[0]))
    media = _media(row)
    if (count := sum(map(len, media.values()))) != 1:
        raise BadRow(f"a row with QA is about one video or image, and this one about {count}")
    media["video"] = [with_time_range(video, row.get("start"), row.get("end")) for video in media["video"]]
    return Conversation(turns, media, form="QA (VideoChat2)", ids_repeat=True, media_first=True, unused=unused)


def _read_alpaca(row: Row) -> Conversation:
    prompt = [text_of(row[key], key) for key in ("instruction", "input") if row.get(key)]
    turns = [*_history(row), Turn("user", "\n".join(prompt)), Turn("assistant", text_of(row["output"], "output"))]
    return Conversation(turns, _media(row), form="instruction and output (Alpaca)", ids_repeat=True)


def _read_query(row: Row) -> Conversation:
    answer = text_of(row["response"], "response")
    turns = [*_history(row), Turn("user", text_of(row["query"], "query")), Turn("assistant", answer)]
    return Conversation(turns, _media(row), form="query and response (ms-swift)", ids_repeat=True, media_first=True)


def _history(row: Row) -> list[Turn]:
    return pairs_of(row["history"], "history", 0, 1) if row.get("history") else []


def _read_question(row: Row) -> Conversation:
    """Video-ChatGPT's q and a, and tables with a question and an answer."""
    question, answer, form = (
        ("q", "a", "q and a (Video-ChatGPT)") if "q" in row else ("question", "answer", "question and answer")
    )
    turns = [Turn("user", text_of(row[question], question)), Turn("assistant", text_of(row[answer], answer))]
    return _about_one(row, turns, form)


def _read_caption(row: Row) -> Conversation:
    key = next(key for key in ("caption", "text", "name") if key in row)
    return _about_one(row, [Turn("user", []), Turn("assistant", text_of(row[key], key))], "captions")


def _about_one(row: Row, turns: list[Turn], form: str) -> Conversation:
    """Return a conversation about one file, which comes before the text."""
    names = [key for key in FILE_KEYS if row.get(key)]
    if len(names) != 1:
        raise BadRow(f"names {'no' if not names else 'more than one'} file: {' or '.join(names or FILE_KEYS[:3])}")
    value = row[names[0]]
    if names[0] == "videoid":  # WebVid
        value = posixpath.join(str(row.get("page_dir", "")), f"{value}.mp4")
    elif names[0] in ("video_id", "video_name") and isinstance(value, str | int):
        value = str(value) if str(value).lower().endswith(VIDEO_SUFFIXES) else f"{value}.mp4"
    is_image = names[0] == "image" or (isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES))
    kind: Kind = "image" if is_image else "video"
    first = Part(kind, media=_timed(value, kind, row))
    question = turns[0]
    question.content = [first, *(part for part in question.parts if part.text)]
    return Conversation(turns, form=form, ids_repeat=True)


FILE_KEYS = ("video", "file_name", "video_path", "image", "video_id", "video_name", "videoid")
"""Keys that name the file of a caption or a question."""


def _form(marks: str, keys: Collection[str], read: Callable[[Row], Conversation]) -> Form:
    return Form(frozenset(marks.split()), frozenset(keys), read)


FORMS = [
    _form("messages", MEDIA | SYSTEM, _read_messages),
    _form("conversations", MEDIA | SYSTEM, _read_conversations),
    _form("conversation", MEDIA | SYSTEM, _read_conversation),
    _form("QA", MEDIA | {"start", "end"}, _read_videochat2),
    _form("instruction output", MEDIA | SYSTEM | {"input", "history"}, _read_alpaca),
    _form("query response", MEDIA | SYSTEM | {"history"}, _read_query),
    _form("q a", {*FILE_KEYS, "fps", "times"}, _read_question),
    _form("question answer", {*FILE_KEYS, "fps", "times"}, _read_question),
    _form("videoid name", {"contentUrl", "page_dir"}, _read_caption),
    _form("caption", {*FILE_KEYS, "fps", "times"}, _read_caption),
    _form("text", {*FILE_KEYS, "fps", "times"}, _read_caption),
]
