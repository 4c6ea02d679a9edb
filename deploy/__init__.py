"""Puts the two sides on machines and shows what they do. The only package that may import both."""
