"""What generates: the embedded engine, for any Hugging Face causal language model, and vLLM."""
