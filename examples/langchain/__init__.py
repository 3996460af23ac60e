"""Small LangChain programs with ragcache; tests/langchain/test_examples.py runs all of them."""
