"""The lanes' weights and their pack: recipes, lanes as modules, the original's names."""
