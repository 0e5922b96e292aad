"""Which form of a region is the fastest here: estimated, measured, kept on disk."""
