"""Data judged by what a model would learn from it: gradients of samples, how diverse they are, which to keep."""
