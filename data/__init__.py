"""Rows to step batches: sources, prompt formats, tokens and labels, order, micro-batches."""
