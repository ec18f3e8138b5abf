"""Rows of a dataset → texts → checked, tokenised problems in a resumable order."""
