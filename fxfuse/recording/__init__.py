"""From a model and its inputs to a ``Trace``: what one real run called, and what its structure hangs on."""
