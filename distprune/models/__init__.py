"""Models as files: read into slices, written, packed, shrunk, described."""
