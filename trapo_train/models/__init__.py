"""Loading a model with its tokenizer, what is changed in it, its place on the ranks, and running it on packed rows."""
