"""What a run keeps: its directory, checkpoints, random states, the exported model; and how one goes on."""
