"""Attention by the backend that is measured to be fastest and correct, and keys and values of the text computed once."""
