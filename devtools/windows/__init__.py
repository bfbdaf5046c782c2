"""Runs tests with Python and torch for Windows, on Linux in Wine: python3 dev.py test --windows.

What it needs is fetched under .dev/windows when it runs first; nothing of it is in the repository.
"""
