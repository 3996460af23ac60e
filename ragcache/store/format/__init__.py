"""How a chunk becomes bytes: header, records of layers, checksums and codecs."""
