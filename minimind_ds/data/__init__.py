"""From data files to packed rows: conversation -> sample -> packing, kept in store, served by loader."""

# The label of a token that nothing is to be learnt from; torch's cross-entropy skips it.
IGNORE = -100
