"""A himix model as a self-contained Hugging Face folder: weights, tokenizer, templates, and the code that runs them."""
