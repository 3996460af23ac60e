"""The format of a stored chunk: header, layers, checksums and codecs."""
