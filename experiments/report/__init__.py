"""From run folders to figures, tables, claims with verdicts, and the report."""
