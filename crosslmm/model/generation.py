"""`generate` for a model with videos: they belong to samples, the cache remembers them, no answer has placeholders. And
the one call of it whose answers are scored, `greedy_answers`."""

from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.utils import logging

from crosslmm.model.processing import CrossLMMProcessor

log = logging.get_logger(__name__)

VISUAL_INPUTS = ("pixel_values", "features", "num_frames", "plan")
_Base: Any = GenerationMixin  # its methods are typed for a class that has it and PreTrainedModel as bases


class VideoGenerationMixin(_Base):
    """`GenerationMixin`, for every way of decoding that it knows: greedy, sampling, beams, assisted, static caches."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward pass; the videos are among them only if they are not cached yet."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            past_key_values,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )
        # An assistant model has no first iteration, only an empty cache.
        seen = past_key_values.get_seq_length() if past_key_values is not None and not is_first_iteration else 0
        is_prompt = isinstance(seen, int) and seen == 0
        for name in VISUAL_INPUTS:
            if is_prompt and kwargs.get(name) is not None:
                inputs[name] = kwargs[name]
            else:
                inputs.pop(name, None)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and inputs_embeds is not None and input_ids.shape == inputs_embeds.shape[:2]:
            inputs["input_ids"] = input_ids[:, -embeds.shape[1] :]  # they say where the placeholders are
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat every sample `expand_size` times, with its frames, which are encoded once."""
        visual = {name: model_kwargs.pop(name, None) for name in VISUAL_INPUTS} if expand_size > 1 else {}
        expanded: tuple[Tensor | None, dict[str, Any]] = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if visual.get("num_frames") is not None:
            expanded[1].update(self._expand_frames(expand_size, **visual))
        return expanded

    def _expand_frames(
        self, times: int, pixel_values: Tensor | None, features: Tensor | None, num_frames: Tensor, plan: Any
    ) -> dict[str, Tensor]:
        """Return the visual inputs without a plan, which the model makes anew."""
        expanded = {"num_frames": num_frames.repeat_interleave(times, dim=0)}
        if features is None and pixel_values is not None:
            features = self.encode(pixel_values.to(self.device))
        if features is not None:
            of_samples = features.split(num_frames.sum(dim=1).tolist())
            expanded["features"] = torch.cat([frames for frames in of_samples for _ in range(times)])
        return expanded

    def _prepare_generated_length(
        self, generation_config: Any, inputs_tensor: Tensor, input_ids_length: int, **kwargs: Any
    ) -> Any:
        """Let answers end at the decoder's last position; the last token is not fed back and needs none."""
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config,
            inputs_tensor=inputs_tensor,
            input_ids_length=input_ids_length,
            **kwargs,
        )
        positions = self.config.text_config.max_position_embeddings
        prompt = inputs_tensor.shape[1]  # of `inputs_embeds`, which `max_length` does not count
        limit = positions + 1 - (prompt - input_ids_length)
        if generation_config.max_length > limit and prompt <= positions:
            log.warning_once(f"answers end at the decoder's {positions} positions (max_position_embeddings)")
            generation_config.max_length = limit
        return generation_config

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Add one that keeps the model from generating the placeholder of a video, which only stands for a frame."""
        processors: LogitsProcessorList = super()._get_logits_processor(*args, **kwargs)
        if (placeholder := self.config.video_token_id) is not None:
            processors.append(SuppressTokensLogitsProcessor([placeholder], device=kwargs.get("device") or "cpu"))
        return processors

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Cut candidates before a placeholder: an assistant with another tokenizer may spell one."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        propose = generator.get_candidates

        def propose_no_placeholder(input_ids: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
            ids, logits = propose(input_ids, **options)
            generated = ids[0, input_ids.shape[1] :].tolist()
            if self.config.video_token_id in generated:
                allowed = generated.index(self.config.video_token_id)
                ids = ids[:, : input_ids.shape[1] + allowed]
                logits = logits[:, :allowed] if logits is not None else None
            return ids, logits

        generator.get_candidates = propose_no_placeholder
        return generator


def greedy_answers(
    model: Any, processor: CrossLMMProcessor, prompts: BatchFeature, max_new_tokens: int, **options: Any
) -> list[str]:
    """Return the model's greedy answer to each prompt of a batch, without special tokens; arguments as for
    `greedy_tokens`."""
    return as_text(processor, greedy_tokens(model, prompts, max_new_tokens, **options))


@torch.no_grad()
def greedy_tokens(model: Any, prompts: BatchFeature, max_new_tokens: int, **options: Any) -> torch.Tensor:
    """Return the tokens of the model's greedy answers, int64 (B, longest answer), padded behind their ends.

    Args:
        model: in eval mode.
        prompts: of the processor, with `for_generation=True`, on any device; copied to the model's.
        max_new_tokens: length limit of an answer [tokens].
        options: further arguments of `generate`.
    """
    prompts = prompts.to(next(model.parameters()).device)
    tokens = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, **options)
    return tokens[:, prompts["input_ids"].shape[1] :]


def as_text(processor: CrossLMMProcessor, tokens: torch.Tensor) -> list[str]:
    """Return the text of each answer, without special tokens."""
    # Clean-up would remove spaces before punctuation, which the references have.
    texts = processor.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]
