"""From recorded runs to regions: which modules hold a loop, and the programs of their planned forms."""
