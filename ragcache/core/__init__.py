"""One question over given chunks, and the chunks that are computed for the store."""
