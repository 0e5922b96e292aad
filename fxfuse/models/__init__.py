"""Modules and tensors of any model: trees, copies, random state, inputs. Nothing here knows what fusing is."""
