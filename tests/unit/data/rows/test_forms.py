"""The forms of rows that other projects publish, each against a conversation that is written out."""

import json

import pytest

from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.row_schema import to_record
from crosslmm.data.rows.forms import METADATA, NOT_TRAINED
from crosslmm.data.rows.values import BadRow

FOLDER = "/data"
VIDEO, IMAGE = {"type": "video"}, {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def assistant(words):
    return {"role": "assistant", "content": words}


def system(words):
    return {"role": "system", "content": words}


def read(row, **options):
    """(videos without their folder, messages) of a row."""
    record = to_record(json.dumps(row), 1, [FOLDER], f"{FOLDER}/train.jsonl", **options)
    return [video.replace(f"{FOLDER}/", "") for video in record["videos"]], json.loads(record["messages"])


def human(*values):
    """LLaVA's turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def messages(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# Name of a form, a row as the project's own description has it, and what the model sees.
FORMS = {
    "this project": (
        {"id": "a", "video": "a.mp4", "kind": "colour", "messages": messages([VIDEO, text("What?")], "Red.")},
        ["a.mp4"],
        [user(VIDEO, text("What?")), assistant("Red.")],
    ),
    "this project, several": (
        {"id": "a", "messages": messages(
            [{"type": "video", "video": "a.mp4#t=1,2"}, text("And?"), {"type": "image", "image": "b.png"}], "Yes."
        )},
        ["a.mp4#t=1,2", "b.png"],
        [user(VIDEO, text("And?"), IMAGE), assistant("Yes.")],
    ),
    "LLaVA": (
        {"id": 7, "video": "a.mp4", "source": "x", "conversations": human("<image>\nWhat?", "Red.", "And?", "No.")},
        ["a.mp4"],
        [user(VIDEO, text("What?")), assistant("Red."), user("And?"), assistant("No.")],
    ),
    "LLaVA with images": (
        {"id": "1", "image": ["a.jpg", "b.jpg"], "conversations": human("<image>Before\n<image> after?", "No.")},
        ["a.jpg", "b.jpg"],
        [user(IMAGE, text("Before"), IMAGE, text("after?")), assistant("No.")],
    ),
    "LLaVA with lists of both": (  # lmms-finetune's docs/dataset.md
        {"system_prompt": "Answer.", "video": ["a.mp4", "b.mp4"], "image": "c.jpg", "conversations": human(
            "<video><video>What are these videos about?", "A band.", "<image>What does this image show?", "It."
        )},
        ["a.mp4", "b.mp4", "c.jpg"],
        [system("Answer."), user(VIDEO, VIDEO, text("What are these videos about?")), assistant("A band."),
         user(IMAGE, text("What does this image show?")), assistant("It.")],
    ),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": human("<video>What?", "yes"), "system": "Be brief.", "tools": "", "videos": ["a.mp4"]},
        ["a.mp4"],
        [system("Be brief."), user(VIDEO, text("What?")), assistant("yes")],
    ),
    "LLaMA-Factory, demo": (
        {"messages": messages("<video>Why is this video funny?", "Because."), "videos": ["demo/1.mp4"]},
        ["demo/1.mp4"],
        [user(VIDEO, text("Why is this video funny?")), assistant("Because.")],
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "<video>Describe it", "input": "in a word", "output": "Red.", "system": "S",
         "history": [["first?", "one"], ["second?", "two"]], "videos": ["a.mp4"]},
        ["a.mp4"],
        [system("S"), user("first?"), assistant("one"), user("second?"), assistant("two"),
         user(VIDEO, text("Describe it\nin a word")), assistant("Red.")],
    ),
    "ms-swift": (
        {"messages": [system("S"), *messages("<image>What is in the image, <video>What is in the video?", "A lion.")],
         "images": ["x.jpg"], "videos": ["x.mp4"]},
        ["x.jpg", "x.mp4"],
        [system("S"), user(IMAGE, text("What is in the image,"), VIDEO, text("What is in the video?")),
         assistant("A lion.")],
    ),
    "ms-swift without a tag": (  # its template puts missing tags before the first message
        {"messages": [system("S"), *messages("What is it?", "A lion.")], "videos": ["x.mp4", "y.mp4"]},
        ["x.mp4", "y.mp4"],
        [system("S"), user(VIDEO, VIDEO, text("What is it?")), assistant("A lion.")],
    ),
    "ms-swift, query": (
        {"system": "S", "query": "<video>And?", "response": "Blue.", "history": [["What?", "Red."]],
         "videos": ["a.mp4"]},
        ["a.mp4"],
        [system("S"), user("What?"), assistant("Red."), user(VIDEO, text("And?")), assistant("Blue.")],
    ),
    "ms-swift, ShareGPT": (
        {"system": "S", "conversation": [{"human": "<video>What?", "assistant": "Red."}, {"human": "And?",
         "assistant": "No."}], "videos": ["a.mp4"]},
        ["a.mp4"],
        [system("S"), user(VIDEO, text("What?")), assistant("Red."), user("And?"), assistant("No.")],
    ),
    "OpenAI": (
        {"messages": [system("S"), user(text("Which?"), {"type": "image_url", "image_url": {"url": "a.png", "detail":
         "high"}}, {"type": "video_url", "video_url": {"url": "file:///data/b.mp4"}}), assistant("Both.")]},
        ["a.png", "file://b.mp4"],
        [system("S"), user(text("Which?"), IMAGE, VIDEO), assistant("Both.")],
    ),
    "Qwen": (
        {"messages": messages([{"type": "video", "video": "a.mp4", "fps": 2.0, "max_pixels": 151200, "video_start": 2,
         "video_end": 10.5}, text("Describe this video.")], [text("A dog.")])},
        ["a.mp4#t=2,10.5"],
        [user(VIDEO, text("Describe this video.")), assistant("A dog.")],
    ),
    "Qwen, frames": (
        {"messages": messages([{"type": "video", "video": ["f/1.jpg", "f/2.jpg"], "sample_fps": 1.0}, text("?")], "A")},
        ['{"frames":["f/1.jpg","f/2.jpg"],"fps":1.0}'],
        [user(VIDEO, text("?")), assistant("A")],
    ),
    "Transformers": (
        {"messages": messages([{"type": "video", "url": "a.mp4"}, {"type": "image", "path": "b.png"}, text("?")], "A")},
        ["a.mp4", "b.png"],
        [user(VIDEO, IMAGE, text("?")), assistant("A")],
    ),
    "TRL": (  # parts without a path take the next of the column
        {"images": ["a.png", "b.png"], "messages": messages([{"type": "image", "text": None}, {"type": "image"},
         {"type": "text", "text": "Same?"}], [text("No.")])},
        ["a.png", "b.png"],
        [user(IMAGE, IMAGE, text("Same?")), assistant("No.")],
    ),
    "conversations with roles": (
        {"id": "a", "video": "a.mp4", "conversations": messages("<video>What?", "Red.")},
        ["a.mp4"],
        [user(VIDEO, text("What?")), assistant("Red.")],
    ),
    "Mantis": (
        {"id": "a", "images": ["a.jpg", "b.jpg"], "conversation": messages("<image> <image> Same?", "No.")},
        ["a.jpg", "b.jpg"],
        [user(IMAGE, IMAGE, text("Same?")), assistant("No.")],
    ),
    "VideoChat2": (
        {"video": "a.mp4", "start": 1.5, "end": 4, "QA": [{"i": "Answer the question.", "q": "What?", "a": "Red."},
         {"q": "And then?", "a": "Blue."}]},
        ["a.mp4#t=1.5,4"],
        [system("Answer the question."), user(VIDEO, text("What?")), assistant("Red."), user("And then?"),
         assistant("Blue.")],
    ),
    "VideoChat2, caption": (
        {"image": "a.jpg", "QA": [{"i": "Describe the image.", "q": "", "a": "A cat."}]},
        ["a.jpg"],
        [system("Describe the image."), user(IMAGE), assistant("A cat.")],
    ),
    "Video-ChatGPT": (
        {"q": "What is it about?", "a": "A man.", "video_id": "v_k_ZXmr8pmrs"},
        ["v_k_ZXmr8pmrs.mp4"],
        [user(VIDEO, text("What is it about?")), assistant("A man.")],
    ),
    "questions": (
        {"video_name": "v_1.mkv", "question": "What?", "answer": "Red."},
        ["v_1.mkv"],
        [user(VIDEO, text("What?")), assistant("Red.")],
    ),
    "WebVid": (
        {"videoid": 21179416, "contentUrl": "https://x/y.mp4", "duration": "PT00H00M11S", "page_dir": "006001_006050",
         "name": "Aerial shot winter forest"},
        ["006001_006050/21179416.mp4"],
        [user(VIDEO), assistant("Aerial shot winter forest")],
    ),
    "VideoFolder": (
        {"file_name": "0001.mp4", "text": "A bulldog."}, ["0001.mp4"], [user(VIDEO), assistant("A bulldog.")]
    ),
    "ImageFolder": (
        {"file_name": "0001.PNG", "caption": "A bulldog."}, ["0001.PNG"], [user(IMAGE), assistant("A bulldog.")]
    ),
    "Hugging Face, path": (
        {"video": {"bytes": None, "path": "0001.mp4"}, "caption": "A bulldog."},
        ["0001.mp4"],
        [user(VIDEO), assistant("A bulldog.")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_a_published_row_becomes_the_conversation_that_it_means(name):
    row, videos, expected = FORMS[name]
    assert read(row) == (videos, expected)


@pytest.mark.parametrize(
    "token", ["<video>", "<VideoHere>", "<|video|>", "<|vision_start|><|video_pad|><|vision_end|>"]
)
def test_placeholders_of_other_projects_are_known(token):
    row = {"videos": ["a.mp4"], "conversations": human(f"Look: {token}\nWhat?", "Red.")}
    assert read(row) == (["a.mp4"], [user(text("Look:"), VIDEO, text("What?")), assistant("Red.")])


COUNTED = {
    "one <image>, two images": ({"image": ["a.jpg", "b.jpg"]}, "<image>?", "1 <image>, and the row names 2 images"),
    "two <image>, one image": ({"image": "a.jpg"}, "<image><image>?", "2 <image>, and the row names 1 image"),
    "no <image>, one image": ({"image": "a.jpg"}, "?", "no <image>, and the row names 1 image"),
    "one <video>, no video": ({}, "<video>?", "1 <video>, and the row names no video; to keep these characters"),
    "one <video>, one image": ({"image": "a.jpg"}, "<video>?", "1 <video>, and the row names no video"),
    "two <image>, one video": ({"video": "a.mp4"}, "<image><image>?", "2 <video>, and the row names 1 video"),
    "one <video>, empty list": ({"videos": []}, "<video>?", "1 <video>, and the row names no video"),
    "one <video>, two frames": ({"video": ["a.jpg", "b.jpg"]}, "<video>?", '2 videos; a video as a list of frame'),
    "one <|image_pad|>, none": ({}, "<|image_pad|>?", "1 <image>, and the row names no image"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("form", ["conversations", "messages", "instruction", "query"])
def test_placeholders_and_media_are_counted_in_every_form(name, form):
    media, question, reason = COUNTED[name]
    if media.keys() & {"video"} and form != "conversations" and "<image>" in question:
        reason = "2 <image>, and the row names no image|no <video>, and the row names 1 video"  # LLaVA's rule alone
    forms = {
        "conversations": {"conversations": human(question, "No.")},
        "messages": {"messages": messages(question, "No.")},
        "instruction": {"instruction": question, "output": "No."},
        "query": {"query": question, "response": "No."},
    }
    if form == "query" and question == "?":  # ms-swift's rule: media without any placeholder come first
        assert read(forms[form] | media)[1][0] == user(IMAGE, text("?"))
        return
    with pytest.raises(BadRow, match=reason):
        read(forms[form] | media)


def test_a_placeholder_in_an_answer_is_text_and_no_place():
    answer = "Use the <video> tag."
    assert read({"messages": messages("How?", answer)}) == ([], [user("How?"), assistant(answer)])
    with_video = {"messages": messages("<video>How?", answer), "videos": ["a.mp4"]}
    assert read(with_video)[1] == [user(VIDEO, text("How?")), assistant(answer)]
    for row in ({"messages": messages("Draw it.", "<image>"), "images": ["a.jpg"]},
                {"image": "a.jpg", "conversations": human("Draw it.", "<image>")}):  # fmt: skip
        with pytest.raises(BadRow, match=r"an answer is text only|no <image>, and the row names 1 image"):
            read(row)


def test_characters_of_a_placeholder_are_text_in_a_part():
    question = [text("What is <video>?")]
    assert read({"messages": messages(question, "A tag.")}) == ([], [user(*question), assistant("A tag.")])
    both = [VIDEO, text("What is <video>?")]
    assert read({"video": "a.mp4", "messages": messages(both, "A tag.")})[1][0] == user(*both)
    # In a table, all contents are lists of parts: there, the row's video has no other place.
    row = {"videos": ["a.mp4"], "messages": messages([text("<video>What?")], [text("Red.")])}
    assert read(row) == (["a.mp4"], [user(VIDEO, text("What?")), assistant("Red.")])


@pytest.mark.parametrize("name", FORMS)
def test_an_unknown_key_is_refused_by_name_in_every_form(name):
    row = FORMS[name][0]
    with pytest.raises(BadRow, match=r"the key 'clip_range' is not known here; remove it, or .* --ignore_keys"):
        read({**row, "clip_range": [1, 2]})
    assert read({**row, "clip_range": [1, 2]}, ignored=["clip_range"]) == FORMS[name][1:]
    assert read({**row, "clip_range": None}) == FORMS[name][1:]


@pytest.mark.parametrize("key", sorted(NOT_TRAINED))
def test_what_would_change_the_training_is_refused_by_name(key):
    row = FORMS["ms-swift"][0]
    with pytest.raises(BadRow, match=f"the key '{key}' is not supported: "):
        read({**row, key: "something"})
    assert read({**row, key: []}) == FORMS["ms-swift"][1:]


def test_metadata_changes_nothing():
    row, videos, expected = FORMS["LLaVA"]
    assert read({**row, **dict.fromkeys(METADATA, "x")}) == (videos, expected)


def asked(part):
    return {"messages": messages([part], "!")}


BAD = [
    ({"a": 1, "b": 2}, r"has none of the known forms, with the keys 'a', 'b'; a row is, say, {\"video\": "),
    ([1], r"is \[1\], and should be an object, say {\"video\""),
    ({"id": "a", "messages": messages("?", "!"), "x": 1}, "the key 'x' is not known"),
    ({"messages": []}, r"messages is \[\], and should be a list with at least one element"),
    ({"messages": ["hello"]}, "message 1: is 'hello', and should be an object"),
    ({"messages": [{"role": "robot", "content": ""}]}, "message 1: role is 'robot', and should be one of human, "),
    ({"messages": [{"role": "tool", "content": ""}]}, "message 1: role is 'tool'"),
    ({"messages": [{"content": "?"}]}, "message 1: role is None"),
    ({"messages": [{"role": "user"}]}, "message 1: it has no content"),
    ({"messages": [{"role": "user", "content": 5}]}, "message 1: its content is 5, and should be text or a list"),
    ({"messages": [{"role": "user", "content": "?", "name": "x"}]}, "message 1: the key 'name' is not known here; a "),
    ({"messages": [{"role": "assistant", "content": "?", "loss": False}]}, "message 1: the key 'loss' is not known"),
    ({"messages": messages(["?"], "!")}, r"message 1: part 1 is '\?'; a part is {\"type\": \"text\""),
    (asked({"type": "audio", "audio": "a.wav"}), "message 1: part 1 has the type 'audio'; a part"),
    (asked({"type": "text"}), "message 1: part 1: its text is None, and should be text"),
    (asked({"type": "text", "text": "a", "image": "b"}), "part 1: the key 'image' is not known"),
    (asked({"type": "video", "video": 3}), "part 1: the video is 3, and should be a path or URI"),
    (asked({"type": "video", "video": ""}), "part 1: the video is '', and should be a path"),
    (asked({"type": "image_url"}), "part 1: it names no image"),
    (asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}),
     "part 1: the image is a data: URL; write its bytes to a file"),
    (asked({"type": "video", "video": "a.mp4", "times": [0]}), "times belongs to a list of frames"),
    (asked({"type": "video", "video": "a.mp4", "video_start": "1"}), "the start or end of a part of a video is '1'"),
    (asked({"type": "video", "video": "a.mp4", "video_start": -1}), "the start or end of a part of a video is -1"),
    (asked({"type": "video", "video": "a.mp4#t=1", "video_end": 9}), "has #t= already"),
    (asked({"type": "video", "video": "a.mp4", "video_start": 3, "video_end": 2}),
     "the part ends before it begins"),
    ({"messages": messages([text("?")], [{"type": "image", "image": "a.png"}])}, "message 2: an answer is text only"),
    ({"messages": messages("?")}, "there is no message of the assistant"),
    ({"messages": messages("?", "!")[::-1]}, "the assistant speaks first"),
    ({"messages": [*messages("?", "!"), *messages([{"type": "video", "video": "a.mp4"}])]}, "a video comes after the"),
    ({"messages": messages("?", "!"), "video": "a.mp4", "videos": ["a.mp4"]}, "has both video and videos"),
    ({"messages": messages("?", "!"), "video": "a.mp4"}, "no <video>, and the row names 1 video"),
    ({"messages": messages([VIDEO], "!")}, "1 <video>, and the row names no video"),
    ({"messages": messages([VIDEO, VIDEO], "!"), "video": "a.mp4"}, "2 <video>, and the row names 1 video"),
    ({"messages": [system("a"), *messages("?", "!")], "system": "b"}, "has two system prompts"),
    ({"messages": messages("?", "!"), "system": 3}, "system is 3, and should be text"),
    ({"messages": messages("?", "!"), "id": True}, "id is True, and should be text or a whole number"),
    ({"messages": messages("?", "!"), "id": ""}, "id is ''"),
    ({"messages": messages("?", "!"), "kind": 3}, "kind is 3, and should be text"),
    ({"conversations": []}, "conversations is"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "turn 1: from is 'function_call', and should"),
    ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: its value is 3"),
    ({"conversations": [{"from": "human", "value": "x", "weight": 0}]}, 'turn 1: a turn is {"from": "human"'),
    ({"conversation": [{"human": "x"}]}, "conversation 1 is {'human': 'x'}, and should be a question and its answer"),
    ({"video": "a.mp4", "QA": [{"q": "?"}]}, 'QA 1 is .* and should be {"i": instruction'),
    ({"QA": [{"q": "?", "a": "!"}]}, "about one video or image, and this one about 0"),
    ({"q": "?", "a": "!"}, "names no file: video or file_name"),
    ({"video": "a.mp4", "image": "b.png", "caption": "x"}, "names more than one file: video or image"),
    ({"text": "a document"}, "names no file"),
    ({**asked(VIDEO), "video": ["a.jpg"], "fps": 0}, "fps is 0"),
    ({**asked(VIDEO), "video": ["a.jpg"], "fps": 1, "times": [0]}, "needs fps or times, and not both"),
    ({**asked(VIDEO), "video": "a.mp4", "fps": 1}, "fps belongs to a video that is a list of frame files"),
    ({**asked(VIDEO), "video": ["a.mp4", "b.mp4"], "fps": 1}, "names image files, and this one a video"),
    ({**asked(VIDEO), "video": ["a.jpg", "/etc/x.jpg"], "fps": 1}, "'/etc/x.jpg' lies outside of /data"),
    ({"video": "a.mp4", "fps": 30, "caption": "x"}, "fps belongs to a video that is a list of frame files"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_refused_with_what_would_be_good(row, reason):
    with pytest.raises(ValueError, match=reason):
        read(row)


def test_keys_that_are_not_followed_are_counted(tmp_path, caplog):
    parts = [{"type": "video", "video": "a.mp4", "fps": 2.0, "nframes": 8, "max_pixels": 9}, text("?")]
    rows = [{"messages": messages(parts, "!")}, {"messages": messages(parts[:1], "!")}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Manifest(str(path))
    policy = "data.sampling, data.num_frames and data.fps choose the frames of all videos"
    assert caplog.messages == [
        f"{path}: fps is not used (2 rows): {policy}",
        f"{path}: max_pixels is not used (2 rows): all frames get the size that the encoder takes",
        f"{path}: nframes is not used (2 rows): {policy}",
    ]


def test_later_instructions_of_videochat2_are_named_as_unused():
    items = [{"i": "First.", "q": "?", "a": "!"}, {"i": "Second.", "q": "?", "a": "!"}]
    record = to_record({"video": "a.mp4", "QA": items}, 1, [FOLDER])
    assert record["unused"] == {"QA.i"}


def test_an_id_is_text_or_a_number_or_is_made_from_file_and_line(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = [{"id": 7, **FORMS["OpenAI"][0]}, {"id": "x", **FORMS["OpenAI"][0]}, {"id": 8.0, **FORMS["OpenAI"][0]}]
        rows = [{**row, "messages": messages("?", "!")} for row in [*rows, {}, {"id": None}]]
        (tmp_path / folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = {folder: [row["id"] for row in Manifest(str(tmp_path / folder / "rows.jsonl")).rows] for folder in ("a", "b")}
    assert ids["a"][:3] == ids["b"][:3] == ["7", "x", "8"]
    assert [name.partition("/")[2] for name in ids["a"][3:]] == ["rows.jsonl:4", "rows.jsonl:5"]
    assert set(ids["a"][3:]).isdisjoint(ids["b"][3:])


def test_ids_repeat_where_a_project_gives_them_to_videos(tmp_path):
    """LLaVA-Video's sets and those made for Video-ChatGPT ask several questions about a video, under its id."""
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "v1", "video": "a.mp4", "conversations": human("<video>?", answer)} for answer in ("a", "b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["messages"][1]["content"] for row in Manifest(str(path)).rows] == ["a", "b"]
    path.write_text("".join(json.dumps({"id": "v1", "messages": messages("?", a)}) + "\n" for a in ("a", "b")))
    with pytest.raises(BadManifest, match="line 2: id 'v1' is also on line 1"):
        Manifest(str(path))
