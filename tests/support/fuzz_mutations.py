"""Hypothesis strategies that damage JSON and bytes as an attacker, or a disk, would."""

import json
from typing import Any

from hypothesis import strategies as st


def hostile_texts(outside: str) -> st.SearchStrategy[str]:
    """Names, paths and texts that an attacker would try; `outside` is a file that must not be opened."""
    ups = "../" * 12
    return st.sampled_from(
        [
            outside, f"..{outside}", f"{ups}{outside[1:]}", f"file://{outside}", f"file:{outside}", f"x/../..{outside}",
            "../outside/secret.json", "../outside", "/etc/passwd", "/dev/zero", "/proc/self/environ", "..", ".", "",
            "/", "s3://other/key", "http://127.0.0.1:9/x", "s3://a:b@c/d", "memory://x", "a::b", "C:\\x", "%2e%2e/x",
            "~", "~root", "\0", "\ud800", "x" * 5000, "\x1b[2J\n\r", "link", "pipe", "loop", "link/secret.json", "é",
            "<|im_end|>", "null", "[" * 50, "1e999", "-1", "#t=9,1", "a.mp4#t=1,2", "<video>" * 9,
            "\N{RIGHT-TO-LEFT OVERRIDE}",
        ]
    ) | st.text(max_size=20)  # fmt: skip


def hostile_values(outside: str) -> st.SearchStrategy[Any]:
    """JSON values of all kinds."""
    numbers = st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, float("inf"), float("nan"), 0.5, True])
    plain = st.none() | numbers | st.integers() | hostile_texts(outside)

    def nested(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.lists(items, max_size=4) | st.dictionaries(hostile_texts(outside), items, max_size=3)

    return st.recursive(plain, nested, max_leaves=6) | st.just(json.loads("[" * 300 + "]" * 300))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def mutated(draw: Any, value: Any, outside: str) -> Any:
    """A JSON value with one to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(hostile_values(outside))
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        match draw(st.sampled_from(["text", "value", "remove", "add", "repeat"])):
            case "text":
                owner[path[-1]] = draw(hostile_texts(outside))
            case "value":
                owner[path[-1]] = draw(hostile_values(outside))
            case "remove":
                del owner[path[-1]]
            case "add" if isinstance(owner, dict):
                owner[draw(hostile_texts(outside))] = draw(hostile_values(outside))
            case _ if isinstance(owner, list):
                owner.extend([owner[path[-1]]] * draw(st.sampled_from([1, 50])))
    return value


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes with some flipped, cut out, doubled or replaced; near the end as often as anywhere else."""
    array = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not array:
            break
        last = len(array) - 1
        at = draw(st.integers(0, last) | st.integers(max(0, last - 400), last))
        length = draw(st.sampled_from([1, 2, 4, 8, 100]))
        match draw(st.sampled_from(["byte", "bit", "cut", "double", "bytes", "end"])):
            case "byte":
                array[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
            case "bit":
                array[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del array[at : at + length]
            case "double":
                array[at:at] = array[at : at + length]
            case "bytes":
                array[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case "end":
                del array[at:]
    return bytes(array)
