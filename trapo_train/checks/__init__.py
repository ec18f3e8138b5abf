"""What must fit together before a run, what was probably not meant, and what steps show to be wrong."""
