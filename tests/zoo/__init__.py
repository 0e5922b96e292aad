"""Models from other people's packages, built from their own configuration with random weights: what fxfuse has to cope with unchanged.

``zoo.registry`` finds the subjects, one small file each in ``zoo/subjects``; ``zoo.check`` compares a fused one with its original.
"""
