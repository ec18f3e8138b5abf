"""Loading a model with its tokenizer, what is changed in it, and running it on packed rows."""
