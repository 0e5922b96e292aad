"""Is the fused model equal to the original?"""
