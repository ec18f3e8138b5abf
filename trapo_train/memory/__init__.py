"""The peak memory of a run, before anything is loaded."""
