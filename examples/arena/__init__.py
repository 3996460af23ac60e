"""ragcache on KVShareArena, the public board of methods that reuse KV."""
