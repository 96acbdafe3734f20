"""Raw image-text data in, samples out. base.py says what a source is; then one file per layout.

Nothing is imported here: a task that reads LLaVA's rows should not wait for pyarrow.
"""
