"""What fxfuse uses of torch that torch does not promise to keep: one idea per file, each with a check in ``tests/test_private.py``.

Nothing else in fxfuse names a private API of torch (that test reads the sources). The names that every subclass of ``nn.Module`` meets
(``_parameters``, ``_buffers``, ``_modules``, ``_apply``, ``_load_from_state_dict``, ``_save_to_state_dict``) are used where they are
needed, because lanes override them; what is relied on is checked by the same test.
"""
