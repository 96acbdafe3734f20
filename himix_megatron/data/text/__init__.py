"""Tokenizers, chat templates, and the mask of the tokens that count in the loss."""
