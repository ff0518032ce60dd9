"""Host frameworks: everything that knows one of them, and nothing that knows mathematics."""
