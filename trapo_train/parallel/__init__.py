"""Many ranks: what they tell each other, and a head sharded over the vocabulary."""
