"""Versions of modules: what each was trained on, from what and by whom, which one is in use, and since when.

Files by their content, a database that can be made anew from them. Without torch and without Flower. Import from the
files: `registry.py` loads SQLAlchemy.
"""
