"""Help for tests of passes, models and recipes: a pytest plug-in and a fuzzer of passes."""
