"""``torch.compile(model, backend="fxfuse")``: dynamo's graphs through the same passes. ``fxfuse.backend`` is the way in."""
