"""What there is to a run beside its steps: its directory, what stops it, how it goes on, what it leaves to look at and export."""
