"""Random models, each compared with itself fused: outputs, all gradients, buffers, training, every form of its state.

A case is plain data (``cases.cases()`` draws one, JSON can hold it); ``model.build`` writes classes for it, as a user would have
written them; ``compare.check`` fuses and compares. ``python -m fuzz --minutes 60 --seed 1`` in ``tests/`` (``make fuzz``) goes on
for as long as it is told. What was found is in ``found.py``. Each part of a case is drawn by a file of its own: ``bodies`` (of ``lines``,
``samples``), ``forks``, ``joins``, ``loops``, ``structure``, ``inputs``.
"""
