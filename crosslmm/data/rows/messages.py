"""Messages with role and content, as OpenAI, Qwen, Transformers, ms-swift, LLaMA-Factory and this project write them;
and turns with from and value, as LLaVA does."""

from collections.abc import Callable, Iterable
from typing import Any

from crosslmm.data.rows.conversation import Part, Turn
from crosslmm.data.rows.media import Kind, media_of, with_time_range
from crosslmm.data.rows.values import BadRow, shown, text_of

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PART_FORMS = (
    'a part is {"type": "text", "text": ...}, {"type": "video", "video": PATH} or {"type": "image", "image": PATH}, or '
    '{"type": "video_url", "video_url": {"url": PATH}}'
)
MEDIA_KEYS: dict[str, Kind] = {"video": "video", "video_url": "video", "image": "image", "image_url": "image"}
"""Types of parts that are media, which are also the keys of their paths."""
FRAME_HINTS = {"fps", "nframes", "min_frames", "max_frames", "raw_fps"}
"""Keys of a part that ask for other frames than the run's policy; for a list of frames, `fps` says when they are."""
SIZE_HINTS = {"min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "detail"}
"""Keys of a part that ask for another size of the frames."""
FRAME_LIST_KEYS = {"fps", "sample_fps", "times"}
RANGE_KEYS = {"video_start", "video_end"}
KNOWN_KEYS = {
    "image": {"type"} | SIZE_HINTS,
    "video": {"type"} | SIZE_HINTS | FRAME_HINTS | FRAME_LIST_KEYS | RANGE_KEYS,
}
"""Keys of a part besides that of its path, by kind."""


def messages_of(value: Any, unused: set[str], name: str = "messages") -> list[Turn]:
    """Return the turns of a list of messages {"role": ..., "content": text or parts}.

    Args:
        value: the list.
        unused: keys that are known and not followed are added to it.
        name: what error messages call the list.

    Raises:
        BadRow: it is not such a list.
    """
    return _each(value, name, "message", lambda message: _message(message, unused))


def turns_of(value: Any) -> list[Turn]:
    """Return the turns of LLaVA's conversations: {"from": ..., "value": text}.

    Raises:
        BadRow: it is not such a list.
    """
    return _each(value, "conversations", "turn", _turn)


def pairs_of(value: Any, name: str, questions: str | int, answers: str | int) -> list[Turn]:
    """Return the turns of a list of questions with answers, which are two keys of an object, or two places of a list.

    Raises:
        BadRow: it is not such a list.
    """
    turns: list[Turn] = []
    for number, pair in enumerate(_list(value, name), start=1):
        is_object = isinstance(pair, dict) and pair.keys() == {questions, answers}
        is_list = isinstance(pair, list) and len(pair) == 2
        if not (is_object if isinstance(questions, str) else is_list):
            raise BadRow(f"{name} {number} is {shown(pair)}, and should be a question and its answer")
        turns.append(Turn("user", text_of(pair[questions], f"the question of {name} {number}")))
        turns.append(Turn("assistant", text_of(pair[answers], f"the answer of {name} {number}")))
    return turns


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is {shown(value)}, and should be a list with at least one element")
    return value


def _each(value: Any, name: str, one: str, read: Callable[[dict[str, Any]], Turn]) -> list[Turn]:
    turns: list[Turn] = []
    for number, item in enumerate(_list(value, name), start=1):
        try:
            if not isinstance(item, dict):
                raise BadRow(f"is {shown(item)}, and should be an object")
            turns.append(read(item))
        except BadRow as error:
            raise BadRow(f"{one} {number}: {error}") from None
    return turns


def _turn(turn: dict[str, Any]) -> Turn:
    if turn.keys() != {"from", "value"}:
        raise BadRow(f'a turn is {{"from": "human", "gpt" or "system", "value": text}}; this one is {shown(turn)}')
    return Turn(_role(turn["from"], "from"), text_of(turn["value"], "its value"))


def _message(message: dict[str, Any], unused: set[str]) -> Turn:
    known = {"role", "content", "loss"} if message.get("loss") is True else {"role", "content"}  # ms-swift's default
    refuse_keys(message.keys() - known, 'a message is {"role": ..., "content": text or parts}')
    if "content" not in message:
        raise BadRow('it has no content; a message is {"role": ..., "content": text or parts}')
    role, content = _role(message.get("role"), "role"), message["content"]
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, list):
        raise BadRow(f"its content is {shown(content)}, and should be text or a list of parts")
    parts = [_part(part, number, unused) for number, part in enumerate(content, start=1)]
    if role != "assistant":
        return Turn(role, parts)
    # A column has one type: where questions are lists of parts, answers are too.
    if any(part.kind != "text" for part in parts):
        raise BadRow("an answer is text only, and this one has a video or an image")
    return Turn(role, "".join(part.text for part in parts))


def _role(role: Any, key: str) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{key} is {shown(role)}, and should be one of {', '.join(ROLES)}")
    return ROLES[role]


def _part(part: Any, number: int, unused: set[str]) -> Part:
    if not isinstance(part, dict):
        raise BadRow(f"part {number} is {shown(part)}; {PART_FORMS}")
    kinds = [key for key in ("text", *MEDIA_KEYS) if key in part]  # Qwen leaves the type out
    kind = part.get("type", kinds[0] if len(kinds) == 1 else None)
    try:
        if kind == "text":
            refuse_keys(part.keys() - {"type", "text"}, PART_FORMS)
            return Part("text", text_of(part.get("text"), "its text"))
        if isinstance(kind, str) and kind in MEDIA_KEYS:
            return _media_part(part, kind, unused)
    except ValueError as error:
        raise BadRow(f"part {number}: {error}") from None
    raise BadRow(f"part {number} has the type {shown(kind)}; {PART_FORMS}")


def _media_part(part: dict[str, Any], key: str, unused: set[str]) -> Part:
    kind = MEDIA_KEYS[key]
    sources = [name for name in (key, "url", "path") if name in part]  # Transformers has url and path
    others = part.keys() - {"type", *sources}
    refuse_keys(others - KNOWN_KEYS[kind], PART_FORMS)
    if len(sources) > 1:
        raise BadRow(f"it has both {sources[0]} and {sources[1]}")
    value = part[sources[0]] if sources else None
    if isinstance(value, list):
        others -= FRAME_LIST_KEYS
    elif wrong := others & (FRAME_LIST_KEYS - FRAME_HINTS):
        raise BadRow(f"{min(wrong)} belongs to a list of frames, and this video is none")
    unused |= others & (FRAME_HINTS | SIZE_HINTS)
    if value is None:
        if key != kind or others & RANGE_KEYS:
            raise BadRow(f"it names no {kind}; {PART_FORMS}")
        return Part(kind)
    media = media_of(value, kind, part)
    return Part(kind, media=with_time_range(media, part.get("video_start"), part.get("video_end")))


def refuse_keys(keys: Iterable[str], remedy: str) -> None:
    """Raise BadRow, which names the first of these keys, if there are any."""
    for key in sorted(keys)[:1]:
        raise BadRow(f"the key {shown(key)} is not known here; {remedy}")
