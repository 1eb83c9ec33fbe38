"""Tables of the bilinear study."""
