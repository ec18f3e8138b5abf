"""Reward functions in TRL's signature, in this process or in workers that may hang or crash."""
