"""Transactions over named tables: LMDB, its data files and their compaction."""
