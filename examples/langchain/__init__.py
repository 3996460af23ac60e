"""ragcache in LangChain, in small programs: tests/langchain/test_examples.py runs them all."""
