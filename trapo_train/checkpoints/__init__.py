"""What of a run is kept: checkpoints, and the model as Hugging Face files."""
