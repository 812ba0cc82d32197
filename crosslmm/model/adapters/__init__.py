"""Adapters: LoRA over a base whose weights stay as they are, in the format of PEFT."""
