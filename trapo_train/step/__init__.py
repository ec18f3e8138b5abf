"""Samples → advantages → micro-batches → one optimizer step, and what it reports."""
