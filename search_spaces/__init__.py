"""Studies: each module here defines one as ``study``; ``--space search_spaces.NAME`` runs it."""
