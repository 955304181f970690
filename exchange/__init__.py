"""Networks from and for others' code."""
