"""Backends: `reference` defines what is correct; `sweep` runs the chunked path over `rows_torch` or `triton_ops`."""
