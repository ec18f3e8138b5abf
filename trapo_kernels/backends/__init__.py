"""Backends: `reference` defines what is correct; `sweep` runs the chunked path over `rows_torch`, `triton_ops` or `native`."""
