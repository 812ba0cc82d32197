"""CrossLMM (arXiv 2505.17020): long-video language models with few visual tokens, trained on Ray."""
