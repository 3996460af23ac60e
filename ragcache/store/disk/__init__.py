"""The store on disk: chunks in LMDB and files, quotas, verification."""
