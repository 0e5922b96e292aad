"""The compiler passes: one file a pass, each graph in, graph out. Importable as ``fxfuse.passes``."""
