"""ragcache beside other systems that reuse KV, on the same CPU, model and prompts."""
