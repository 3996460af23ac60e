"""An object store behind the disk, shared between machines."""
