"""The model `crosslmm` of lmms-eval: `lmms_eval --model crosslmm --model_args pretrained=FOLDER --tasks ...`.

lmms-eval finds it by `lmms_eval_entry`, and lives in an environment of its own (docs/evaluation.md). Frames,
prompts and answers are those of jobs/evaluate.py.
"""

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.evaluate.asking.batch_answerer import BatchAnswerer, DecodedVideos
from crosslmm.evaluate.questions.question import Messages, Question
from crosslmm.inference.answerer import Answerer

log = logging.getLogger(__name__)

IMAGE_MARK = "<image>"
"""What stands in a text for each of its images."""
ANSWER_TOKENS = 128
"""Length limit of an answer where a task names none [tokens]."""
lmms: Any = importlib.import_module("lmms_eval.api.model").lmms


class CrossLMM(lmms):
    """An exported model.

    Args:
        pretrained: folder of an exported model, such as the folder `model` of a run.
        device: device to compute on; default: a GPU if there is one.
        batch_size: has no effect: all questions about a video are asked together.
        num_frames: frames of a video, at most; default: those of the training run.
    """

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: Any = 1, num_frames: Any = None, **_: Any
    ) -> None:
        super().__init__()
        self.answerer = Answerer(pretrained, device)
        changed = {"roots": [], **({"num_frames": int(num_frames)} if num_frames else {})}
        data = self.answerer.config.data.model_copy(update=changed)
        self.decoder = Decoder(data, self.answerer.processor.image_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return the greedy answer to each request; an empty one, which is wrong, if its video cannot be read."""
        answers = [""] * len(requests)
        questions: dict[tuple[Any, int], list[tuple[int, Question]]] = {}
        seen: dict[Any, list[Any]] = {}
        for number, request in enumerate(requests):
            context, options, visuals_of, doc_id, task, split = request.args
            visuals = visuals_of(self.task_dict[task][split][doc_id]) or []
            # Requests about the same file share its frames; images are those of one request.
            key = tuple(visuals) if all(isinstance(visual, str) for visual in visuals) and visuals else number
            seen[key] = visuals
            limit = int(options.get("max_new_tokens") or ANSWER_TOKENS)
            question = Question(str(number), (), _messages(context, visuals), "")
            questions.setdefault((key, limit), []).append((number, question))
        for (key, limit), of_visuals in questions.items():
            if (watched := self._watch(seen[key])) is not None:
                (replies,) = BatchAnswerer(self.answerer, limit)([(watched, [question for _, question in of_visuals])])
                for (number, _), reply in zip(of_visuals, replies, strict=True):
                    answers[number] = reply.text
                    if reply.error:
                        log.warning("request %d is not asked: %s", number, reply.error)
        return answers

    def _watch(self, visuals: Sequence[Any]) -> DecodedVideos | None:
        """Return the frames of videos (paths) and images (PIL); None if one of them cannot be read."""
        videos, times = [], []
        for visual in visuals:
            if isinstance(visual, str):
                (video,) = self.decoder([visual])
                if isinstance(video, VideoFailure):
                    log.warning("%s cannot be read: %s", visual, video.reason)
                    return None
                videos.append(video.images)
                times.append(video.times)
            else:
                videos.append(self._resized(np.asarray(visual.convert("RGB")))[None])
                times.append(np.zeros(1))
        return DecodedVideos(videos, times)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        side = self.answerer.processor.image_size
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
        return VideoReformatter().reformat(frame, side, side).to_ndarray()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise NotImplementedError: jobs/evaluate.py --likelihood compares options."""
        raise NotImplementedError("crosslmm answers by generation alone; jobs/evaluate.py has --likelihood")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise NotImplementedError: there are no tasks of several rounds."""
        raise NotImplementedError("crosslmm has no tasks of several rounds")


def _messages(context: str, visuals: Sequence[Any]) -> Messages:
    """Return the conversation of a request: its visuals where the text has marks for them, or else before the text."""
    texts = context.split(IMAGE_MARK)
    if len(texts) != len(visuals) + 1:
        texts = [*[""] * len(visuals), context]
    content: list[dict[str, Any]] = []
    for i, text in enumerate(texts):
        if i:
            content.append({"type": "video" if isinstance(visuals[i - 1], str) else "image"})
        content += [{"type": "text", "text": text}] * bool(text)
    return [{"role": "user", "content": content}]
