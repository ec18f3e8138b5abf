"""What to sample for a problem, from the rewards so far; plans run beside each other; samples as files."""
