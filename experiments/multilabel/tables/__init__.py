"""Tables of the multilabel study."""
