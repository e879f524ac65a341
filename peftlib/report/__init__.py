"""What readers see: executed notebooks, generated pages, figures and tables, the book."""
