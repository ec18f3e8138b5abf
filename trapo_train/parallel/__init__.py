"""Many ranks: what they tell each other, FSDP2, and a head sharded over the vocabulary."""
