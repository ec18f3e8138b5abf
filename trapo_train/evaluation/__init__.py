"""Accuracy and loss on held-out problems; whether expert prefixes help before anything is trained."""
