"""The catalog: documents, the texts and vectors of their chunks, and the KV that they use."""
