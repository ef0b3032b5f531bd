"""A plan that people can see: text, JSON and tables, one self-contained HTML page, and the difference of two plans."""
