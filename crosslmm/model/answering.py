"""Greedy answers: the one call of `generate` whose answers are scored."""

from typing import Any

import torch
from transformers import BatchFeature

from crosslmm.model.processing import CrossLMMProcessor


@torch.no_grad()
def greedy_answers(
    model: Any, processor: CrossLMMProcessor, prompts: BatchFeature, max_new_tokens: int, **options: Any
) -> list[str]:
    """Return the model's greedy answer to each prompt of a batch, without special tokens.

    Args:
        model: in eval mode.
        processor: the one that made the prompts, with `answer=True`.
        prompts: on any device; copied to the model's.
        max_new_tokens: length limit of an answer [tokens].
        options: further arguments of `generate`.
    """
    prompts = prompts.to(next(model.parameters()).device)
    tokens = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, **options)
    new = tokens[:, prompts["input_ids"].shape[1] :]
    # Clean-up would remove spaces before punctuation, which the references have.
    texts = processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]
