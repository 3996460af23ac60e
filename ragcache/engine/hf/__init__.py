"""The embedded engine: any Hugging Face decoder with RoPE, run through its own forward."""
