"""Small made-up folders of the benchmarks, in the layout in which these are published, with every odd case that their
formats allow. The videos are real H.264 files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.thumbnails import strip
from tests.support.common import random_frames

ROWS = 24
"""Rows of each table."""
PREDICTIONS = [
    "A", "B.", "(C)", "D)", "(B) because A is wrong", "b", "a.", "", " ", "A and B", "The answer is C.", "Answer: D",
    "E", "(E) none", "I think that it is the dog", "!!!!", "yes", "No, it is not", "nothing of this", "C: the cat",
    "B. The dog is red", "the best answer is (d)", "The best answer is: B", "ABCD", "DC", "x", "A, B and C", "\nC\n",
    "3,000 m", "It is 1.5 m. A", "option b", "Option 2", "Caption B", "Caption A: it rises", "it falls", "2.", "1",
    "答案是B", "The dog is red and it runs", "NASA says so", "'C'", '"D"', "A.B", "(A) (B) C", "I choose D, not A", "e",
    "Best option: (C", "A. The dog is red", "B) the cat", "The correct answer is Elephant", "no", "YES!", "b) it falls",
]  # fmt: skip
"""What models say: letters in every dress, sentences, nothing."""
TEXTS = ["The dog is red", "the cat", "3,000 m", 'it\'s a "car", or none', "NASA"]
"""Options."""

_CLIPS: dict[int, bytes] = {}


def clip(number: int, frames: int = 8) -> bytes:
    """Return one of four clips of one second."""
    if number % 4 not in _CLIPS:
        _CLIPS[number % 4] = encode_clip(np.repeat(random_frames(4, number % 4), frames // 4, axis=0))
    return _CLIPS[number % 4]


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path: Path, value: object) -> None:
    write(path, json.dumps(value).encode())


def videomme(folder: Path) -> list[dict]:
    """Three questions on each of eight videos, of which one has no subtitles, one is .MP4 and one is .mkv."""
    rows = []
    for i in range(ROWS):
        video = f"v{i // 3}"
        rows.append(
            {
                "video_id": f"{i // 3:03d}",
                "duration": ("short", "medium", "long")[i // 3 % 3],
                "domain": ("Knowledge", "Life Record")[i % 2],
                "sub_category": ("Geography", "Travel")[i % 2],
                "url": "https://example.org",
                "videoID": video,
                "question_id": f"{i // 3:03d}-{i % 3}",
                "task_type": ("Counting Problem", "Action Reasoning")[i % 2],
                "question": f"What is it, number {i}?" + "\nLook twice." * (i % 5 == 0),
                "options": [f"{letter}. {text}" for letter, text in zip("ABCD", TEXTS, strict=False)],
                "answer": "ABCD"[i % 4],
            }
        )
        suffix = {1: "MP4", 2: "mkv"}.get(i // 3, "mp4")
        write(folder / "data" / f"{video}.{suffix}", clip(i // 3))
        if i // 3 != 3:
            write(folder / "subtitle" / f"{video}.srt", srt(i // 3))
    write_parquet(folder / "videomme" / "test-00000-of-00001.parquet", rows)
    return rows


def srt(number: int) -> bytes:
    """Subtitles of a clip of one second: spoken lines, a name of a song, and lines that no frame shows."""

    def block(index: int, start: float, end: float, text: str) -> str:
        times = " --> ".join(f"00:00:{int(t):02d},{round(t % 1 * 1000):03d}" for t in (start, end))
        return f"{index}\n{times}\n{text}"

    def spoken(text: str) -> str:
        return f'<font color="white" size=".72c">{text}</font>'

    blocks = [
        block(1, 0, 0.25, spoken(f"Hello {number}")),
        block(2, 0.25, 0.5, "[Music]"),
        block(3, 0.5, 0.75, spoken("first line") + "\n" + spoken("second line")),
        block(4, 0.75, 3, spoken("und Umlaute: äöü")),
        block(5, 50, 60, spoken("after the end")),
    ]
    return ("\n\n".join(blocks) + "\n\n").encode()


def mvbench(folder: Path) -> list[tuple[str, dict]]:
    """Six tasks: cut videos, whole videos with start and end, and a folder of images for each video."""
    from crosslmm.evaluate.benchmarks.mvbench import FRAMES, VIDEOS

    rows: list[tuple[str, dict]] = []
    tasks = ["action_antonym", "moving_count", "scene_transition", "object_interaction", "fine_grained_pose"]
    for task in [*tasks, "episodic_reasoning"]:
        of_task = []
        for i in range(4):
            candidates = TEXTS[: 2 + i]  # two to five options
            name = f"{task}_{i}" + (".mp4" if task != "episodic_reasoning" else "")
            row = {
                "video": name,
                "question": f"Which, {i}?",
                "candidates": candidates,
                "answer": candidates[i % len(candidates)],
            }
            cut, whole = VIDEOS[task]
            if task == "object_interaction":  # whole videos
                row |= {"start": 0.25, "end": 0.75}
                write(folder / str(whole) / name, clip(i))
            elif task == "episodic_reasoning":
                row |= {"fps": 3, "start": 0.5, "end": 2.0}
                for frame in range(8):
                    write(folder / FRAMES / name / f"{frame + 1:05d}.jpg", strip([random_frames(1, i * 10 + frame)]))
            else:
                write(folder / cut / name, clip(i))
            of_task.append(row)
        write_json(folder / "json" / f"{task}.json", of_task)
        rows += [(task, row) for row in of_task]
    return rows


def mlvu_dev(folder: Path) -> list[dict]:
    """Seven tasks of different sizes; options stand in the question."""
    tasks = ["anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning"]
    rows = []
    for i in range(ROWS):
        task = tasks[min(i // 2, 6)]
        options = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", TEXTS, strict=False))
        rows.append(
            {
                "video_name": f"{task}_{i // 2}.mp4", "duration": 1.0, "question": f"What happens, {i}?\n{options}",
                "answer": "ABCD"[i % 4], "task_type": task,
            }
        )  # fmt: skip
        write(folder / rows[-1]["video_name"], clip(i))
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    return rows


def longvideobench(folder: Path) -> list[dict]:
    """Two to five options; subtitles in both forms, some of which end nowhere or no frame shows."""
    rows = []
    for i in range(ROWS):
        options = TEXTS[: 2 + i % 4]
        name = f"video{i // 2}"
        rows.append(
            {
                "id": f"{name}_{i}", "video_id": name, "question": f"At which moment, {i}?",
                **{f"option{k}": options[k] if k < len(options) else "N/A" for k in range(5)},
                "correct_choice": i % len(options), "video_path": f"{name}.mp4",
                "subtitle_path": f"{name}_en.json", "duration": 1.0, "duration_group": (15, 60, 600, 3600)[i % 4],
                "starting_timestamp_for_subtitles": float(i // 2 % 3), "question_category": ("S2E", "T3O")[i % 2],
            }
        )  # fmt: skip
        write(folder / "videos" / f"{name}.mp4", clip(i // 2))
        write_json(folder / "subtitles" / f"{name}_en.json", subtitles(i // 2))
    write_parquet(folder / "validation-00000-of-00001.parquet", rows)
    return rows


def subtitles(number: int) -> list[dict]:
    """Return the subtitles of a clip that begins after `number % 3` seconds of a longer video."""
    first = float(number % 3)
    if number % 2:
        return [
            {"timestamp": [first + 0.1, first + 0.4], "text": "one"},
            {"timestamp": [first + 0.4, first + 0.45], "text": "two, short"},
            {"timestamp": [first + 0.6, None], "text": "three, without an end"},
            {"timestamp": [first + 40.0, first + 50.0], "text": "four, later"},
        ]
    return [
        {"start": f"00:00:0{number % 3}.100", "end": f"00:00:0{number % 3}.900", "line": "one"},
        {"start": "00:01:00.000", "end": "00:01:02.000", "line": "two, later"},
    ]


def lvbench(folder: Path) -> list[dict]:
    """Options in a column of their own; questions of several types."""
    rows = [
        {
            "video_path": f"long_{i // 4}.mp4", "question": f"Why, {i}?", "options": TEXTS[:4], "answer": "ABCD"[i % 4],
            "question_type": ["reasoning", "summarization"][: 1 + i % 2],
        }
        for i in range(ROWS)
    ]  # fmt: skip
    for row in rows:
        write(folder / row["video_path"], clip(len(row["video_path"])))
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
    return rows


def perceptiontest(folder: Path) -> list[dict]:
    """Three options, and four in one row; one video is .MP4."""
    rows = [
        {
            "video_name": f"video_{i // 3}", "question": f"How many, {i}?", "question_id": str(i % 3),
            "options": TEXTS[: 4 if i == 5 else 3], "answer_id": str(i % 3), "area": ("physics", "memory")[i % 2],
            "reasoning": "descriptive", "tag": ["motion", "place recognition"][: 1 + i % 2],
        }
        for i in range(ROWS)
    ]  # fmt: skip
    for i in range(0, ROWS, 3):
        write(folder / "videos" / f"video_{i // 3}.{'MP4' if i == 3 else 'mp4'}", clip(i))
    write_parquet(folder / "mc_question_val" / "validation-00000-of-00001.parquet", rows)
    return rows


def egoschema(folder: Path) -> list[dict]:
    """Five options, each with its letter."""
    rows = [
        {
            "question_idx": str(i), "question": f"What did C do, {i}?", "video_idx": f"{i:08x}", "answer": str(i % 5),
            "option": [f"{letter}. {text}" for letter, text in zip("ABCDE", TEXTS, strict=True)],
        }
        for i in range(ROWS)
    ]  # fmt: skip
    for row in rows:
        write(folder / "videos" / f"{row['video_idx']}.mp4", clip(int(row["question_idx"])))
    write_parquet(folder / "Subset" / "test-00000-of-00001.parquet", rows)
    return rows


def nextqa(folder: Path) -> list[dict]:
    """Five options without letters, with spaces around them; videos are numbers."""
    rows = [
        {
            "video": 1000 + i // 2, "question": f" why did it move, {i} ", "answer": i % 5, "qid": i % 2,
            "type": ("CW", "TN", "DO")[i % 3], **{f"a{k}": f" {TEXTS[k]} " for k in range(5)},
        }
        for i in range(ROWS)
    ]  # fmt: skip
    for row in rows:
        write(folder / "NExTVideo" / f"{row['video']}.mp4", clip(row["video"]))
    write_parquet(folder / "MC" / "test-00000-of-00001.parquet", rows)
    return rows


def tempcompass(folder: Path) -> list[tuple[str, dict]]:
    """Multiple choice, yes or no, and captions with both kinds of names."""
    rows: list[tuple[str, dict]] = []
    for i in range(8):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABC", TEXTS, strict=False))
        lettered = i % 2 == 0
        names = ("Caption A", "Caption B") if lettered else ("Option 1", "Option 2")
        captions = [f"{names[0]}: it rises", f"{names[1]}: it falls"]
        common = {"video_id": f"clip{i}", "dim": ("action", "speed", "direction", "order", "attribute_change")[i % 5]}
        rows += [
            (
                "multi-choice",
                common | {"question": f"What, {i}?\n{options}", "answer": f"{'ABC'[i % 3]}. {TEXTS[i % 3]}"},
            ),
            ("yes_no", common | {"question": f"Does it move, {i}?", "answer": ("yes", "no")[i % 2]}),
            (
                "caption_matching",
                common | {"question": f"Which, {i}?\n" + "\n".join(captions), "answer": captions[i // 2 % 2]},
            ),
        ]
        write(folder / "videos" / f"clip{i}.mp4", clip(i))
    for task in ("multi-choice", "yes_no", "caption_matching"):
        write_parquet(folder / task / "test-00000-of-00001.parquet", [row for name, row in rows if name == task])
    return rows


def vnbench(folder: Path) -> list[dict]:
    """Six samples of three types, each asked four times with the options in other places."""
    rows = []
    for sample in range(6):
        kind = ("ret_edit1", "cnt_insert1", "ord_edit1")[sample % 3]
        for attempt in range(4):
            options = [TEXTS[(k + attempt) % 4] for k in range(4)]
            rows.append(
                {
                    "video": f"/VNBench_new/{kind}_{sample}.mp4", "question": "What is it?", "options": options,
                    "gt": TEXTS[0], "gt_option": "ABCD"[options.index(TEXTS[0])], "type": kind, "length": 10 + sample,
                    "needle_time": [1], "try": attempt,
                }
            )  # fmt: skip
        write(folder / "VNBench_new" / f"{kind}_{sample}.mp4", clip(sample))
    write_json(folder / "VNBench-main-4try.json", rows)
    return rows


FOLDERS: dict[str, Callable[[Path], list]] = {
    "videomme": videomme, "videomme_w_subtitle": videomme, "mvbench": mvbench, "mlvu_dev": mlvu_dev,
    "longvideobench_val_v": longvideobench, "longvideobench_val_i": longvideobench, "lvbench": lvbench,
    "perceptiontest_val_mc": perceptiontest, "egoschema_subset": egoschema, "nextqa_mc_test": nextqa,
    "tempcompass": tempcompass, "vnbench": vnbench,
}  # fmt: skip
"""Writes the folder of each benchmark; returns its rows."""
