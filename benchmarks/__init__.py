"""What would a user gain? `python -m benchmarks` answers on any machine; each question is one file of `benchmarks/questions`."""
