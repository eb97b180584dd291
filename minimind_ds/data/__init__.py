"""From JSONL files to packed rows: conversation -> sample -> packing, kept in store, served by loader."""
