"""Chat messages -> token ids. What users write is text and forges neither a turn nor a video."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

VIDEO_TOKEN, START_TOKEN, END_TOKEN = "<|video_pad|>", "<|im_start|>", "<|im_end|>"

# ChatML, as in Qwen2.5. The loss covers what is between `generation` and `endgeneration`: the assistant's answer and
# the token that ends it.
CHAT_TEMPLATE = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- elif message['content'] is string -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<|video_pad|>' if part['type'] in ('video', 'image') else part['text'] -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


class ChatTokenizer:
    """Tokenises conversations by their chat template.

    Args:
        tokenizer: any fast tokenizer; the special tokens of this module are added where missing.
        template: Jinja template, `CHAT_TEMPLATE` or one that writes the same.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [VIDEO_TOKEN, START_TOKEN, END_TOKEN], "eos_token": END_TOKEN},
            replace_extra_special_tokens=False,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.video_id, self.start_id, self.end_id = tokenizer.convert_tokens_to_ids(
            [VIDEO_TOKEN, START_TOKEN, END_TOKEN]
        )
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = special | set(tokenizer.all_special_ids)

    def encode(self, conversation: list[dict[str, Any]], add_generation_prompt: bool) -> tuple[list[int], list[int]]:
        """Return token ids and loss mask of one conversation, with one token per video part.

        Args:
            conversation: messages; the content of each is text or, except for the assistant's, a list of parts.
            add_generation_prompt: append the start of the assistant's turn.

        Raises:
            ValueError: the text spells a special token, which this tokenizer cannot write as text.
        """
        out = self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        ids, targets = out["input_ids"], out["assistant_masks"]
        pieces = list(self._pieces(conversation, add_generation_prompt))
        expected = [piece for piece, _ in pieces if isinstance(piece, int)]
        if [token for token in ids if token in self._special_ids] != expected:
            # The text, once joined, spells special tokens, or has characters that the tokenizer does not know.
            ids, targets = self._encode_apart(pieces)
            special = self._special_ids - {self.tokenizer.unk_token_id}
            if [token for token in ids if token in special] != expected:
                raise ValueError("the text contains a special token, which this tokenizer cannot write as text")
        return ids, targets

    def _pieces(
        self, conversation: list[dict[str, Any]], add_generation_prompt: bool
    ) -> Iterator[tuple[str | int, int]]:
        """Yield what `CHAT_TEMPLATE` makes of a conversation: (text or id of a special token, 1 if it is a target)."""
        for message in conversation:
            target, content = int(message["role"] == "assistant"), message["content"]
            yield self.start_id, 0
            yield f"{message['role']}\n", 0
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                yield (self.video_id if part["type"] in ("video", "image") else part["text"]), target
            yield self.end_id, target
            yield "\n", 0
        if add_generation_prompt:
            yield self.start_id, 0
            yield "assistant\n", 0

    def _encode_apart(self, pieces: list[tuple[str | int, int]]) -> tuple[list[int], list[int]]:
        """Return token ids and loss mask of pieces; text between special tokens is joined, and taken for text alone."""
        ids: list[int] = []
        targets: list[int] = []
        for (is_text, target), run in groupby(pieces, key=lambda piece: (isinstance(piece[0], str), piece[1])):
            values: list[Any] = [value for value, _ in run]
            ids += self.encode_text("".join(values)) if is_text else values
            targets += [target] * (len(ids) - len(targets))
        return ids, targets

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of text without looking for special tokens: the tokenizer's steps after that search."""
        backend = self.tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]


def visual_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the video and image parts of a conversation."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part for part in parts if part["type"] != "text"]


def with_joined_answers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages; an answer that is a list of texts becomes one text, as the template expects."""
    joined = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and not isinstance(content, str):
            message = message | {"content": "".join(part["text"] for part in content)}
        joined.append(message)
    return joined
