"""Answer one question from its chunks, index documents, and precompute the KV of chunks."""
