"""Experiments in on-policy distillation of language models on the Countdown task."""
