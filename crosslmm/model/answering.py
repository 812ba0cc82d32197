"""Greedy answers: the one call of `generate` whose answers are scored."""

from typing import Any

import torch
from transformers import BatchFeature

from crosslmm.model.processing import CrossLMMProcessor


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
