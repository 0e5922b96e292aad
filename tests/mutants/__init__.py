"""Bugs put into fxfuse on purpose: is each found by the test suite, and by ``validate=True`` at run time?

``python -m mutants`` (``make mutants``) makes them over all rules and prints a table. ``injected`` has bugs in what a rule does (lanes
swapped, recipes permuted, lane axes misplaced, operands dropped, ops replaced), ``sources`` bugs in how the files are written (constants,
comparisons, conditions); ``subjects`` the models they are shown on; ``verdicts`` says whether a model is still right; ``suite`` runs the
tests.
"""
