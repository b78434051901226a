"""bloomery: a language model's whole life, from raw text to a small, fast, evaluated reasoner."""
