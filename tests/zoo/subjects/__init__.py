"""One file per subject.

Each has a docstring that says where the loop is, ``PACKAGE`` (what pip calls it, pinned), ``ROWS`` (the batch size of the example),
``model()`` and ``inputs(rows) -> (args, kwargs)``; packages are imported inside these two, so that listing needs none of them. ``HEAVY``
is how many heavy launches the fused model may make at most: lower it whenever fxfuse learns more. ``FALLS_BACK``, where there is one,
begins the only reason for which calls may be answered by the original's forward: a shortcoming to be removed.
"""
