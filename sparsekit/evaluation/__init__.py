"""Measurements: perplexity, agreement, zero-shot tasks, paired comparisons, speed."""
