"""What ``benchmarks/census.py`` is made of: small configurations, inputs for them, torch.nn's own layers, the judgement, the workers."""
