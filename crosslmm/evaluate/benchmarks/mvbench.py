"""MVBench: twenty tasks of two hundred questions each, whose accuracies are averaged.

    json/TASK.json            video, question, candidates, answer; some tasks: start, end [s]
    FOLDER_OF_THE_TASK/...    videos, see `VIDEOS`; episodic_reasoning: video files, or a folder of images for each

The branch `video` of the data set has videos that are cut already; its main branch has whole ones, of which a question
is about the part from `start` to `end`. Both are read.
"""

import re

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import NOTHING
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text, texts
from crosslmm.evaluate.questions.question import BadBenchmark, Question, about, letters_of

ENDING = "Only give the best option.\n"
FRAMES, FRAMES_PER_S = "tvqa/frames_fps3_hq", 3.0
"""Where episodic_reasoning has its frames, and their rate."""
VIDEOS: dict[str, tuple[str, str | None]] = {
    "action_antonym": ("ssv2_video_mp4", "ssv2_video"),
    "action_count": ("perception/videos", None),
    "action_localization": ("sta/sta_video_segment", "sta/sta_video"),
    "action_prediction": ("star/Charades_segment", "star/Charades_v1_480"),
    "action_sequence": ("star/Charades_segment", "star/Charades_v1_480"),
    "character_order": ("perception/videos", None),
    "counterfactual_inference": ("clevrer/video_validation", None),
    "egocentric_navigation": ("vlnqa", None),
    "episodic_reasoning": ("tvqa/video_fps3_hq_segment", FRAMES),
    "fine_grained_action": ("Moments_in_Time_Raw/videos", None),
    "fine_grained_pose": ("nturgbd_convert", "nturgbd"),
    "moving_attribute": ("clevrer/video_validation", None),
    "moving_count": ("clevrer/video_validation", None),
    "moving_direction": ("clevrer/video_validation", None),
    "object_existence": ("clevrer/video_validation", None),
    "object_interaction": ("star/Charades_segment", "star/Charades_v1_480"),
    "object_shuffle": ("perception/videos", None),
    "scene_transition": ("scene_qa/video", None),
    "state_change": ("perception/videos", None),
    "unexpected_action": ("FunQA_test/test", None),
}
"""Folder of each task's videos in the branch `video`, and of whole or other ones in the main branch."""
PREFIXES = ("", "data0613/", "video/")
"""Folders that the archives may have been unpacked in."""

LETTER_AND_TEXT = re.compile(r"([A-E])\.\s*.+", re.IGNORECASE)
LETTER_ALONE = re.compile(r"\b([A-E])\b", re.IGNORECASE)
NUMBER_WITH_COMMA = re.compile(r"\d,\d")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
MAX_STOPS = 32
"""Full stops that lmms-eval removes from an answer."""


def read(folder: Folder) -> list[Question]:
    """Read the questions of all tasks that the folder has."""
    tasks = [task for task in VIDEOS if f"json/{task}.json" in folder.names]
    if not tasks:
        raise BadBenchmark(f"{folder.uri}: there is no json/TASK.json in it, such as json/action_antonym.json")
    return [question for task in tasks for question in _read_task(folder, task)]


def extract(answer: str, question: Question) -> str:
    """Return the chosen letter: that before a full stop at the start, or else the first that stands alone."""
    if match := LETTER_AND_TEXT.fullmatch(answer.strip()):
        return match[1].upper()
    words = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    match = LETTER_ALONE.search(words)
    return match[1].upper() if match else NOTHING


def _read_task(folder: Folder, task: str) -> list[Question]:
    table = f"json/{task}.json"

    def make(number: int, row: dict) -> Question:
        candidates, answer = texts(row, "candidates"), text(row, "answer")
        letters = letters_of(candidates)
        if answer not in candidates:
            raise BadBenchmark("its answer is none of its candidates")
        options = "".join(f"({x}) {candidate}\n" for x, candidate in zip(letters, candidates, strict=True))
        return Question(
            id=f"{task}/{number}",
            **about(_video(folder, task, row), f"Question:{text(row, 'question')}\nOption:\n{options}{ENDING}"),
            answer=letters[candidates.index(answer)],
            options=tuple(candidates),
            choices=letters,
            groups=(("task", task), *groups(row, "question_type")),
        )

    return questions_of(table, folder.rows(table), make)


def _video(folder: Folder, task: str, row: dict) -> str:
    """Return the address of a row's video; of its part, if the video is a whole one."""
    name = text(row, "video")
    cut, whole = VIDEOS[task]
    for prefix in PREFIXES:
        for candidate in (f"{prefix}{cut}/{name}", f"{prefix}{cut}/{name}.mp4"):
            if candidate in folder.names:
                return folder.video(candidate)
        if whole and (video := _whole_video(folder, f"{prefix}{whole}/{name}")):
            return f"{video}{_part(row)}"
    return folder.video(f"{cut}/{name}")


def _whole_video(folder: Folder, name: str) -> str | None:
    return folder.video(name) if name in folder.names else folder.frames(name, FRAMES_PER_S)


def _part(row: dict) -> str:
    start, end = row.get("start"), row.get("end")
    if not isinstance(start, int | float) or not isinstance(end, int | float):
        return ""
    if not 0 <= start < end:
        raise BadBenchmark(f"its part ends at {end} s and begins at {start} s")
    return f"#t={start:.3f},{end:.3f}"


def _without_punctuation(text: str) -> str:
    """Remove all occurrences of a mark if one of them stands beside a space, or if the text has a number with a comma;
    otherwise replace them by spaces. Then remove full stops that do not stand before a digit."""
    out = text
    every = NUMBER_WITH_COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or every else " ")
    return re.sub(r"\.(?!\d)", "", out, count=MAX_STOPS)


BENCHMARKS = [Benchmark("mvbench", read, extract, mean_of="task")]
