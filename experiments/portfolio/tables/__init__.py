"""Tables of the portfolio study."""
